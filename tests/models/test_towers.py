"""Vision towers of Hugging Face and open_clip, which come without a classifier."""

import pytest
import torch
from families import randomise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.backbones.inputs import data_config
from pcx.backbones.multihead import FusedSelfAttention
from pcx.backbones.spec import find_spec

transformers = pytest.importorskip("transformers")

SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def of_hugging_face(name, config, **more):
    def make():
        return getattr(transformers, name)(getattr(transformers, config)(**SIZE, **more))

    return make


def of_both(name, config):
    def make():
        configured = getattr(transformers, config)(vision_config=SIZE)
        return getattr(transformers, name)(configured)

    return make


def of_open_clip(**more):
    def make():
        transformer = pytest.importorskip("open_clip.transformer")
        tower = transformer.VisionTransformer(32, 8, 24, 2, 2, 2.0, output_dim=20, **more)
        tower.image_mean, tower.image_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)  # as its factory does
        return tower

    return make


# Each gives features of an image by the function beside it.
TOWERS = {
    "vit": (of_hugging_face("ViTModel", "ViTConfig"), "cls"),
    "deit": (of_hugging_face("DeiTModel", "DeiTConfig"), "cls"),
    "beit": (of_hugging_face("BeitModel", "BeitConfig"), "pooler_output"),
    "dinov2": (of_hugging_face("Dinov2Model", "Dinov2Config"), "pooler_output"),
    "dinov2-reg": (
        of_hugging_face("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
        "pooler_output",
    ),
    "dinov3": (
        of_hugging_face("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=3),
        "pooler_output",
    ),
    "clip": (of_hugging_face("CLIPVisionModel", "CLIPVisionConfig"), "pooler_output"),
    "clip-projected": (
        of_hugging_face("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
        "image_embeds",
    ),
    "siglip": (of_hugging_face("SiglipVisionModel", "SiglipVisionConfig"), "pooler_output"),
    "open-clip": (of_open_clip(), None),
    "open-clip-avg": (of_open_clip(pool_type="avg"), None),
    "open-clip-tokens": (of_open_clip(output_tokens=True), "first"),
    "open-clip-map": (of_open_clip(attentional_pool=True, attn_pooler_heads=2), None),
}
CLASSIFIERS = {
    "vit": of_hugging_face("ViTForImageClassification", "ViTConfig"),
    "clip": of_both("CLIPForImageClassification", "CLIPConfig"),
    "siglip": of_both("SiglipForImageClassification", "SiglipConfig"),
}


def built(make, dtype=torch.float64):
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    randomise(model)
    return model


def features_by(tower, read, x):
    """The features that a tower's users take."""
    output = tower(x)
    if read is None:
        return output
    if read == "first":
        return output[0]
    return output.last_hidden_state[:, 0] if read == "cls" else getattr(output, read)


@pytest.fixture
def x():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", TOWERS)
def test_folded_prompts_equal_the_literal_form(name, x):
    tower = built(TOWERS[name][0])
    model = pcx.VPT(tower, 4, num_classes=5)
    assert len(model.spec.blocks) == 2
    found = {}
    for path in ("folded", "concat"):
        model.path = path
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        found[path] = [logits.detach(), *(p.grad.clone() for p in model.prompts)]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    plain = model.heads[0](features_by(tower, TOWERS[name][1], x))
    assert (plain - found["folded"][0]).norm() > 1e-4 * plain.norm()  # the prompts do something


@pytest.mark.parametrize("name", TOWERS)
def test_a_head_reads_the_features_that_users_take(name, x):
    make, read = TOWERS[name]
    tower = built(make)
    before = [(n, type(m)) for n, m in tower.named_modules()]
    model = pcx.VPT(tower, 0, num_classes=5)
    wanted = features_by(tower, read, x)
    torch.testing.assert_close(model(x), model.heads[0](wanted), rtol=1e-9, atol=1e-9)
    assert model.num_classes == 5
    torch.testing.assert_close(pcx.Linear(tower)(x), wanted, rtol=1e-9, atol=1e-9)
    assert before == [(n, type(m)) for n, m in tower.named_modules()]  # the user's own stays


@pytest.mark.parametrize("name", ["vit", "dinov3", "clip", "open-clip"])
def test_only_the_read_token_is_computed_in_the_last_block(name, x, monkeypatch):
    monkeypatch.setattr("pcx.models.vpt.block.WORTH", {})
    model = pcx.VPT(built(TOWERS[name][0]), 4, num_classes=5)
    seen = []
    last = model.layers[-1]
    last.register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    every = model(x)  # a hook sees all tokens
    assert seen == [find_spec(model.backbone).prefix_tokens + 16]
    last._forward_hooks.clear()
    assert last.read_tokens == 1
    torch.testing.assert_close(model(x), every, rtol=1e-9, atol=1e-9)


def test_what_open_clip_says_of_images_is_known():
    config = data_config(pcx.Linear(built(TOWERS["open-clip"][0]), num_classes=2))
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert config["input_size"] == (3, 32, 32)


@pytest.mark.filterwarnings("ignore:model. mean and std of its images are taken to be 0.5")
@pytest.mark.parametrize("name", ["dinov3", "clip", "siglip", "open-clip"])
def test_a_tower_is_trained_condensed_frozen_and_saved(name, x, tmp_path):
    make = TOWERS[name][0]
    tower = built(make, torch.float32)
    loader = DataLoader(TensorDataset(x.float(), torch.tensor([0, 1, 2])), 3)
    model = pcx.VPT(tower, 4, num_classes=3)
    history = pcx.fit(model, loader, epochs=4, lr=0.05, clip_grad=1.0, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
    small = pcx.condense(model, loader, keep=0.5, epochs=0)
    wanted = small.eval()(x.float())
    pcx.save(small, tmp_path / "a.safetensors")
    loaded = pcx.load(tmp_path / "a.safetensors", built(make, torch.float32))
    assert torch.equal(loaded(x.float()), wanted)
    with torch.no_grad():
        torch.testing.assert_close(pcx.freeze(small)(x.float()), wanted, rtol=1e-4, atol=1e-4)
    features = model.features(x.float())
    assert [tuple(each.shape) for each in features] == [(3, 24, 4, 4)] * 2


def test_a_file_names_the_class_of_a_tower_and_builds_it(x, tmp_path):
    built(TOWERS["clip"][0], torch.float32).save_pretrained(tmp_path / "tower")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "tower")
    model = pcx.VPT(tower, 2, num_classes=3).eval()
    pcx.save(model, tmp_path / "a.safetensors")
    assert torch.equal(pcx.load(tmp_path / "a.safetensors")(x.float()), model(x.float()))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gets_a_new_head(name, x, tmp_path):
    backbone = built(CLASSIFIERS[name])
    model = pcx.VPT(backbone, 3, num_classes=7)
    assert model(x).shape == (3, 7)
    assert model.num_classes == 7
    assert backbone(x).logits.shape == (3, 2)  # the user's own stays
    assert backbone.config.num_labels == 2
    pcx.save(model, tmp_path / "a.safetensors")
    assert torch.equal(pcx.load(tmp_path / "a.safetensors", backbone)(x), model.eval()(x))
    without = pcx.VPT(backbone, 0, num_classes=0)
    torch.testing.assert_close(
        without(x) @ backbone.classifier.weight.T + backbone.classifier.bias, backbone(x).logits
    )


def test_what_is_no_tower_of_images_is_refused_by_name():
    with pytest.raises(ValueError, match="give its .vision_model"):
        pcx.VPT(of_both("CLIPModel", "CLIPConfig")(), 2)
    with pytest.raises(ValueError, match="leaves patches out at random"):
        pcx.VPT(of_hugging_face("ViTMAEModel", "ViTMAEConfig")(), 2)
    config = {k: v for k, v in SIZE.items() if k != "image_size"}
    siglip2 = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config))
    with pytest.raises(ValueError, match="gives no features of images"):
        pcx.VPT(siglip2, 2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_fused_multihead_attention_equals_torchs_own(batch_first, mask):
    torch.manual_seed(0)
    own = nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    fused = nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    fused.load_state_dict(own.state_dict())
    fused.__class__ = FusedSelfAttention
    tokens = torch.randn(4, 4, 12).double()
    masks = {"bool": torch.eye(4).bool(), "float": torch.randn(4, 4).double()}
    for weights in (False, True):
        given = {"need_weights": weights, "attn_mask": masks.get(mask)}
        for a, b in zip(
            own(tokens, tokens, tokens, **given),
            fused(tokens, tokens, tokens, **given),
            strict=True,
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
