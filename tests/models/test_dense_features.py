"""What does not go through the head sees all tokens: features, hooks, threads, other heads."""

import threading

import pytest
import torch
from families import build, images

import pcx
from pcx.models.vpt.block import PromptedBlock


@pytest.fixture
def vpt():
    return pcx.VPT(build("vit"), 3).eval()


@pytest.fixture
def x():
    return images("vit")


def whole(model):
    """The same model, which leaves no token out."""
    other = pcx.VPT(build("vit"), 3, read_only=False).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture
def left_out(monkeypatch):
    """Of each call of the last block, whether it left tokens out."""
    found, ask = [], PromptedBlock._leaves_out

    def spy(block, x):
        answer = ask(block, x)
        if block.last:
            found.append(answer)
        return answer

    monkeypatch.setattr(PromptedBlock, "_leaves_out", spy)
    return found


CALLS = {
    "forward_features": lambda m, x: m.forward_features(x),
    "forward_intermediates": lambda m, x: m.forward_intermediates(x)[1][-1],
    "get_intermediate_layers": lambda m, x: m.get_intermediate_layers(x, n=1, reshape=True)[0],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("of", [lambda m: m, pcx.freeze])
def test_features_of_the_backbone_have_all_tokens(vpt, x, name, of):
    expected = CALLS[name](whole(vpt).backbone, x)
    torch.testing.assert_close(CALLS[name](of(vpt).backbone, x), expected)


def test_the_head_alone_lets_tokens_be_left_out(vpt, x, left_out):
    torch.testing.assert_close(vpt(x), whole(vpt)(x))
    assert left_out == [True, False]
    torch.testing.assert_close(pcx.freeze(vpt)(x), whole(vpt)(x))
    assert left_out[2:] == [True, False]


@pytest.mark.parametrize("place", ["norm", "blocks", "blocks.2", "blocks.2.block.mlp"])
def test_hooks_see_all_tokens(vpt, x, place):
    seen = []
    expected = whole(vpt)
    for model in (vpt, expected):
        module = model.backbone.get_submodule(place)
        module.register_forward_hook(lambda m, given, out: seen.append(out))
        model(x)
    torch.testing.assert_close(*seen)


def test_another_pooling_is_noticed(vpt, x):
    expected = whole(vpt)
    for model in (vpt, expected):
        torch.manual_seed(0)
        model.backbone.reset_classifier(3, global_pool="avg")
        model.backbone.double()
    torch.testing.assert_close(vpt(x), expected(x))


def test_threads_do_not_see_each_other(vpt, x):
    expected = {name: CALLS["forward_features"](vpt.backbone, x) for name in "ab"}
    expected["logits"], wrong = vpt(x), []

    def features():
        for _ in range(20):
            wrong.append(not torch.equal(vpt.backbone.forward_features(x), expected["a"]))

    def logits():
        for _ in range(20):
            wrong.append(not torch.allclose(vpt(x), expected["logits"]))

    threads = [threading.Thread(target=work) for work in (features, logits) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80
    assert not any(wrong)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_computed_again_leave_out_the_same(vpt, x, reentrant):
    """As timm's checkpointing over blocks does, outside of which the head is read."""
    expected = torch.autograd.grad(vpt(x).square().sum(), list(vpt.prompts))
    checkpoint = torch.utils.checkpoint.checkpoint
    blocks = vpt.backbone.blocks

    def again(tokens):
        tokens.requires_grad_()
        return checkpoint(torch.nn.Sequential.forward, blocks, tokens, use_reentrant=reentrant)

    blocks.forward = again
    vpt(x).square().sum().backward()
    found = [prompts.grad for prompts in vpt.prompts]
    for gradient, same in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, same)


def test_compiled_and_exported_models_agree(vpt, x):
    expected = vpt(x)
    compiled = torch.compile(vpt, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    features = torch.compile(vpt.backbone.forward_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(features(x), vpt.backbone.forward_features(x))
    torch.testing.assert_close(torch.export.export(vpt, (x,)).module()(x), expected)
