"""What VPT promises beside its two equal forms."""

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import build, images
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pcx


def logits_and_grads(model, x, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(x)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.trainable().values())]


def assert_same(a, b, tolerance=1e-10):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def _memory(model):
    return model.layers[0].block.attn.qkv.weight.data_ptr()


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)


def test_only_prompts_and_head_train(backbone):
    model = pcx.VPT(backbone, [3, 2])
    assert set(model.trainable()) == {
        "prompts.0",
        "prompts.1",
        "backbone.head.weight",
        "backbone.head.bias",
    }
    assert model.counts == (3, 2)
    assert [tuple(p.shape) for p in model.prompts] == [(3, 24), (2, 24)]


def test_initialised_as_published():
    backbone = timm.create_model("vit_base_patch16_224", num_classes=100, depth=1)
    torch.manual_seed(0)
    model = pcx.VPT(backbone, 50, head_init="published")
    values = model.prompts[0].detach()
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    assert bound == 0.0625
    assert values.abs().max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    (head,) = model.heads
    assert torch.all(head.bias == -math.log(99))
    assert head.weight.detach().std() == pytest.approx(math.sqrt(2 / 100), rel=0.02)


@pytest.mark.parametrize("classes", [3, 100])
def test_the_first_loss_of_a_new_head_is_that_of_chance(classes):
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    torch.manual_seed(0)
    model = pcx.VPT(backbone, 50, num_classes=classes)
    (head,) = model.heads
    assert torch.all(head.bias == 0)
    assert head.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    labels = torch.arange(classes)
    loss = F.cross_entropy(model(torch.randn(classes, 3, 32, 32)), labels)
    assert loss.item() == pytest.approx(math.log(classes), rel=0.1)


def test_the_backbone_is_never_written(backbone, x):
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.train()
    model = pcx.VPT(backbone, 3)
    optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
    model(x).sum().backward()
    optimizer.step()
    assert backbone.training
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    shared = dict(backbone.named_parameters())["blocks.0.attn.qkv.weight"]
    assert any(p.data_ptr() == shared.data_ptr() for p in model.parameters())
    assert all(p.requires_grad for p in backbone.parameters())


def test_the_backbone_stays_in_eval_mode(backbone):
    model = pcx.VPT(backbone, 3).train()
    assert model.training
    assert model.heads[0].training
    assert not any(m.training for m in model.layers[0].block.modules()), (
        "a frozen block must not drop anything"
    )
    assert not model.eval().heads[0].training


def test_two_vpts_on_one_backbone(backbone, x):
    torch.manual_seed(0)
    one, two = pcx.VPT(backbone, 3), pcx.VPT(backbone, 2, kind="shallow")
    alone = one(x)
    two(x).sum().backward()
    assert torch.equal(one(x), alone)
    assert one.prompts[0].grad is None


