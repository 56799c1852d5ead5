"""Token reductions at their edges: modes, classes, dropout, later poolings, types of numbers."""

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import pcx
from pcx import token_pruning as tp

SET_UPS = {
    "tome": lambda model: tp.tome(model, r=2),
    "zero_tprune": lambda model: pcx.zero_tprune(model, layers=(1, 2), keep=0.8, iters=3),
    "ats": lambda model: tp.ats(model, layers=(1, 2), tokens=(12, 9)),
    "soft_prune": lambda model: tp.soft_prune(model, layers=(1, 2), keep=0.8, iters=3),
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(cls=timm.models.vision_transformer.VisionTransformer, **more):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return cls(**small, num_classes=4, **more)


class Mine(timm.models.vision_transformer.VisionTransformer):
    """A subclass of a user's own."""


@pytest.mark.parametrize("name", SET_UPS)
@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.5}, {"proj_drop_rate": 0.5}])
def test_a_model_in_training_mode_is_taken_and_stays_in_it(name, rates):
    model = vit(**rates)
    for seed in range(3):
        torch.manual_seed(seed)
        SET_UPS[name](model)
        assert model.training
    plain = vit(**rates).eval()
    SET_UPS[name](plain)
    torch.testing.assert_close(model.eval()(X), plain(X))


@pytest.mark.parametrize("name", SET_UPS)
def test_a_subclass_is_reduced_as_its_parent(name):
    found = []
    for model in (vit(Mine).eval(), vit().eval()):
        SET_UPS[name](model)
        found.append(model(X))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", SET_UPS)
def test_dropout_of_attention_works_in_training(name):
    model = vit(attn_drop_rate=0.3)
    SET_UPS[name](model)
    torch.manual_seed(1)
    first = model(X)
    first.sum().backward()
    assert not torch.equal(first, model(X))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def averaged(model):
    torch.manual_seed(1)
    model.reset_classifier(5, global_pool="avg")
    model.fc_norm = torch.nn.Identity()


def test_pooling_may_change_after_tome():
    first, later = vit().eval(), vit().eval()
    averaged(first)
    SET_UPS["tome"](first)
    SET_UPS["tome"](later)
    averaged(later)
    torch.testing.assert_close(later(X), first(X))


@pytest.mark.parametrize("name", ["ats", "soft_prune"])
def test_pooling_by_patches_is_refused_later_too(name):
    model = vit().eval()
    SET_UPS[name](model)
    averaged(model)
    with pytest.raises(RuntimeError, match="model: its pooling was changed to 'avg'"):
        model(X)


def test_numbers_of_numpy_are_numbers():
    plain, numpy = vit().eval(), vit().eval()
    tp.tome(plain, r=[3, 2, 1, 1])
    tp.tome(numpy, r=np.array([3, 2, 1, 1]))
    torch.testing.assert_close(numpy(X), plain(X))
    pcx.zero_tprune(plain, layers=(1, 2), keep=0.75, iters=3, similar=1)
    pcx.zero_tprune(
        numpy, layers=np.array([1, 2]), keep=np.float32(0.75), iters=np.int64(3), similar=np.int8(1)
    )
    torch.testing.assert_close(numpy(X), plain(X))
    assert pcx.VPT(vit(), np.array([1, 0, 2, 1])).counts == (1, 0, 2, 1)
    kept = pcx.select([torch.arange(4.0)], np.int64(2))
    assert kept[0].tolist() == [2, 3]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["tome", "zero_tprune", "ats"])
def test_tracing_runs_other_batches(name):
    model = vit().eval()
    SET_UPS[name](model)
    traced = torch.jit.trace(model, X, check_trace=False)
    other = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(traced(other), model(other))


def test_an_ensemble_of_models_that_are_reduced_otherwise_is_refused():
    a, b = (pcx.VPT(vit().eval(), 3).eval() for _ in range(2))
    SET_UPS["zero_tprune"](b)
    for order in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"models\[1\]: its tokens are reduced by"):
            pcx.ensemble(order)
    SET_UPS["zero_tprune"](a)
    together = pcx.ensemble([a, b])(X)
    for found, member in zip(together, (a, b), strict=True):
        torch.testing.assert_close(found, member(X))


def test_a_model_that_was_built_from_its_class_has_its_own_size():
    model = vit().eval()
    assert not hasattr(model, "pretrained_cfg")
    whole = pcx.multiply_adds(model)
    SET_UPS["zero_tprune"](model)
    assert 0.5 * whole < pcx.multiply_adds(model) < whole


def test_nan_in_one_sample_stays_there():
    for name, set_up in SET_UPS.items():
        model = vit().eval()
        set_up(model)
        expected, broken = model(X), X.clone()
        broken[0, 0, 3, 3] = torch.nan
        found = model(broken)
        torch.testing.assert_close(found[1], expected[1], msg=name)
        assert found[0].isnan().any(), name


@pytest.mark.parametrize("name", SET_UPS)
def test_maps_of_a_reduced_model_are_refused(name):
    model = vit().eval()
    expected = model.forward_intermediates(X, intermediates_only=True)
    handle = SET_UPS[name](model)
    copied = copy.deepcopy(model)
    for reduced in (model, copied):
        for maps in (reduced.forward_intermediates, reduced.get_intermediate_layers):
            with pytest.raises(ValueError, match=r"no maps to give.*remove\(\)"):
                maps(X)
    handle.remove()
    found = model.forward_intermediates(X, intermediates_only=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="no maps to give"):
        copied.forward_intermediates(X)


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that torchao follows it
        quantize = torch.ao.quantization.quantize_dynamic
        return quantize(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("name", ["tome", "zero_tprune", "ats"])
def test_a_reduced_model_is_quantised_and_a_quantised_one_refused(name):
    model = vit().eval()
    plain = quantised(vit().eval())(X)
    SET_UPS[name](model)
    expected, found = model(X), quantised(model)(X)
    assert (found - expected).norm() < 0.3 * (plain - expected).norm()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is a quantised Linear"):
        SET_UPS[name](quantised(vit().eval()))


@pytest.mark.parametrize("method", [pcx.Linear, pcx.Full, lambda model: pcx.VPT(model, 3)])
def test_methods_refuse_a_quantised_backbone_and_their_models_are_quantised(method):
    with pytest.raises(ValueError, match=r"backbone: .* quantised Linear.*pcx\.freeze"):
        method(quantised(vit().eval()))
    model = method(vit().eval()).eval()
    found = quantised(pcx.freeze(model).backbone)(X)
    assert (found - model(X)).abs().max() < 0.1 * model(X).abs().max()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ["tome", "ats"])
def test_checkpointing_that_loses_what_is_known_is_refused(name):
    model = vit().train()
    SET_UPS[name](model)

    def forward(reentrant):
        tokens = model._pos_embed(model.patch_embed(X.clone().requires_grad_()))
        for block in model.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=reentrant)
        return model.forward_head(model.norm(tokens))

    torch.testing.assert_close(forward(False), model(X))
    with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
        forward(True)
