"""Models of peft: what of them is trained, saved, rolled back and loaded."""

import copy

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import pcx

peft = pytest.importorskip("peft")

LORA = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
PARTS = {"target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}
CONFIGS = {
    "lora": peft.LoraConfig(r=2, **PARTS),
    "biases": peft.LoraConfig(r=2, bias="all", **PARTS),
    "dora": peft.LoraConfig(r=2, use_dora=True, **PARTS),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **PARTS),
    "lokr": peft.LoKrConfig(r=2, **PARTS),
    "ia3": peft.IA3Config(
        target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], modules_to_save=["head"]
    ),
    "norms": peft.LNTuningConfig(target_modules=["norm1"], modules_to_save=["head"]),
    "randlora": peft.RandLoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]),
    "vera": peft.VeraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]),
}


def adapted(backbone, config):
    return peft.get_peft_model(copy.deepcopy(backbone), copy.deepcopy(config)).double()


def test_a_model_of_peft_is_saved_and_loaded(backbone, loader, dataset, tmp_path):
    given = adapted(backbone, LORA)
    pcx.fit(given, loader, epochs=2, lr=0.02, progress=False)
    pcx.save(given, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", backbone)
    x = dataset.tensors[0]
    assert torch.equal(loaded(x), given.eval()(x))
    assert isinstance(loaded, pcx.PeftModel)
    with pytest.raises(ValueError, match="model: a PeftModel, expected a pcx.VPT"):
        pcx.score(loaded, loader)
    with pytest.raises(ValueError, match=r"model: a VisionTransformer, expected what peft"):
        pcx.PeftModel(backbone)


def test_a_backbone_and_a_config_leave_the_backbone_alone(backbone, loader, dataset, tmp_path):
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    kinds = [type(m) for m in backbone.modules()]
    config = peft.LoraConfig(r=2, target_modules=["qkv"], bias="all", init_lora_weights=False)
    model = pcx.PeftModel(backbone, config, num_classes=4)
    assert config.modules_to_save is None
    x = dataset.tensors[0]
    assert model(x).shape == (len(x), 4)
    rows = pcx.fit(model, loader, epochs=4, lr=0.02, clip_grad=1.0, progress=False)
    assert rows[-1]["loss"] < rows[0]["loss"]
    expected = model.eval()(x)
    torch.testing.assert_close(pcx.freeze(model)(x), expected, rtol=1e-9, atol=1e-9)  # merged
    pcx.save(model, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), expected)
    assert kinds == [type(m) for m in backbone.modules()]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the user's backbone was written"


def test_lora_of_the_papers_size():
    backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    config = peft.LoraConfig(r=8, target_modules=["qkv"])
    model = pcx.PeftModel(backbone, config)
    assert sum(p.numel() for p in model.trainable().values()) == 294_912
    with_head = pcx.PeftModel(backbone, config, num_classes=10)
    assert sum(p.numel() for p in with_head.trainable().values()) == 294_912 + 7_690


@pytest.mark.parametrize("name", ["Dinov2Model", "SiglipVisionModel"])
def test_a_vision_tower_is_adapted(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.removesuffix('Model').removesuffix('Vision')}Config")
    if name.startswith("Siglip"):
        config = transformers.SiglipVisionConfig
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
    if name.startswith("Dinov2"):
        del size["intermediate_size"]
    tower = getattr(transformers, name)(config(**size))
    config = peft.LoraConfig(r=2, target_modules=["query", "q_proj"])  # names of two versions
    model = pcx.PeftModel(tower, config, num_classes=5)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert sum(p.numel() for n, p in model.trainable().items() if "lora" not in n) == 24 * 5 + 5


def test_the_head_over_16_bits_is_float32(backbone):
    config = peft.LoraConfig(r=2, target_modules=["qkv"])
    model = pcx.PeftModel(copy.deepcopy(backbone).bfloat16(), config, num_classes=4)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert model(torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.float32


def test_what_a_config_does_not_fit_is_named(backbone):
    config = peft.LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(ValueError, match="config: it does not fit VisionTransformer"):
        pcx.PeftModel(backbone, config)
    with pytest.raises(ValueError, match="model: a PeftModel, which is adapted already"):
        pcx.PeftModel(adapted(backbone, LORA), LORA)
    with pytest.raises(ValueError, match="num_classes: the head of a model that peft"):
        pcx.PeftModel(adapted(backbone, LORA), num_classes=3)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft of timm's LayerNorm
@pytest.mark.parametrize("name", CONFIGS)
def test_every_adapter_is_saved_and_loaded(backbone, loader, dataset, tmp_path, name):
    """Onto a backbone with any head, and whatever is frozen when the model is saved."""
    model, x = adapted(backbone, CONFIGS[name]), dataset.tensors[0]
    before = {n: t.clone() for n, t in pcx.PeftModel(model).own_state().items()}
    pcx.fit(model, loader, epochs=2, lr=0.05, warmup_epochs=0, progress=False)
    model.requires_grad_(False)
    pcx.save(model, tmp_path / "m")
    trained = pcx.PeftModel(model).own_state()
    moved = {n for n, t in trained.items() if not torch.equal(t, before[n])}
    assert any("head" not in name for name in moved)
    backbone.reset_classifier(7)
    given = copy.deepcopy(backbone.state_dict())
    loaded = pcx.load(tmp_path / "m", backbone)
    assert all(torch.equal(t, given[n]) for n, t in backbone.state_dict().items())
    # AdaLoRA divides by a rank that the loaded model has in float32.
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=1e-7)
    assert loaded.record.recipe["lr"] == 0.05  # of a fit of the model as peft gives it
    assert set(loaded.own_state()) == set(trained)


