"""Deployment: constants in place of prompts, and several models in one batch."""

import pickle

import pytest
import torch
from families import FAMILIES, build, images

import pcx


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["vit", "deit-distilled", "eva02", "beit", "vit-18x2", "siglip"])
def test_a_frozen_model_computes_the_same(family):
    assert family in FAMILIES
    model, x = pcx.VPT(build(family), [4, 0, 2]), images(family)
    frozen = pcx.freeze(model)
    close(frozen(x), model.eval()(x))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not [name for name, _ in frozen.named_parameters() if "prompts" in name]
    close(pickle.loads(pickle.dumps(frozen))(x), frozen(x))


def test_kind_prefix_and_path_concat(backbone, dataset):
    x = dataset.tensors[0]
    for model in (pcx.VPT(backbone, 3, kind="prefix"), pcx.VPT(backbone, 3, path="concat")):
        close(pcx.freeze(model)(x), model.eval()(x))


def test_freezing_leaves_the_model_alone(backbone, dataset):
    model = pcx.VPT(backbone, 3, dropout=0.5).train()
    frozen, x = pcx.freeze(model), dataset.tensors[0]
    before = frozen(x)
    assert model.training
    assert model.counts == (3, 3)
    with torch.no_grad():
        model.prompts[0].add_(1)
    close(frozen(x), before)  # constants
    assert frozen.backbone.blocks[0].block.block.mlp.fc1.weight.data_ptr() == (
        backbone.blocks[0].mlp.fc1.weight.data_ptr()
    )


def test_a_frozen_teacher_stays_in_eval_mode(backbone, dataset):
    frozen, x = pcx.freeze(pcx.VPT(backbone, 3, dropout=0.5)), dataset.tensors[0]
    before, modes = frozen(x), [module.training for module in frozen.modules()]
    both = torch.nn.ModuleDict({"teacher": frozen, "student": torch.nn.Linear(2, 2)}).train()
    assert both.student.training
    assert [module.training for module in frozen.modules()] == modes
    assert torch.equal(frozen(x), before)


@pytest.mark.parametrize("family", ["vit", "eva02", "beit", "siglip"])
def test_weights_cast_once_give_the_bits_of_autocast(family):
    backbone, x = build(family).float(), images(family).float()
    model = pcx.VPT(backbone, [4, 0, 2])
    plain, cast = pcx.freeze(model), pcx.freeze(model, amp="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    found = cast(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found.float(), plain(x))  # the precision was another
    weights = [m.weight for m in cast.backbone.modules() if isinstance(m, torch.nn.Linear)]
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert backbone.blocks[0].mlp.fc2.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="amp: got 'fp8', expected one of"):
        pcx.freeze(model, amp="fp8")
    double, x = model.double(), x.double()  # left alone by autocast
    close(pcx.freeze(double, amp="bf16")(x), pcx.freeze(double)(x))


@pytest.mark.parametrize("family", ["vit", "deit-distilled", "vit-avg", "dinov3"])
def test_an_ensemble_is_its_members_side_by_side(family):
    backbone, x = build(family), images(family, batch=3)
    models = [pcx.VPT(backbone, counts) for counts in ([4, 0, 2], 3, [0, 0, 5])]
    joined = pcx.ensemble(models)
    expected = torch.stack([model.eval()(x) for model in models])
    close(joined(x), expected)
    assert expected.shape == (3, 3, 7)
    assert (expected[0] - expected[1]).norm() > 1e-3


def test_members_of_kind_prefix_and_of_equal_counts(backbone, dataset):
    models = [pcx.VPT(backbone, 3, kind="prefix") for _ in range(2)]
    x = dataset.tensors[0]
    close(pcx.ensemble(models)(x), torch.stack([model.eval()(x) for model in models]))
    assert pcx.ensemble(models).backbone.blocks[0].lengths is None


def test_what_cannot_be_frozen_or_joined_is_named(backbone):
    good = pcx.VPT(backbone, 3)
    with pytest.raises(ValueError, match=r"models\[1\]: the prompts of kind='shallow' do not fold"):
        pcx.ensemble([good, pcx.VPT(backbone, 3, kind="shallow")])
    with pytest.raises(ValueError, match="model: a Linear, expected a model of a method"):
        pcx.freeze(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="models: none given"):
        pcx.ensemble([])
    other = build("vit")
    with pytest.raises(ValueError, match=r"models\[1\]: its backbone's weights are not those"):
        pcx.ensemble([good, pcx.VPT(other, 3)])
    with pytest.raises(ValueError, match=r"models\[1\]: heads of"):
        pcx.ensemble([good, pcx.VPT(backbone, 3, num_classes=5)])
