"""Checkpoints of the VPT paper's own code, made here by the names of their tensors."""

import pytest
import timm
import torch
from families import randomise

from pcx.models.vpt.published import from_published

DIM, DEPTH, M, CLASSES = 24, 3, 5, 7


@pytest.fixture
def backbone():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=DEPTH, embed_dim=DIM, num_heads=2, num_classes=9
    ).double()
    randomise(model)
    return model.eval()


def state_of(*, deep=True, project=None, head=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = project or DIM
    state = {"enc.transformer.prompt_embeddings": draw(1, M, width)}
    if deep:
        state["enc.transformer.deep_prompt_embeddings"] = draw(DEPTH - 1, M, width)
    if project:
        state["enc.transformer.prompt_proj.weight"] = draw(DIM, project)
        state["enc.transformer.prompt_proj.bias"] = draw(DIM)
    if head:
        state["head.last_layer.weight"] = draw(CLASSES, DIM)
        state["head.last_layer.bias"] = draw(CLASSES)
    return state


def with_backbone(state, backbone):
    """The state with the backbone's tensors under their names."""
    own, to = backbone.state_dict(), "enc.transformer."
    state = dict(state)
    state[f"{to}embeddings.cls_token"] = own["cls_token"]
    state[f"{to}embeddings.position_embeddings"] = own["pos_embed"]
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            query, key, value = own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            layer = f"{to}encoder.layer.{i}"
            state |= {f"{layer}.attn.query.{kind}": query, f"{layer}.attn.key.{kind}": key}
            state |= {f"{layer}.attn.value.{kind}": value}
            state[f"{layer}.ffn.fc1.{kind}"] = own[f"blocks.{i}.mlp.fc1.{kind}"]
    return state


def literal(backbone, state, x):
    """Prompts among the tokens behind [CLS], new ones before each further layer where they are."""

    def projected(prompts):
        weight = state.get("enc.transformer.prompt_proj.weight")
        if weight is None:
            return prompts
        return prompts @ weight.T + state["enc.transformer.prompt_proj.bias"]

    deep = state.get("enc.transformer.deep_prompt_embeddings")
    tokens = backbone._pos_embed(backbone.patch_embed(x))
    for i, block in enumerate(backbone.blocks):
        if i == 0:
            prompts = projected(state["enc.transformer.prompt_embeddings"][0])
            tokens = torch.cat([tokens[:, :1], prompts.expand(len(x), -1, -1), tokens[:, 1:]], 1)
        elif deep is not None:
            prompts = projected(deep[i - 1]).expand(len(x), -1, -1)
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1 + M :]], 1)
        tokens = block(tokens)
    cls = backbone.norm(tokens)[:, 0]
    return cls @ state["head.last_layer.weight"].T + state["head.last_layer.bias"]


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("project", [None, 11])
def test_logits_are_those_of_the_literal_form(backbone, tmp_path, deep, project):
    state = state_of(deep=deep, project=project)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = literal(backbone, state, x)
    model = from_published(state, backbone)
    assert not model.training
    assert model.kind == ("deep" if deep else "shallow")
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    torch.save({"model": with_backbone(state, backbone), "epoch": 3}, tmp_path / "vpt.pth")
    again = from_published(tmp_path / "vpt.pth", backbone)
    torch.testing.assert_close(again(x), expected, rtol=1e-9, atol=1e-9)
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.testing.assert_close(from_published(prefixed, backbone)(x), expected)


def test_without_a_head_the_backbones_own_stays(backbone):
    model = from_published(state_of(head=False), backbone)
    assert model.num_classes == 9
    assert torch.equal(model.heads[0].weight, backbone.head.weight)


def test_what_does_not_fit_is_named(backbone, tmp_path):
    state = state_of()
    with pytest.raises(ValueError, match=r"state: it has no 'enc\.transformer\.prompt_embeddings'"):
        from_published(backbone.state_dict(), backbone)
    with pytest.raises(ValueError, match=r"head has hidden layers \(head\.projection\.0\.weight\)"):
        from_published({**state, "head.projection.0.weight": torch.zeros(2, 2)}, backbone)
    other = with_backbone(state, backbone)
    other["enc.transformer.encoder.layer.1.attn.key.weight"] = torch.zeros(DIM, DIM)
    with pytest.raises(ValueError, match=r"backbone: its blocks\.1\.attn\.qkv\.weight is not"):
        from_published(other, backbone)
    wide = timm.create_model("vit_tiny_patch16_224", depth=DEPTH, img_size=32)
    with pytest.raises(ValueError, match="prompts of width 24 for a backbone of 192"):
        from_published(state, wide)
    deeper = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
    with pytest.raises(ValueError, match="num_prompts: 3 counts for a backbone of 2 blocks"):
        from_published(state, deeper)
    with pytest.raises(FileNotFoundError, match="state: no file"):
        from_published(tmp_path / "none.pth", backbone)
    with pytest.raises(ValueError, match="has no blocks"):
        from_published(state, timm.create_model("resnet18"))
