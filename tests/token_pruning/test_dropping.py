"""Pruned models: what is computed, what is left, and what cannot be."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from families import build, images

import pcx
from pcx.backbones.attention import MissedCall
from pcx.token_pruning import TABLE_1, VARIANTS, stages

PRUNABLE = ["vit", "vit-avg", "vit-map", "vit-post-norm", "vit-qk-norm", "deit", "deit-distilled",
            "deit3", "dinov2-reg", "clip", "siglip"]  # fmt: skip
SETTING = {"layers": (1, 2), "keep": (0.8, 0.6), "iters": (5, 1), "similar": 2}


def pruned(model, **changes):
    has_cls = model.anatomy.has_cls if isinstance(model, pcx.VPT) else True
    return pcx.zero_tprune(model, **{**SETTING, "cls_boost": has_cls, **changes})


def test_a_vit_written_out():
    """Block by block with timm's own parts, tokens picked by the stages."""
    model, x = build("vit"), images("vit")
    tokens = model._pos_embed(model.patch_embed(x))
    for i, block in enumerate(model.blocks):
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        q, k, _ = qkv.unbind(0)
        tokens = block(tokens)
        if i < 2:
            left = tokens.shape[1] - 1 - 2
            keep = int(left * SETTING["keep"][i] + 0.5)
            stays = stages.prune(q, k, keep=keep, similar=2, iters=SETTING["iters"][i], protected=1)
            tokens = torch.stack([t[s] for t, s in zip(tokens, stays, strict=True)])
    expected = model.forward_head(model.norm(tokens))
    pruned(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("family", PRUNABLE)
def test_every_family(family):
    model, x = build(family), images(family)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    whole = model(x)
    pruning = pruned(model, cls_boost=model.cls_token is not None)
    found = model(x)
    assert found.shape == whole.shape
    assert not torch.allclose(found, whole)
    first, second = pruning.kept
    prefix = model.num_prefix_tokens
    patches = 16
    assert first.shape[1] == prefix + 11  # 80% of 14
    assert second.shape[1] == prefix + 5  # 60% of 9
    assert torch.equal(second[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(first, second, strict=True))
    assert int(first.max()) < prefix + patches
    assert list(model.state_dict()) == list(weights)
    pruning.remove()
    assert torch.equal(model(x), whole)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_nothing_dropped_is_the_model_itself():
    model, x = build("vit"), images("vit")
    whole = model(x)
    pcx.zero_tprune(model, layers=(1, 2, 3), keep=1.0, iters=5)
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("kind", ["deep", "prefix"])
def test_prompts_and_pruning_together(kind):
    model = pcx.VPT(build("vit"), (3, 0, 2), kind=kind, head_init="keep").eval()
    x = images("vit")
    whole = model(x)
    pruning = pruned(model)
    found = model(x)
    assert [k.shape[1] for k in pruning.kept] == [12, 6]
    assert not torch.allclose(found, whole)
    model.train()
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert all(p.grad.any() for p in model.prompts if p.numel())
    model.eval()
    pruning.remove()
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("method", ["taylor", "exact"])
def test_prompts_of_a_pruned_model_are_scored(method):
    """As by one sample's own gradient, or the prompt's removal, at the pruned model."""
    model = pcx.VPT(build("vit"), 2, head_init="keep").eval()
    x, labels = images("vit"), torch.tensor([1, 2])
    pruned(model)
    (found, *_) = pcx.score(model, [(x, labels)], method=method, progress=False)
    expected = torch.zeros(2, dtype=torch.float64)
    for image, label in zip(x.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(model(image), label)
        if method == "taylor":
            (g,) = torch.autograd.grad(loss, model.prompts[0])
            expected += (g * model.prompts[0].detach()).norm(dim=-1) / 2
        else:
            for i in range(2):
                less = model.keep([[1 - i], [0, 1], [0, 1]]).eval()
                expected[i] += (F.cross_entropy(less(image), label) - loss).abs().detach() / 2
    torch.testing.assert_close(found, expected)


def test_hugging_face_s_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=96, image_size=64, num_labels=5)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(2, 3, 64, 64)
    whole = model(x).logits
    pruning = pruned(model)
    assert not torch.allclose(model(x).logits, whole)
    assert [k.shape[1] for k in pruning.kept] == [12, 6]
    pruning.remove()
    assert torch.equal(model(x).logits, whole)


def test_a_pruned_model_freezes():
    model, x = pcx.VPT(build("vit"), 2, head_init="keep").eval(), images("vit")
    pruned(model)
    torch.testing.assert_close(pcx.freeze(model)(x), model(x))


@pytest.mark.filterwarnings("ignore")  # export's own
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict):
    model, x = build("vit", dtype=torch.float32), images("vit").float()
    pruned(model)
    expected = model(x)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert not any("pcx" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected)
    assert program.module()(torch.cat([x, x, x])).shape == (6, 7)
    copy.deepcopy(model)


def test_attention_that_is_written_out_is_an_error():
    model, x = build("vit"), images("vit")
    pruned(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(MissedCall, match="made no call"):
        model(x)


def test_more_similar_patches_where_the_partition_offers_them():
    model, x = build("vit"), images("vit")
    pruning = pruned(model, layers=(1,), keep=0.5, iters=1, similar=10, partition="none")
    model(x)
    assert pruning.kept[0].shape[1] == 1 + 3


def test_setting_it_up_anew_replaces_what_was():
    model, x = build("vit"), images("vit")
    before = pruned(model)
    pruned(model, layers=(2,), keep=0.5, iters=1)
    fresh = build("vit")
    pruned(fresh, layers=(2,), keep=0.5, iters=1)
    assert torch.equal(model(x), fresh(x))
    before.remove()  # which is not what is set up now
    assert torch.equal(model(x), fresh(x))
    with pytest.raises(ValueError, match="keep: 2.0"):
        pruned(model, keep=2.0)
    assert torch.equal(model(x), fresh(x))


def test_the_paper_s_arithmetic():
    """DeiT-S, multiply-adds without the patch embedding: 4.55 G, and 3.08 G for Table 1."""
    model = timm.create_model("deit_small_patch16_224").eval()
    whole = pcx.multiply_adds(model, patch_embedding=False)
    assert whole == pytest.approx(4.55e9, rel=0.02)
    pruning = pcx.zero_tprune(model, **TABLE_1)
    assert pcx.multiply_adds(model, patch_embedding=False) == pytest.approx(3.08e9, rel=0.02)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert [k.shape[1] for k in pruning.kept] == [187, 159, 119, 77, 67]
    for name, paper in {"a": 2.97e9, "b": 2.50e9, "c": 3.97e9}.items():  # Table 2
        pcx.zero_tprune(model, **VARIANTS[name])
        assert pcx.multiply_adds(model, patch_embedding=False) == pytest.approx(paper, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": (0.8, 0.0)}, "keep: 0.0, expected 0 < keep <= 1 after layer 2"),
        ({"keep": 1.5}, "keep: 1.5, expected .* after layer 1"),
        ({"keep": (0.5,)}, "keep: 1 values for 2 layers"),
        ({"iters": (1, 2, 3)}, "iters: 3 values for 2 layers"),
        ({"keep": 0.02}, "keep: 0.02 after layer 1 leaves none of 16 patches"),
        ({"keep": None}, "keep: None, expected .* after layer 1"),
        ({"layers": 3}, "layers: 3, expected a sequence"),
        ({"iters": 0}, "iters: 0, expected a whole number, 1 or more"),
        ({"similar": -1}, "similar: -1, expected a whole number"),
        ({"similar": 9}, "similar: 9 after layer 1, where 16 patches are left"),
        ({"layers": (2, 2)}, r"layers: \[2, 2\], expected ascending ones, none twice"),
        ({"layers": (2, 4)}, r"layers: \[2, 4\], expected 1 to 3 of 3"),
        ({"layers": (0, 1)}, "layers: 0, expected a whole number"),
        ({"layers": ()}, "layers: none"),
        ({"ranking": "best"}, "ranking: got 'best'"),
        ({"variances": (0.7, 0.01)}, r"variances: \(0.7, 0.01\), expected \(low, high\)"),
        ({"variances": (1,)}, r"variances: \(1,\)"),
        ({"partition": "odd"}, "partition: got 'odd'"),
        ({"measure": "l1"}, "measure: got 'l1'"),
    ],
)
def test_bad_settings_are_errors_before_anything_runs(changes, message):
    model, x = build("vit"), images("vit")
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        pcx.zero_tprune(model, **{**SETTING, **changes})
    assert torch.equal(model(x), expected)


def test_what_cannot_be_pruned_is_an_error():
    for family in ("eva02", "beit", "rope"):
        with pytest.raises(ValueError, match="turns or biases attention by the tokens' places"):
            pruned(build(family))
    with pytest.raises(ValueError, match="attends 2 times"):
        pruned(build("vit-18x2"))
    with pytest.raises(ValueError, match="cls_boost: the model has no"):
        pruned(build("siglip"))
    with pytest.raises(ValueError, match="no ranking 'cls'"):
        pcx.zero_tprune(build("siglip"), **SETTING, cls_boost=False, ranking="cls")
    with pytest.raises(ValueError, match="model: its path is 'concat'"):
        pruned(pcx.VPT(build("vit"), 2, path="concat"))
    with pytest.raises(ValueError, match=r"expected 1 to 2 of 3"):
        pruned(pcx.VPT(build("vit"), 2), layers=(1, 3))
    with pytest.raises(RuntimeError, match="kept: no batch"):
        _ = pruned(build("vit")).kept


def test_a_tower_is_pruned_anew_and_its_hooks_see_no_made_up_tokens():
    """Blocks of families that are not listed are run when a reduction is set up."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
        image_size=64, patch_size=16,
    )  # fmt: skip
    model = pcx.Linear(transformers.CLIPVisionModel(config).double(), num_classes=7).eval()
    x, seen = images("vit"), []
    whole = model(x)
    model.spec.blocks_in(model.backbone)[0].register_forward_hook(lambda *call: seen.append(1))
    merging = pcx.token_pruning.tome(model, r=2)
    model(x)
    first = pcx.zero_tprune(model, layers=(1, 2), keep=0.7, iters=3)
    once = model(x)
    kept = first.kept
    again = pcx.zero_tprune(model, layers=(1, 2), keep=0.7, iters=3)
    assert torch.equal(model(x), once)
    assert all(torch.equal(a, b) for a, b in zip(kept, again.kept, strict=True))
    assert len(seen) == 3
    again.remove()
    torch.testing.assert_close(model(x), whole)
    assert merging.r == (2, 2, 0)
