"""Puts prompted blocks into the places of a backbone's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pcx.backbones import attention
from pcx.backbones.path_finding import trial_of
from pcx.backbones.probing import without_hooks
from pcx.backbones.token_path import TokenPath
from pcx.models.vpt.block import PromptedBlock
from pcx.models.vpt.windowed import WindowedBlock, set_up_travelling


def wrap_blocks(model: Any, token_paths: Sequence[TokenPath | None]) -> None:
    """Wraps the blocks of a VPT's own copy of its backbone.

    Args:
        model: a VPT whose prompts are drawn.
        token_paths: for each block the way of prompts to their keys and values, None where it has
            no prompts.
    """
    backbone, blocks = model.backbone, model.spec.blocks
    for i, (spec, token_path) in enumerate(zip(blocks, token_paths, strict=True)):
        block: Any = backbone.get_submodule(spec.name)
        checkpoint = getattr(block, "gradient_checkpointing", False)
        if checkpoint:  # Hugging Face re-runs its layers outside of ours
            block.gradient_checkpointing = False
        with without_hooks(block):
            module = backbone.get_submodule(spec.attention)
            attention.route(block, module, spec.calls, *trial_of(spec, block))
        reads_cls = model.read_only and model.variant.pool == "cls"
        among = token_path is not None and token_path.takes_tokens
        wrapped = (PromptedBlock if among else WindowedBlock)(
            block,
            i,
            model.prompts,
            kind=model.kind,
            dropout_groups=model.dropout_groups,
            calls=spec.calls,
            head_dims=(spec.heads, spec.head_dim, spec.value_dim),
            token_path=token_path,
            prefix_tokens=model.spec.prefix_tokens,
            read_tokens=model.spec.read_tokens if reads_cls else None,
            last=i == len(blocks) - 1,
        )
        wrapped.checkpoint = checkpoint
        backbone.set_submodule(spec.name, wrapped)
    if blocks:
        last = model.layers[-1]
        last.seen_by = (last, *last.block.modules(), *_seeing_the_last(model))
    if model.kind == "shallow" and not model.spec.is_one_sequence:
        set_up_travelling(model)


def _seeing_the_last(model: Any) -> list[nn.Module]:
    """The modules, but for the backbone itself, that the last block's tokens go through."""
    parts = model.spec.blocks[-1].name.split(".")
    around = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    behind = [] if model.spec.norm is None else [model.spec.norm]
    return [model.backbone.get_submodule(name) for name in (*around, *behind)]
