"""What stands in for a block's forward."""

import copy

import pytest
import torch
from families import build, images, peaked
from torch import nn

import pcx
from pcx.backbones.attention import Call
from pcx.models.block_forward import StandIn
from pcx.ops.reference.attention import additive
from pcx.token_pruning import ats, soft_prune, tome
from pcx.token_pruning.handles import biased


@pytest.mark.parametrize("own", [None, "additive", "boolean"])
@pytest.mark.parametrize("given", ["additive", "boolean"])
def test_biases_add_up(own, given):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    biases = {
        None: torch.zeros(1, 1, 5, 5).double(),
        "additive": torch.randn(1, 3, 5, 5).double(),
        "boolean": torch.eye(5, dtype=torch.bool)[None, None] | (torch.rand(1, 1, 5, 5) > 0.3),
    }
    keys = {"additive": torch.randn(2, 1, 1, 5).double(), "boolean": torch.ones(2, 1, 1, 5) > 0}
    keys["boolean"][1, ..., 3:] = False
    call = biased(Call(q, k, v, own and biases[own], 0.3), keys[given])
    logits = q @ k.transpose(-2, -1) * 0.3
    for bias in (biases[own], keys[given]):
        logits = logits + additive(bias, torch.float64)
    expected = (logits.softmax(-1) @ v).nan_to_num()  # a row that attends to nothing
    torch.testing.assert_close(call.output().nan_to_num(), expected)


def test_blocks_that_give_tuples():
    """As Hugging Face's older layers do; what else is in them goes on as it is."""

    class Block(nn.Module):
        def forward(self, x):
            q = x[:, None]
            return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0], "more"

    class First(StandIn):
        def after(self, tokens, call, known):
            return tokens[:, :1]

    block, x = Block(), torch.randn(2, 5, 4)
    whole, _ = block(x)
    stand_in = First(block)
    found, more = block(x)
    assert torch.equal(found, whole[:, :1])
    assert more == "more"
    stand_in.remove()
    assert torch.equal(block(x)[0], whole)


def test_what_else_stands_in_is_an_error():
    model = pcx.VPT(build("vit"), 2, head_init="keep")
    model.layers[2].forward = lambda x: x
    with pytest.raises(ValueError, match="something else stands in for layer 3's forward"):
        ats(model, layers=(2,), tokens=4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("way", [tome, ats, soft_prune])
def test_hugging_face_s_checkpointing_is_an_error_where_attention_is_changed(way):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=96, image_size=64, num_labels=5)
    model = transformers.ViTForImageClassification(config).train()
    arguments = {
        tome: {"r": 2},
        ats: {"layers": (1,), "tokens": 9},
        soft_prune: {"layers": (1,), "keep": 0.5, "iters": 2},
    }[way]
    way(model, **arguments)
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="recomputes itself in the backward pass"):
        model(torch.randn(2, 3, 64, 64))
    model.eval()
    model(torch.randn(2, 3, 64, 64))


def without_training(way, model):
    arguments = {
        pcx.zero_tprune: {"layers": (1, 2), "keep": (0.8, 0.6), "iters": (5, 1), "similar": 2},
        tome: {"r": 4},
        ats: {"layers": (1, 2), "tokens": (12, 9)},
    }[way]
    return way(model, **arguments)


WAYS = pytest.mark.parametrize("way", [pcx.zero_tprune, tome, ats], ids=lambda way: way.__name__)


@WAYS
def test_a_copy_has_its_own(way):
    model, x = build("vit"), images("vit")
    set_up = without_training(way, model)
    other = copy.deepcopy(model)
    expected = model(x)
    set_up.remove()
    assert torch.equal(other(x), expected)
    assert not torch.equal(model(x), expected)


@WAYS
def test_half_precision(way):
    model, x = build("vit", dtype=torch.float32), images("vit").float()
    without_training(way, model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("prompts", [None, 2])
@WAYS
def test_compiles_into_one_graph(way, prompts):
    make = peaked if way is ats else build
    model, x = make("vit", dtype=torch.float32), images("vit").float()
    if prompts:
        model = pcx.VPT(model, prompts, head_init="keep").eval()
    without_training(way, model)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
