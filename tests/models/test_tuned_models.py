"""What every tuned model promises, whatever its method."""

import copy
import pickle

import pytest
import timm
import torch
from families import FAMILIES, build, images, randomise
from torch import nn

import pcx
from pcx.models.base import TunedModel

METHODS = {
    "vpt": lambda backbone: pcx.VPT(backbone, 2),
    "sct": lambda backbone: pcx.SCT(backbone, None, k=5, selection="random"),
    "linear": pcx.Linear,
    "mlp": pcx.MLP,
    "partial": pcx.Partial,
    "bias": pcx.Bias,
    "adapter": lambda backbone: pcx.Adapter(backbone, 4),
    "sidetune": lambda backbone: pcx.Sidetune(backbone, pretrained=False),
    "border": lambda backbone: pcx.Border(backbone, 3, inside=True),
    "full": pcx.Full,
    "peft": lambda backbone: pcx.PeftModel(lora(backbone)),
}


def lora(backbone):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    return peft.get_peft_model(copy.deepcopy(backbone), config).double()


def test_every_method_is_tested_here():
    assert set(METHODS) == {name for name in pcx.METHODS if not name.startswith("test-")}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def trained(method, backbone, loader):
    torch.manual_seed(0)
    model = METHODS[method](backbone)
    rows = pcx.fit(model, loader, epochs=6, lr=0.02, clip_grad=1.0, progress=False)
    return model, rows


def test_training_saving_loading_and_freezing(method, backbone, loader, dataset, tmp_path):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    model, rows = trained(method, backbone, loader)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert model.record.trained_lr == 0.02
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the user's backbone was written"
    x = dataset.tensors[0]
    expected = model.eval()(x)
    pcx.save(model, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", backbone)
    assert type(loaded) is type(model)
    assert loaded.method == method
    assert torch.equal(loaded(x), expected)
    in_order = torch.utils.data.DataLoader(dataset, batch_size=4)
    assert pcx.evaluate(loaded, in_order) == pcx.evaluate(model, in_order)
    torch.testing.assert_close(pcx.freeze(model)(x), expected, rtol=1e-9, atol=1e-9)
    assert pcx.multiply_adds(model) > 0


def test_copies_share_frozen_memory_and_nothing_else(method, backbone, loader, dataset):
    model, _ = trained(method, backbone, loader)
    x, expected = dataset.tensors[0], model.eval()(dataset.tensors[0])
    pickled = pickle.loads(pickle.dumps(model))
    for other in (model.copy(), copy.deepcopy(model), pickled):
        assert torch.equal(other.eval()(x), expected)
    other, own = model.copy(), model.own_state()
    frozen = {p.data_ptr() for p in model.frozen_state().values()}
    assert frozen == {p.data_ptr() for p in other.frozen_state().values()}
    assert own
    with torch.no_grad():
        for tensor in other.own_state().values():
            if tensor.is_floating_point():
                tensor.add_(1)
    assert torch.equal(model(x), expected)


def test_another_backbone_is_refused_where_it_is_not_part_of_the_file(
    method, backbone, dataset, tmp_path
):
    model = METHODS[method](backbone).eval()
    pcx.save(model, tmp_path / "m")
    randomise(backbone, seed=1)
    if method == "full":
        x = dataset.tensors[0]
        assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model(x))
        return
    with pytest.raises(ValueError, match="backbone: .* was trained on"):
        pcx.load(tmp_path / "m", backbone)


