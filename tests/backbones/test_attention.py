"""The seam hands over every attention call or says that it cannot."""

import copy
import pickle
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from families import build, images
from torch import nn

import pcx
from pcx.backbones import attention
from pcx.backbones.path_finding import trial_of
from pcx.backbones.spec import find_spec


class TorchAttentionBlock(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x):
        return x + self.attn(x, x, x)[0]


class TwiceBlock(nn.Module):
    """Attention on the output of attention: the second keys depend on the image."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.attend(x + self.attend(x))


class MixingBlock(TwiceBlock):
    """Mixes neighbouring tokens beside its attention."""

    def forward(self, x):
        return self.attend(x) + x.roll(1, 1)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (TorchAttentionBlock(), "no call of F.scaled_dot_product_attention"),
        (TwiceBlock(), "follow one another"),
        (MixingBlock(), "mixes tokens outside"),
    ],
)
def test_probe_names_what_cannot_be_folded(block, reason):
    with pytest.raises(ValueError, match=reason):
        attention.probe(block.eval(), 8)


def test_unfused_attention_is_switched_on_for_us_and_left_alone_for_the_user():
    backbone, x = build("vit"), images("vit")
    for block in backbone.blocks:
        block.attn.fused_attn = False
    model = pcx.VPT(backbone, 5, head_init="keep")
    fused = pcx.VPT(build("vit"), 5, head_init="keep")
    fused.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), fused(x))
    assert not backbone.blocks[0].attn.fused_attn


def test_attention_switched_off_later_is_an_error_not_a_silent_loss():
    model = pcx.VPT(build("vit"), 5)
    model.layers[1].block.attn.fused_attn = False
    for path in ("folded", "concat"):
        model.path = path
        with pytest.raises(attention.MissedCall, match=r"made 0 calls .* where 1 were expected"):
            model(images("vit"))


def test_multihead_attention_is_refused():
    backbone = build("vit")
    backbone.blocks[0] = TorchAttentionBlock(48).double()
    with pytest.raises(ValueError, match="no call of F.scaled_dot_product_attention"):
        pcx.VPT(backbone, 2)


def test_arguments_that_prompts_cannot_honour_are_named(backbone):
    q = torch.randn(1, 2, 3, 4)
    nothing = attention.intercept(lambda n, call: call.q, [])
    with pytest.raises(ValueError, match="is_causal: a block's attention is causal"), nothing:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    for path in ("folded", "concat"):
        model = pcx.VPT(backbone, 2, path=path)
        for block in model.layers:  # as a user's own backbone.train() would set it
            block.block.attn.attn_drop.p = 0.1
            block.block.attn.train()
        with pytest.raises(ValueError, match="model: dropout of 0.1 in a block's attention"):
            model(torch.randn(2, 3, 32, 32).double())


def test_dropout_of_attention_passes_on():
    torch.manual_seed(0)
    q = torch.randn(1, 2, 30, 4)
    with attention.intercept(lambda n, call: call.output(), []):
        dropped = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    torch.manual_seed(0)
    q = torch.randn(1, 2, 30, 4)
    assert torch.equal(dropped, F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))


def test_grouped_keys_are_repeated():
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    seen = []
    with attention.intercept(lambda n, call: seen.append(call) or call.q, []):
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(seen[0].k, k.repeat_interleave(2, 1))


def test_nothing_is_left_behind():
    backbone, x = build("vit"), images("vit")
    before = F.scaled_dot_product_attention
    expected = backbone(x)
    model = pcx.VPT(backbone, 5)
    model(x).sum().backward()
    assert F.scaled_dot_product_attention is before
    assert type(backbone.blocks[0]) is timm.models.vision_transformer.Block
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vit", "vit-qk-norm", "beit"])
def test_a_routed_block_hands_over_the_same_call(family):
    """Without a mode, to the same bits, in copies too, and in each thread its own."""
    backbone = build(family)
    attention.fuse(backbone)
    spec = find_spec(backbone).blocks[0]
    block, x = backbone.blocks[0], torch.randn(2, 17, spec.dim, dtype=torch.float64)
    calls = {}

    def attend(way):
        return lambda n, call: calls.setdefault(way, call).output()

    with attention.intercept(attend("mode"), []):
        expected = block(x)
    assert attention.route(block, backbone.get_submodule(spec.attention), 1, *trial_of(spec, block))
    for way, used in (("routed", block), ("copy", copy.deepcopy(block))):
        found = attention.run(used, 1, attend(way), x)
        assert torch.equal(found, expected)
        assert torch.equal(calls[way].q, calls["mode"].q)
        assert calls[way].scale == calls["mode"].scale
    assert torch.equal(block(x), expected)  # where nothing is active it is what it was
    pickle.loads(pickle.dumps(block))
    other = threading.Thread(target=lambda: calls.update(other=block(x)))

    def starts_another(n, call):
        if not other.is_alive() and "other" not in calls:
            other.start()
            other.join()
        return call.q

    attention.run(block, 1, starts_another, x)
    assert torch.equal(calls["other"], expected)


def test_what_cannot_be_routed_is_left_as_it_is():
    backbone = build("vit")
    block = backbone.blocks[0]
    block.attn.fused_attn = False
    few = attention.made_up_tokens(block, 48)
    assert not attention.route(block, block.attn, 1, few, {})
    assert not attention.route(block, block.mlp, 1, few, {})
    assert "forward" not in vars(block.attn)
    attention.fuse(backbone)
    assert not attention.route(block, block.attn, 2, few, {})  # it makes one call
    assert "forward" not in vars(block.attn)
    with pytest.raises(attention.MissedCall, match="made 1 calls"):
        attention.run(block, 2, lambda n, call: call.output(), torch.zeros(1, 2, 48).double())
