"""One probing forward finds blocks and their parts in every family, without class names."""

import pytest
import timm
import torch
from families import FAMILIES, build
from torch import nn

import pcx
from pcx.backbones.inputs import input_size
from pcx.backbones.probing import probe_listed
from pcx.backbones.spec import find_spec, library_facts

READERS = {"vit-post-norm": "mlp", "vit-18x2": "ffns.0", "vit-xp": None}
MLPS = {"vit-18x2": "ffns.0", "vit-xp": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(family):
    backbone = build(family)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    spec = find_spec(backbone)
    assert [block.name for block in spec.blocks] == [f"blocks.{i}" for i in range(3)]
    assert spec.no_blocks is None
    for i, block in enumerate(spec.blocks):
        assert (block.dim, block.heads, block.head_dim, block.value_dim) == (48, 3, 16, 16)
        assert (block.layout, block.call_form, block.windows) == ("BNC", "BHND", 1)
        assert block.calls == (2 if family == "vit-18x2" else 1)
        for found, expected in (
            (block.reader, READERS.get(family, "norm2")),
            (block.mlp, MLPS.get(family, "mlp")),
        ):
            assert found == (None if expected is None else f"blocks.{i}.{expected}")
        assert not block.returns_tuple
    normed = [block.before for block in spec.blocks]
    if family in ("vit-post-norm", "vit-xp"):
        assert normed == [None] * 3
    elif family != "vit-18x2":
        assert normed == [f"blocks.{i}.norm1" for i in range(3)]
    assert spec.norm in ("norm", "fc_norm")
    rotated = spec.blocks[0].arguments
    assert ("rope" in rotated) == (family in ("eva02", "dinov3", "rope"))
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_blocks_with_stages_and_windows():
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 2, 1, 1))
    blocks = find_spec(swin).blocks
    assert [b.name for b in blocks] == [
        "layers.0.blocks.0",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
        "layers.2.blocks.0",
        "layers.3.blocks.0",
    ]
    assert [b.stage for b in blocks] == [0, 1, 1, 2, 3]
    assert [b.dim for b in blocks] == [96, 192, 192, 384, 768]
    assert [b.windows for b in blocks] == [64, 16, 16, 4, 1]
    assert {b.layout for b in blocks} == {"BHWC"}
    assert blocks[1].reader == "layers.1.blocks.0.norm2"
    assert blocks[1].mlp == "layers.1.blocks.0.mlp"
    sam = timm.create_model("samvit_base_patch16", depth=1, img_size=224)
    (block,) = find_spec(sam).blocks
    assert (block.call_form, block.heads, block.head_dim) == ("(BH)ND", 12, 64)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"])
def test_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, num_labels=3
    )
    backbone = getattr(transformers, f"{name}ForImageClassification")(config)
    spec = find_spec(backbone)
    assert len(spec.blocks) == 2
    assert spec.has_cls
    assert spec.prefix_tokens == {"DeiT": 2, "Dinov2WithRegisters": 5}.get(name, 1)
    for block in spec.blocks:
        kind = type(backbone.get_submodule(block.reader))
        assert kind is nn.LayerNorm
        assert block.mlp.endswith(".mlp")
    assert isinstance(backbone.get_submodule(spec.norm), nn.LayerNorm)


def test_a_model_whose_forward_fails_without_values_is_probed_block_by_block():
    class Positive(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    backbone = build("vit")
    backbone.norm_pre = Positive()
    spec = find_spec(backbone)
    assert [block.name for block in spec.blocks] == [f"blocks.{i}" for i in range(3)]
    assert spec.blocks == probe_listed(build("vit"), spec.listed, 48)[0]


def test_hooks_of_the_user_do_not_see_the_probe():
    backbone, seen = build("vit"), []
    backbone.patch_embed.register_forward_hook(lambda m, x, y: seen.append(y.mean().item()))
    backbone.blocks[0].attn.register_forward_pre_hook(lambda m, x: seen.append(x))
    assert find_spec(backbone) == find_spec(build("vit"))
    model = pcx.VPT(backbone, 2)
    assert seen == []
    model(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert seen  # the hooks are back


def test_a_wrapped_backbone_is_named():
    backbone = build("vit")
    averaged = torch.optim.swa_utils.AveragedModel(backbone)
    for wrapped in (torch.compile(backbone), nn.DataParallel(backbone), averaged):
        with pytest.raises(ValueError, match="backbone: .* wraps the backbone; give the backbone"):
            find_spec(wrapped)
        with pytest.raises(ValueError, match="backbone: .* wraps the backbone; give the backbone"):
            pcx.Linear(wrapped, num_classes=3)


def test_the_patch_embedding_says_how_many_channels_an_image_has():
    backbone = timm.create_model("xcit_nano_12_p16_224", in_chans=4, num_classes=2)
    assert input_size(backbone) == (4, 224, 224)
    assert input_size(timm.create_model("tresnet_m")) == (3, 224, 224)  # its stem rearranges pixels


def test_a_model_that_is_not_of_a_library_is_named():
    with pytest.raises(ValueError, match=r"backbone: Linear is not supported: .*Give a timm model"):
        find_spec(nn.Linear(2, 2))
    spec = find_spec(timm.create_model("resnet10t"))
    assert spec.blocks == ()
    assert "no block adds what F.scaled_dot_product_attention gives" in spec.no_blocks


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "samvit_base_patch16", "convnext_atto", "levit_128s"]
)
def test_a_model_of_timm_without_classes_has_no_head(name):
    found = library_facts(timm.create_model(name, num_classes=0))
    assert found["heads"] == ()
    assert library_facts(timm.create_model(name, num_classes=3))["heads"]


def test_a_model_for_another_image_size_says_how_its_size_is_told():
    model = timm.create_model("coatnet_nano_rw_224", img_size=64)
    assert "pretrained_cfg_overlay={'input_size': (3, H, W)}" in str(find_spec(model).no_blocks)
    with pytest.raises(ValueError, match=r"\[224, 224\] pixels .* give timm\.create_model"):
        pcx.VPT(model, 2)


def test_what_a_forward_left_in_a_cache_is_not_copied():
    model = timm.create_model("tiny_vit_5m_224").eval()
    model(torch.randn(1, 3, 224, 224))  # with gradients
    caches = [vars(m).get("attention_bias_cache") for m in model.modules()]
    assert any(caches)
    copied = pcx.Linear(model).eval()
    assert not any(vars(m).get("attention_bias_cache") for m in copied.modules())
    assert [vars(m).get("attention_bias_cache") for m in model.modules()] == caches
