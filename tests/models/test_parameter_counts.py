"""Trained parameters of a ViT-B/16 without its head, as the papers count them."""

import pytest
import timm

import pcx

METHODS = {
    "bias": (lambda b: pcx.Bias(b), 102_912),
    "partial-1": (lambda b: pcx.Partial(b, 1), 7_089_408),
    "partial-2": (lambda b: pcx.Partial(b, 2), 14_177_280),
    "partial-4": (lambda b: pcx.Partial(b, 4), 28_353_024),
    "adapter-8": (lambda b: pcx.Adapter(b, 8), 1_779_840),
    "adapter-64": (lambda b: pcx.Adapter(b, 64), 230_544),
    "adapter-256": (lambda b: pcx.Adapter(b, 256), 64_548),
    "sidetune": (lambda b: pcx.Sidetune(b, pretrained=False), 9_547_585),
    "vpt-shallow-50": (lambda b: pcx.VPT(b, 50, kind="shallow"), 38_400),
    "vpt-deep-50": (lambda b: pcx.VPT(b, 50), 460_800),
    "inter-50": (lambda b: pcx.VPT(b, 50, share="inter"), 38_400),
    "cls": (lambda b: pcx.VPT(b, 0, learn_cls=True), 768),
    "full": (lambda b: pcx.Full(b), 85_798_656),
    "linear": (lambda b: pcx.Linear(b), 0),
}


def tuned(model):
    return sum(p.numel() for p in model.trainable().values())


@pytest.fixture(scope="module")
def vit_b():
    return timm.create_model("vit_base_patch16_224", num_classes=0)


@pytest.mark.parametrize("name", METHODS)
def test_counts_of_the_papers(name, vit_b):
    make, expected = METHODS[name]
    assert tuned(make(vit_b)) == expected


def test_an_mlp_of_three_layers(vit_b):
    model = pcx.MLP(vit_b, 3, num_classes=100)
    assert tuned(model) - (768 * 100 + 100) == 1_184_256


def test_biases_of_swin_leave_tables_of_positions_out():
    swin = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
    assert tuned(pcx.Bias(swin)) == 137_216


def test_side_tuning_leaves_the_backbones_own_parts_of_a_head_alone():
    model = pcx.Sidetune(timm.create_model("convnext_atto"), pretrained=False, num_classes=5)
    of_head = {n for n in model.trainable() if "side_" not in n}
    assert not of_head
    assert {n for n in model.trainable() if "side_head" in n} == {
        "backbone.side_head.weight",
        "backbone.side_head.bias",
    }


def test_the_published_start_of_an_adapter_moves_ups_bias_alone(backbone, loader):
    model = pcx.Adapter(backbone, 4, init="published")
    before = {n: t.clone() for n, t in model.adapters.state_dict().items()}
    pcx.fit(model, loader, epochs=2, lr=0.05, progress=False)
    after = model.adapters.state_dict()
    moved = {n.partition(".")[2] for n in after if not (after[n] == before[n]).all()}
    assert moved == {"up.bias"}