@pytest.mark.parametrize("kind", ["deep", "shallow", "prefix"])
def test_copies_are_independent_and_equal(backbone, x, kind):
    model = pcx.VPT(backbone, 3, kind=kind)
    expected = logits_and_grads(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(logits_and_grads(other, x), expected, 0)
        with torch.no_grad():
            other.prompts[0].add_(1)
        assert not torch.equal(other(x), expected[0])
    assert torch.equal(model(x), expected[0])


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_prompt_dropout_is_the_same_in_both_forms(backbone, x, groups):
    model = pcx.VPT(backbone, 3, dropout=0.5, dropout_groups=groups, read_only=False).train()
    folded = logits_and_grads(model, x)
    assert_same(logits_and_grads(model, x), folded, 0)
    assert not torch.equal(logits_and_grads(model, x, seed=1)[0], folded[0])
    model.path = "concat"
    assert_same(logits_and_grads(model, x), folded)
    assert torch.equal(model.eval()(x), model(x))


def test_each_sample_or_group_draws_its_own_mask(backbone, x):
    same = x[:1].expand(4, -1, -1, -1)
    model = pcx.VPT(backbone, 3, dropout=0.5).train()
    assert len({tuple(row.tolist()) for row in model(same)}) == 4
    model = pcx.VPT(backbone, 3, dropout=0.5, dropout_groups=2).train()
    rows = model(same)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    assert not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("kind", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("how", ["vpt", "timm"])
def test_activation_checkpointing(backbone, x, kind, how):
    model = pcx.VPT(backbone, 3, kind=kind, dropout=0.3).train()
    expected = logits_and_grads(model, x)
    if how == "vpt":
        model.set_grad_checkpointing()
    else:
        model.backbone.set_grad_checkpointing()
    assert_same(logits_and_grads(model, x), expected)


@pytest.mark.parametrize("family", ["vit", "beit", "eva02", "vit-18x2"])
@pytest.mark.parametrize("path", ["folded", "concat"])
def test_compiles_into_one_graph(family, path):
    model, x = pcx.VPT(build(family), 5, path=path), images(family)
    expected = logits_and_grads(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    logits = compiled(x)
    logits.square().sum().backward()
    assert_same([logits, *(p.grad for p in model.trainable().values())], expected)


@pytest.mark.parametrize("family", ["vit", "vit-qk-norm", "beit", "eva02"])
@pytest.mark.parametrize("kind", ["deep", "prefix"])
def test_autocast(family, kind):
    model, x = pcx.VPT(build(family, dtype=torch.float32), 5, kind=kind), images(family).float()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert torch.isfinite(found).all()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_features_without_a_head(backbone, x):
    model = pcx.VPT(backbone, 3, num_classes=0)
    assert model(x).shape == (4, 24)
    assert set(model.trainable()) == {"prompts.0", "prompts.1"}


def test_a_new_head(backbone, x):
    assert pcx.VPT(backbone, 3, num_classes=11)(x).shape == (4, 11)
    assert backbone(x).shape == (4, 3)


def test_a_head_of_several_modules_trains(backbone, x):
    backbone.head = nn.Sequential(nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="head_init: the backbone's head is Sequential"):
        pcx.VPT(backbone, 2)
    model = pcx.VPT(backbone, 2, head_init="keep")
    model(x).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {"backbone.head.0.weight", "backbone.head.2.bias"} < trained == set(model.trainable())
    assert backbone.head[0].weight.grad is None


def test_converting_one_leaves_the_others(x):
    backbone = build("eva02")
    one, two = pcx.VPT(backbone, 2), pcx.VPT(backbone, 2)
    expected, image = two(images("eva02")), images("eva02")
    small = one.keep([[0], [], [0, 1]])
    one.bfloat16()
    assert torch.equal(two(image), expected)
    assert small(image).dtype == backbone(image).dtype == torch.float64
    assert one(image.bfloat16()).dtype == torch.bfloat16


def test_keep_names_what_it_cannot_keep(backbone):
    model = pcx.VPT(backbone, 2)
    with pytest.raises(ValueError, match="kept: layer 1: 2, expected a whole number, 0 to 1"):
        model.keep([[0], [2]])
    with pytest.raises(ValueError, match="kept: 1 layers, expected 2"):
        model.keep([[0]])


def test_keep_drops_prompts_and_shares_the_backbone(backbone, x):
    model = pcx.VPT(backbone, 3)
    small = model.keep([torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64)])
    assert small.counts == (2, 0)
    assert torch.equal(small.prompts[0], model.prompts[0][[0, 2]])
    assert _memory(small) == _memory(model)
    small(x).sum().backward()
    assert model.prompts[0].grad is None
    small.path = "concat"
    folded = model.keep([torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64)])
    torch.testing.assert_close(small(x), folded(x))


def test_distributed_with_a_layer_of_no_prompts(backbone, x, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = pcx.VPT(backbone, [3, 0])
        parallel = DistributedDataParallel(model)
        for _ in range(2):  # the second step fails where a parameter got no gradient
            parallel(x).sum().backward()
        assert model.prompts[0].grad.norm() > 0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompts": -1}, "num_prompts: -1, expected a whole number, 0 to"),
        ({"num_prompts": 2.5}, "num_prompts: 2.5, expected a whole number"),
        ({"num_prompts": [2.0, 1]}, "num_prompts: .* expected a whole number"),
        ({"num_prompts": [1]}, "num_prompts: 1 counts for a backbone of 2 blocks"),
        ({"num_prompts": 1, "kind": "wide"}, "kind: got 'wide'"),
        ({"num_prompts": 1, "dropout": 1.0}, "dropout: 1.0"),
        ({"num_prompts": 1, "dropout_groups": 0}, "dropout_groups: 0"),
        ({"num_prompts": 1, "head_init": "zero"}, "head_init: got 'zero'"),
        ({"num_prompts": 1, "path": "fast"}, "path: got 'fast'"),
        ({"num_prompts": 1, "path": "folded", "kind": "shallow"}, "travel on"),
        ({"num_prompts": 1, "path": "concat", "kind": "prefix"}, "no tokens"),
        ({"num_prompts": [1, 1], "kind": "shallow"}, "layer 0 only"),
    ],
)
def test_bad_arguments_are_named(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        pcx.VPT(backbone, **arguments)


def test_a_vpt_is_no_backbone(backbone):
    with pytest.raises(ValueError, match="already a VPT"):
        pcx.VPT(pcx.VPT(backbone, 1), 1)


def test_dropout_in_the_backbone_does_not_act(x):
    backbone = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=2,
        embed_dim=24,
        num_heads=2,
        drop_path_rate=0.5,
        attn_drop_rate=0.5,
        num_classes=3,
    ).double()
    model = pcx.VPT(backbone.train(), 3).train()
    assert torch.equal(model(x), model(x))
    assert isinstance(model.heads[0], nn.Linear)


def test_tokens_are_left_out_where_that_saves_time(backbone, x, monkeypatch):
    model = pcx.VPT(backbone, 3).eval()
    seen = []
    follow = model.backbone.norm.forward
    monkeypatch.setattr(
        model.backbone.norm, "forward", lambda x: seen.append(len(x[0])) or follow(x)
    )
    expected = model(x)
    saved = 9 * 24**2 * 4 * len(x)  # multiply-adds of four tokens but [CLS]
    for worth in (saved, saved + 1):
        monkeypatch.setattr("pcx.models.vpt.block.WORTH", {"cpu": worth})
        torch.testing.assert_close(model(x), expected)
    assert seen == [1, 1, 5]


