"""Reads checkpoints of the VPT paper's own code, by the names of their tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones.weights_file import read_weights
from pcx.models.vpt.model import VPT

PLACES = ("", "module.", "model.")  # what may stand before the names
ENCODER = "enc.transformer."
SHALLOW, DEEP = f"{ENCODER}prompt_embeddings", f"{ENCODER}deep_prompt_embeddings"
PROJECTION = f"{ENCODER}prompt_proj"
HEAD = "head.last_layer"
# Of their backbone's tensors, the names in timm's; query, key and value are one tensor there.
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "encoder.encoder_norm.weight": "norm.weight",
    "encoder.encoder_norm.bias": "norm.bias",
}
_INSIDE = {
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    "attn.out": "attn.proj",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
}
CLOSE = 1e-5  # difference between the file's backbone and the given one, in parts of a weight


@torch.no_grad()
def from_published(state: Mapping[str, Any] | str | os.PathLike, backbone: nn.Module) -> VPT:
    """A VPT with the prompts and the head of a checkpoint of the VPT paper's own code.

    A projection of the prompts is applied to them, since it does not depend on the image. Where the
    checkpoint holds the backbone too, it is compared with the given one.

    Args:
        state: the state dict of their model, or a file that holds it, which is read as data alone.
        backbone: timm's model of the same weights, such as vit_base_patch16_224.augreg_in21k.

    Returns:
        The VPT, in eval mode: kind "deep" where the checkpoint has deep prompts, else "shallow".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no prompts, a head of several layers, or another backbone.

    Example:
        >>> model = from_published("cub.pth", timm.create_model(name, pretrained=True))
    """
    if isinstance(state, str | os.PathLike):
        if not Path(state).is_file():
            raise FileNotFoundError(f"state: no file {state}")
        state = read_weights(Path(state))
    tensors = _named(state)
    _check_backbone(tensors, backbone)
    prompts = _prompts(tensors)
    weight = _head(tensors)
    model = VPT(
        backbone,
        [len(p) for p in prompts] + [0] * (_depth(backbone) - len(prompts)),
        kind="deep" if DEEP in tensors else "shallow",
        num_classes=None if weight is None else len(weight),
        head_init="keep",
    )
    for own, given in zip(model.prompts, prompts, strict=False):
        if own.shape != given.shape:
            raise ValueError(
                f"state: prompts of width {given.shape[-1]} for a backbone of {own.shape[-1]}; "
                "give the backbone that it was trained on"
            )
        own.copy_(given)
    if weight is not None:
        head = model.heads[0]
        if head.weight.shape != weight.shape:
            raise ValueError(
                f"state: its head is {list(weight.shape)}, the backbone's {list(head.weight.shape)}"
            )
        head.weight.copy_(weight)
        head.bias.copy_(tensors[f"{HEAD}.bias"])
    return model.eval()


def _named(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by the names of their model, whatever stands before these."""
    for before in PLACES:
        if before + SHALLOW in state:
            return {
                name.removeprefix(before): torch.as_tensor(value)
                for name, value in state.items()
                if name.startswith(before) and not isinstance(value, str | bytes)
            }
    some = ", ".join(list(state)[:3])
    raise ValueError(
        f"state: it has no {SHALLOW!r} (it has {some}, ...); give the state dict of a model of the "
        "VPT paper's own code, with prompts before the patches"
    )


def _prompts(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The prompts of each layer that has some, [m, D]."""
    found = [tensors[SHALLOW][0]]
    if DEEP in tensors:
        found += list(tensors[DEEP])
    if f"{PROJECTION}.weight" in tensors:
        weight, bias = tensors[f"{PROJECTION}.weight"], tensors[f"{PROJECTION}.bias"]
        found = [prompts @ weight.T + bias for prompts in found]
    return found


def _head(tensors: Mapping[str, Tensor]) -> Tensor | None:
    hidden = next((name for name in tensors if name.startswith("head.projection.")), None)
    if hidden is not None:
        raise ValueError(
            f"state: its head has hidden layers ({hidden}), and pcx has heads of one linear layer"
        )
    return tensors.get(f"{HEAD}.weight")


def _depth(backbone: Any) -> int:
    blocks = getattr(backbone, "blocks", None)
    if blocks is None:
        raise ValueError(
            f"backbone: a {type(backbone).__name__} has no blocks; give timm's VisionTransformer"
        )
    return len(blocks)


def _check_backbone(tensors: Mapping[str, Tensor], backbone: nn.Module) -> None:
    """Raises a ValueError where the checkpoint holds another backbone than the given one."""
    own = backbone.state_dict()
    for name, timm_name in _pairs(_depth(backbone)):
        parts = [tensors.get(ENCODER + each) for each in name]
        if any(part is None for part in parts) or timm_name not in own:
            continue
        given: Any = parts[0] if len(parts) == 1 else torch.cat([p for p in parts if p is not None])
        mine = own[timm_name].to(given.dtype)
        if given.shape != mine.shape or (given - mine).norm() > CLOSE * mine.norm():
            raise ValueError(
                f"backbone: its {timm_name} is not the checkpoint's {ENCODER + name[0]}; give the "
                "pretrained weights that it was trained on"
            )


def _pairs(depth: int) -> list[tuple[tuple[str, ...], str]]:
    """Names of their tensors, several for one that timm has joined, with timm's name."""
    found: list[tuple[tuple[str, ...], str]] = [((a,), b) for a, b in _OUTSIDE.items()]
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = tuple(f"{layer}.attn.{part}.{kind}" for part in ("query", "key", "value"))
            found.append((parts, f"blocks.{i}.attn.qkv.{kind}"))
            found += [
                ((f"{layer}.{theirs}.{kind}",), f"blocks.{i}.{ours}.{kind}")
                for theirs, ours in _INSIDE.items()
            ]
    return found