def test_buffers_are_rolled_back_and_resumed(backbone, dataset, loader, tmp_path):
    """Of a head with BatchNorm, whose running mean no optimiser steps."""
    backbone.head = nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    model = pcx.Linear(backbone, head_init="keep")
    assert {"backbone.head.1.running_mean", "backbone.head.1.num_batches_tracked"} <= set(
        model.own_state()
    )
    pcx.fit(model, loader, epochs=1, lr=0.01, warmup_epochs=0, progress=False)
    before = {k: v.clone() for k, v in model.own_state().items()}
    with pytest.raises(pcx.NonFiniteLoss):
        pcx.fit(model, loader, epochs=1, lr=1e300, warmup_epochs=0, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.own_state().items())
    pcx.save(model, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", backbone)
    x = dataset.tensors[0]
    assert torch.equal(loaded(x), model.eval()(x))

    torch.manual_seed(0)
    start = copy.deepcopy(model)
    pcx.fit(model, loader, epochs=2, lr=0.01, progress=False, checkpoint_dir=tmp_path / "a")
    whole = copy.deepcopy(start)
    pcx.fit(whole, loader, epochs=2, lr=0.01, progress=False, checkpoint_dir=tmp_path / "b")
    resumed = copy.deepcopy(start)  # the file is there: nothing is left to train
    pcx.fit(
        resumed,
        loader,
        epochs=2,
        lr=0.01,
        progress=False,
        checkpoint_dir=tmp_path / "b",
        resume=True,
    )
    for name, tensor in whole.own_state().items():
        assert torch.equal(tensor, resumed.own_state()[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_image_tokens_are_those_of_the_plain_backbone(family):
    backbone, x = build(family), images(family)
    plain = backbone.forward_intermediates(x, intermediates_only=True)
    normed = backbone.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)
    for model in (pcx.Linear(backbone, head_init="keep"), pcx.VPT(backbone, 0, head_init="keep")):
        found = model.eval().features(x)
        assert len(found) == len(plain)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        (last,) = model.features(x, layers=[-1], norm=True)
        torch.testing.assert_close(last, normed[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_maps_never_contain_prompts(kind):
    backbone, x = build("vit"), images("vit")
    model = pcx.VPT(backbone, 5, kind=kind).eval()
    found = model.features(x)
    assert [tuple(f.shape) for f in found] == [(2, 48, 4, 4)] * 3
    seen = []
    hook = model.layers[1].register_forward_hook(lambda *call: seen.append(call[-1]))
    logits = model(x)
    hook.remove()
    tokens = seen[0][:, -16:].transpose(1, 2).unflatten(2, (4, 4))  # prompts stand before patches
    assert torch.equal(found[1], tokens)
    assert torch.equal(model(x), logits)  # and the shortcut of the last block is back
    pruned = pcx.VPT(backbone, 1)
    pcx.token_pruning.tome(pruned, r=1)
    with pytest.raises(ValueError, match="its tokens are dropped or merged"):
        pruned.features(x)


def test_maps_of_a_model_with_stages():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, num_classes=3, depths=(1, 1, 1, 1)
    ).eval()
    x = torch.randn(1, 3, 56, 56)
    found = pcx.Linear(swin).eval().features(x, layers=[0, -1])
    for a, b in zip(
        found, swin.forward_intermediates(x, [0, -1], intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_linear_probes_need_no_attention(dataset):
    model = pcx.Linear(timm.create_model("resnet10t", num_classes=3))
    assert model.spec.blocks == ()
    assert list(model.trainable()) == ["backbone.fc.weight", "backbone.fc.bias"]
    with pytest.raises(ValueError, match="ResNet is not supported: no block adds what"):
        pcx.VPT(timm.create_model("resnet10t", num_classes=3), 2)
    with pytest.raises(ValueError, match="backbone: Sequential is not supported: .*Give a timm"):
        pcx.Linear(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="backbone: already a Linear"):
        pcx.VPT(model, 2)


def test_a_backbone_that_is_wrapped_already_is_refused(backbone):
    vpt = pcx.VPT(backbone, 2)
    for held, what in ((vpt.backbone, "PromptedBlock"), (pcx.freeze(vpt).backbone, "PatchProduct")):
        for method in (pcx.Linear, pcx.Full):
            with pytest.raises(ValueError, match=f"backbone: it holds a {what} of another"):
                method(held)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_models_whose_pooling_is_a_module_are_saved(name, tmp_path):
    backbone = timm.create_model(name, num_classes=3).eval()
    model, x = pcx.Linear(backbone).eval(), torch.randn(2, 3, 64, 64)
    pcx.save(model, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model(x))


def test_inputs_of_the_backbone_pass_on():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        num_labels=3,
    )
    model = pcx.VPT(transformers.ViTForImageClassification(config), 2).eval()
    x = torch.randn(1, 3, 48, 48)
    logits = model(x, interpolate_pos_encoding=True)
    whole = model.backbone(x, interpolate_pos_encoding=True).logits  # computes all tokens
    torch.testing.assert_close(logits, whole)
    assert pcx.freeze(model)(x, interpolate_pos_encoding=True).shape == (1, 3)
    maps = model.features(x, layers=1, norm=True, interpolate_pos_encoding=True)
    body = model.backbone.vit(x, interpolate_pos_encoding=True).last_hidden_state
    expected = body[:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(maps[0], expected)


def test_timm_reads_a_tuned_model_as_its_backbone():
    model = pcx.VPT(timm.create_model("vit_base_patch16_clip_224", num_classes=3, depth=1), 1)
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == timm.data.resolve_model_data_config(model.backbone)["mean"]
    assert config["mean"] != timm.data.IMAGENET_DEFAULT_MEAN
    assert model.num_classes == 3
    assert "Normalize" in repr(model.transform())
    assert timm.data.resolve_model_data_config(pcx.freeze(model))["mean"] == config["mean"]


def test_a_method_of_ones_own(backbone, loader, tmp_path):
    class Bias(TunedModel):
        method = "test-bias"

        def __init__(self, backbone, *, num_classes=None, head_init="published"):
            super().__init__(backbone, num_classes=num_classes, head_init=head_init)
            self.own(keep=lambda name: name.endswith("bias"))

    pcx.METHODS.add("test-bias", Bias)
    model = Bias(backbone)
    pcx.fit(model, loader, epochs=1, lr=0.05, warmup_epochs=0, progress=False)
    pcx.save(model, tmp_path / "m")
    assert set(pcx.load(tmp_path / "m", backbone).own_state()) == {
        *(f"backbone.{n}" for n, _ in backbone.named_parameters() if n.endswith("bias")),
        "backbone.head.weight",
    }


def test_what_a_user_sets_to_be_trained_becomes_the_models_own(backbone, loader, dataset, tmp_path):
    """The LayerNorms beside the prompts: cloned before training, saved, and loaded."""
    pretrained, x = copy.deepcopy(backbone), dataset.tensors[0]
    model, other = pcx.VPT(backbone, 2), pcx.VPT(backbone, 2).eval()
    before = other(x)
    norms = [p for n, p in model.backbone.named_parameters() if "norm" in n]
    for parameter in norms:
        parameter.requires_grad_()
    pcx.fit(model, loader, epochs=1, lr=0.05, warmup_epochs=0, progress=False)
    assert {id(p) for p in norms} < {id(t) for t in model.own_state().values()}
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, pretrained.get_parameter(name)), name
    assert torch.equal(other(x), before)
    kept = model.copy()
    model.requires_grad_(False)  # what is the model's own stays so
    pcx.save(model, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", pretrained)
    assert set(loaded.own_state()) == set(model.own_state())
    assert torch.equal(loaded(x), model.eval()(x))
    assert torch.equal(kept.eval()(x), model(x))
    assert not torch.equal(loaded.backbone.norm.weight, pretrained.norm.weight)


def test_a_loop_of_ones_own_goes_on_after_saving(backbone, dataset, tmp_path):
    """Saving takes a trained norm out of shared memory, and the optimiser still holds it."""
    model, x = pcx.Linear(backbone), dataset.tensors[0]
    norm, before = model.backbone.norm.weight.requires_grad_(), backbone.norm.weight.clone()
    optimiser = torch.optim.SGD(model.param_groups(0.0), lr=0.1)
    model(x).square().mean().backward()
    optimiser.step()
    pcx.save(model, tmp_path / "m")
    model(x).square().mean().backward()
    optimiser.step()
    assert model.backbone.norm.weight is norm
    assert not torch.equal(norm, before)
    assert torch.equal(backbone.norm.weight, before)


def test_tied_heads_stay_tied(tmp_path):
    backbone = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=3)
    backbone.head_dist.weight = backbone.head.weight
    model = pcx.Linear(backbone, head_init="keep")
    assert model.backbone.head_dist.weight is model.backbone.head.weight
    assert model.backbone.head.weight is not backbone.head.weight
    pcx.save(model, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", backbone)
    assert loaded.backbone.head_dist.weight is loaded.backbone.head.weight


def test_frozen_buffers_are_part_of_the_backbone(tmp_path):
    backbone = timm.create_model("resnet10t", num_classes=3).eval()
    pcx.save(pcx.Linear(backbone), tmp_path / "m")
    pcx.load(tmp_path / "m", copy.deepcopy(backbone))
    backbone.bn1.running_mean += 1
    with pytest.raises(ValueError, match="backbone: .* with other buffers, such as the statistics"):
        pcx.load(tmp_path / "m", backbone)


def test_buffers_that_training_changes_are_the_models_own(tmp_path):
    class Moving(TunedModel):
        method = "test-moving"
        backbone_mode = "train"

    pcx.METHODS.add("test-moving", Moving)
    backbone = timm.create_model("resnet10t", num_classes=3).eval()
    model, x = Moving(backbone), torch.randn(4, 3, 32, 32)
    model.train()(x)
    pcx.save(model, tmp_path / "m")
    assert torch.equal(pcx.load(tmp_path / "m", backbone)(x), model.eval()(x))
    for name, buffer in backbone.named_buffers():
        assert buffer.abs().sum() == timm.create_model("resnet10t").get_buffer(name).abs().sum()


def test_an_ensemble_of_models_that_trained_the_backbone_is_refused(backbone):
    models = [pcx.VPT(backbone, 2) for _ in range(2)]
    for model in models:
        model.own("norm")
    pcx.ensemble(models)  # alike so far
    with torch.no_grad():
        models[1].backbone.norm.weight.add_(1)
    with pytest.raises(ValueError, match=r"models\[1\]: it trained 'backbone.norm.weight' of the"):
        pcx.ensemble(models)


def test_a_part_that_the_backbone_lacks_is_named(backbone):
    with pytest.raises(ValueError, match="part: the backbone has no tensor in 'nrom'"):
        pcx.Linear(backbone).own("nrom")
    model = pcx.Linear(backbone)
    model.own("pos_embed")
    assert "backbone.pos_embed" in model.trainable()