@pytest.mark.parametrize("counts", [3, (3, 0)])
def test_few_tokens_take_the_prompts_among_them(backbone, x, monkeypatch, counts):
    model = pcx.VPT(backbone, counts).eval()
    seen = concatenated(model.layers[0], monkeypatch)
    with torch.no_grad():
        expected = model(x)
        added = 12 * 24**2 * 3 * len(x)  # multiply-adds of three prompts in one block
        added += 30 * x.shape[0] * 5 * 24  # and what copying five tokens takes
        for among in (added - 1, added):
            assert not seen
            monkeypatch.setattr("pcx.models.vpt.block.AMONG", {("cpu", False): among})
            torch.testing.assert_close(model(x), expected)
        assert seen.pop() == (len(x), 5, 24)
        sizes = []
        block = model.layers[0].block
        for part in (block, block.mlp):
            hook = part.register_forward_hook(lambda m, args, out: sizes.append(out.shape[1]))
            model(x)  # a user's hook sees the block's own tokens, whatever the batch
            hook.remove()
    model(x)  # with gradients the rule is another
    assert sizes == [5, 5]
    assert not seen


SMALL = {("cpu", False): 1e12, ("cpu", True): 1e12}


def test_small_steps_take_the_prompts_among_the_tokens(backbone, x, monkeypatch):
    """Gradients are those of the folded form, with the same prompts dropped."""
    model = pcx.VPT(backbone, 3, dropout=0.3).train()
    seen, found = concatenated(model.layers[0], monkeypatch), []
    for among in ({}, {("cpu", False): 1e12}, {("cpu", True): 1e12}):
        monkeypatch.setattr("pcx.models.vpt.block.AMONG", among)
        torch.manual_seed(0)
        assert not seen
        loss = model(x).square().sum()
        found.append(
            (loss, *torch.autograd.grad(loss, [*model.prompts, *model.heads[0].parameters()]))
        )
    assert seen == [(len(x), 5, 24)]
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, expected)


def test_gradients_that_a_hook_sees_are_those_of_the_tokens(backbone, x, monkeypatch):
    model, sizes = pcx.VPT(backbone, 3), []
    monkeypatch.setattr("pcx.models.vpt.block.AMONG", SMALL)
    mlp = model.layers[0].block.mlp
    mlp.register_full_backward_hook(lambda m, into, out: sizes.append(out[0].shape[1]))
    model(x).sum().backward()
    assert sizes == [5]


def test_a_hook_of_a_small_layer_sees_rows_in_one_piece(backbone, x, monkeypatch):
    model, seen = pcx.VPT(backbone, 3).eval(), []
    monkeypatch.setattr("pcx.models.vpt.block.AMONG", SMALL)
    model.layers[0].register_forward_hook(lambda m, args, out: seen.append(out.view(-1, 24)))
    with torch.no_grad():
        model(x)
    assert seen[0].shape == (5 * len(x), 24)


def test_small_batches_leave_tokens_out_of_the_last_block(backbone, x, monkeypatch):
    model = pcx.VPT(backbone, 3).eval()
    monkeypatch.setattr("pcx.models.vpt.block.AMONG", SMALL)
    first, last = (concatenated(layer, monkeypatch) for layer in model.layers)
    model(x)
    assert first
    assert not last


def concatenated(layer, monkeypatch):
    """The shapes of tokens that a layer computes with prompts among them."""
    seen, form = [], layer._concat
    monkeypatch.setattr(
        layer, "_concat", lambda at, x: (seen.append(tuple(x.shape)), form(at, x))[1]
    )
    return seen


def test_blocks_that_count_tokens_keep_prompts_apart(monkeypatch):
    """Threads may share such a model: nothing in it changes from call to call."""
    model, x = pcx.VPT(build("dinov3"), 3).eval(), images("dinov3")
    monkeypatch.setattr("pcx.models.vpt.block.AMONG", {("cpu", False): 1e12})
    seen = concatenated(model.layers[0], monkeypatch)
    with torch.no_grad():
        model(x)
    assert not seen


@pytest.mark.parametrize("kind", ["deep", "shallow", "prefix"])
def test_tokens_of_a_model_without_cls_lie_row_by_row(kind):
    plain = build("siglip")
    seen = []
    for block in plain.blocks:
        block.norm1.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = images("siglip")
    plain(x)
    assert not any(tokens.is_contiguous() for tokens in seen)  # timm's own
    model = pcx.VPT(plain, 4, kind=kind)
    seen.clear()
    model(x)
    whole = [tokens for tokens in seen if tokens.shape[0] == len(x)]  # and not the prompts alone
    assert len(whole) >= len(plain.blocks)
    assert all(tokens.is_contiguous() for tokens in whole)