def test_a_model_of_peft_is_frozen(backbone, loader, dataset):
    model = adapted(backbone, CONFIGS["lora"])
    pcx.fit(model, loader, epochs=1, lr=0.05, warmup_epochs=0, progress=False)
    expected = model.eval()(dataset.tensors[0])
    torch.testing.assert_close(pcx.freeze(model)(dataset.tensors[0]), expected)


def test_a_head_that_peft_does_not_save_is_part_of_the_backbone(backbone, dataset, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(backbone), config).double().eval()
    pcx.save(model, tmp_path / "m")
    x = dataset.tensors[0]
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model(x))
    with torch.no_grad():
        backbone.head.weight.add_(1)
    with pytest.raises(ValueError, match="backbone: .* was trained on"):
        pcx.load(tmp_path / "m", backbone)


def test_a_head_that_is_freed_by_hand_is_saved(backbone, loader, dataset, tmp_path):
    model = adapted(backbone, peft.LoraConfig(r=2, target_modules=["qkv"]))
    model.base_model.model.head.requires_grad_(True)
    pcx.fit(model, loader, epochs=1, lr=0.05, warmup_epochs=0, progress=False)
    model.requires_grad_(False)
    pcx.save(model, tmp_path / "m")
    x = dataset.tensors[0]
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model.eval()(x))


def test_one_of_two_adapters_is_saved(backbone, dataset, tmp_path):
    model = adapted(backbone, LORA)
    model.add_adapter(
        "second",
        peft.LoraConfig(
            r=3, target_modules=["fc1"], modules_to_save=["head"], init_lora_weights=False
        ),
    )
    model.set_adapter("second")
    model.double().eval()
    pcx.save(model, tmp_path / "m")
    x = dataset.tensors[0]
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model(x))
    plain = adapted(backbone, peft.LoraConfig(r=2, target_modules=["qkv"]))
    plain.add_adapter("second", peft.LoraConfig(r=3, target_modules=["fc1"]))
    plain.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="model: its adapters .* are active, expected one"):
        pcx.save(plain, tmp_path / "m")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a deprecated name
def test_a_model_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        num_labels=3,
    )
    backbone = transformers.ViTForImageClassification(config).eval()
    linear = [n for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)]
    lora = peft.LoraConfig(
        r=2,
        target_modules=[linear[0].rpartition(".")[2]],
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(copy.deepcopy(backbone), lora).eval()
    pcx.save(model, tmp_path / "m")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model(x).logits)


def test_saving_leaves_modes_as_they_are(backbone, tmp_path):
    model = adapted(backbone, LORA)
    model.train()
    model.base_model.model.norm.eval()
    pcx.save(model, tmp_path / "m")
    assert model.training
    assert not model.base_model.model.norm.training


def test_statistics_of_batchnorm_are_rolled_back_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model("resnet10t", num_classes=3).eval()
    config = peft.LoraConfig(r=2, target_modules=["conv2"], modules_to_save=["fc"])
    model = pcx.PeftModel(peft.get_peft_model(copy.deepcopy(backbone), config))
    x = torch.randn(8, 3, 32, 32) + 1
    loader = DataLoader(TensorDataset(x, torch.arange(8) % 3), batch_size=4)
    pcx.fit(model, loader, epochs=1, lr=0.01, warmup_epochs=0, progress=False)
    mean = model.plain_backbone().bn1.running_mean.clone()
    assert not torch.equal(mean, backbone.bn1.running_mean)
    with pytest.raises(pcx.NonFiniteLoss):
        pcx.fit(model, loader, epochs=1, lr=1e30, warmup_epochs=0, progress=False)
    assert torch.equal(model.plain_backbone().bn1.running_mean, mean)
    pcx.save(model, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model.eval()(x))
