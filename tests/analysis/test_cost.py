"""What models and prompts cost."""

import pytest
import timm
import torch
from families import FAMILIES, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pcx
from pcx.backbones.inputs import input_size

# Of the small ViT: tokens, width, classes, and the patch embedding of 16 patches.
N, D, CLASSES = 17, 48, 7
EMBEDDING = 16 * 3 * 16 * 16 * D
BLOCK = 12 * D * D * N + 2 * D * N * N
HEAD = D * CLASSES


def test_a_vit_is_the_sum_of_its_products():
    model = build("vit")
    assert pcx.multiply_adds(model) == EMBEDDING + 3 * BLOCK + HEAD
    assert pcx.multiply_adds(model, patch_embedding=False) == 3 * BLOCK + HEAD
    assert pcx.multiply_adds(model.bfloat16().train()) == EMBEDDING + 3 * BLOCK + HEAD
    assert model.training


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_whatever_computes_it(backend):
    model = build("vit")
    with sdpa_kernel(backend):
        assert pcx.multiply_adds(model) == EMBEDDING + 3 * BLOCK + HEAD


def test_folded_and_concatenated_prompts():
    m = 3
    model = pcx.VPT(build("vit"), m)
    prefix = m * 3 * D * D / 64  # once for a batch of 64
    folded = BLOCK + 2 * D * N * m + prefix
    # The head's token alone, but for every token's keys and values.
    last = (N + 1) * 3 * D * D + 9 * D * D + 2 * D * (N + m) + prefix
    assert pcx.multiply_adds(model) == EMBEDDING + 2 * folded + last + HEAD
    whole = pcx.VPT(build("vit"), m, read_only=False)
    assert pcx.multiply_adds(whole) == EMBEDDING + 3 * folded + HEAD
    model.path = "concat"
    concat = 12 * D * D * (N + m) + 2 * D * (N + m) ** 2
    assert pcx.multiply_adds(model) == EMBEDDING + 3 * concat + HEAD
    assert pcx.multiply_adds(model, patch_embedding=False) == 3 * concat + HEAD


@pytest.mark.parametrize("prompts", [0, 2])
def test_a_pruned_model_without_its_ranking_and_its_handle_untouched(prompts):
    model = pcx.VPT(build("vit"), prompts, read_only=False) if prompts else build("vit")
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    found = {}
    for ranking in ("pagerank", "cls"):
        pruning = pcx.zero_tprune(
            model, layers=(1, 2), keep=0.5, iters=5, similar=2, ranking=ranking
        )
        found[ranking] = pcx.multiply_adds(model)
        with pytest.raises(RuntimeError, match="no batch"):
            _ = pruning.kept
        logits = model(x)
        kept = pruning.kept
        assert pcx.multiply_adds(model) == found[ranking]
        assert all(torch.equal(a, b) for a, b in zip(pruning.kept, kept, strict=True))
        assert torch.equal(model(x), logits)
    blocks = [12 * D * D * n + 2 * D * n * (n + prompts) for n in (N, 1 + 7, 1 + 3)]
    prefixes = 3 * prompts * 3 * D * D / 64
    expected = EMBEDDING + sum(blocks) + prefixes + HEAD
    assert found == {"pagerank": expected, "cls": expected}


@pytest.mark.parametrize("family", [f for f in FAMILIES if "naflexvit" not in f])
def test_every_family_counts_as_it_does_on_a_cpu(family):
    model = build(family).requires_grad_(False)
    size = input_size(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(torch.zeros(64, *size, dtype=torch.float64))
    counted = flops.get_total_flops() / 2 / 64
    assert pcx.multiply_adds(model) == counted
    patch = model.patch_embed.patch_size[0]
    embedding = (size[1] // patch) ** 2 * 3 * patch**2 * D
    assert pcx.multiply_adds(model, patch_embedding=False) == counted - embedding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face_s_vit(attention):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(
        **sizes,
        intermediate_size=4 * D,
        image_size=64,
        num_labels=CLASSES,
        attn_implementation=attention,
    )
    model = transformers.ViTForImageClassification(config)
    assert pcx.multiply_adds(model) == EMBEDDING + 3 * BLOCK + HEAD
    assert pcx.multiply_adds(model, patch_embedding=False) == 3 * BLOCK + HEAD


def test_a_model_without_a_patch_embedding_cannot_leave_it_out():
    model = timm.create_model("resnet10t", num_classes=2)
    assert pcx.multiply_adds(model) > 0
    with pytest.raises(ValueError, match="patch_embedding: False, but ResNet computes 0 modules"):
        pcx.multiply_adds(model, patch_embedding=False)


def test_token_cost_does_not_depend_on_the_path_at_hand(backbone):
    model = pcx.VPT(backbone, 4)
    folded = pcx.token_cost(model)
    model.path = "concat"
    assert pcx.token_cost(model) == folded
    none = pcx.token_cost(pcx.VPT(backbone, 0))
    assert none["folded_flops"] == none["concat_flops"] == none["relative_tokens"] == 0
    assert folded["relative_tokens"] == 100 * 4 / 5  # 32x32 pixels, patches of 16, and [CLS]
    assert next(model.parameters()).device.type == "cpu"


def test_token_cost_of_all_image_tokens_alone(backbone):
    model = pcx.VPT(backbone, 4, read_only=False)
    expected = pcx.token_cost(model)
    pruning = pcx.zero_tprune(model, layers=(1,), keep=0.5, iters=1)
    with pytest.raises(ValueError, match="model: its image tokens, .* remove that first"):
        pcx.token_cost(model)
    pruning.remove()
    assert pcx.token_cost(model) == expected


def test_token_cost_is_the_papers_ratio_and_the_counted_operations():
    backbone = timm.create_model("vit_base_patch16_224", num_classes=10, depth=2)
    model = pcx.VPT(backbone, 100, read_only=False)
    cost = pcx.token_cost(model)
    assert cost["relative_tokens"] == pytest.approx(100 * 100 / 197)  # Sec. 6.3: 50.76%
    assert cost["worth_condensing"]
    assert not pcx.token_cost(model, threshold=51)["worth_condensing"]
    n, m, d, batch = 197, 100, 768, 64
    linear, attention = 24 * d * d, 4 * d
    plain = n * linear + attention * n * n
    concat = (n + m) * linear + attention * (n + m) ** 2
    folded = plain + attention * n * m + m * 6 * d * d / batch
    patches = 2 * 196 * 768 * 768 / 2  # the patch embedding, over two layers
    assert cost["concat_flops"] == pytest.approx(
        100 * (concat - plain) / (plain + patches), rel=0.02
    )
    assert cost["folded_flops"] == pytest.approx(
        100 * (folded - plain) / (plain + patches), rel=0.05
    )


def test_other_ways_to_fewer_tokens_without_their_choices():
    def block(n):
        return 12 * D * D * n + 2 * D * n * n

    model = build("vit")
    pcx.token_pruning.tome(model, r=3)
    expected = EMBEDDING + block(N) + block(N - 3) + block(N - 6) + HEAD
    assert pcx.multiply_adds(model) == expected
    pcx.token_pruning.ats(model, layers=(1,), tokens=5)
    assert pcx.multiply_adds(model) == EMBEDDING + block(N) + 2 * block(6) + HEAD
    pcx.token_pruning.soft_prune(model, layers=(1, 2), keep=0.5, iters=5)
    assert pcx.multiply_adds(model) == EMBEDDING + 3 * block(N) + HEAD
