"""Telling weights, backbones and damaged tensors apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pcx.backbones.positions import are_positions
from pcx.models.base import TunedModel


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum(tensor: Tensor) -> str:
    """The first 16 digits of the SHA-256 over one tensor's dtype, shape and bytes."""
    return fingerprint([("", tensor)])[:16]


def text_checksum(text: str) -> str:
    """The first 16 digits of the SHA-256 over a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def backbone_fingerprint(model: TunedModel, *, positions: bool = True) -> str:
    """The fingerprint of the frozen weights, by the names that the plain backbone gives them.

    Without `positions` it leaves out position embeddings, and is the same for any image size.
    """
    weights = {n: t for n, t in model.frozen_state().items() if isinstance(t, nn.Parameter)}
    return fingerprint(
        (f"backbone.{n}", t) for n, t in weights.items() if positions or not are_positions(n)
    )


def buffers_fingerprint(model: TunedModel) -> str | None:
    """The fingerprint of the frozen buffers, such as BatchNorm's statistics; None without any."""
    buffers = {n: t for n, t in model.frozen_state().items() if not isinstance(t, nn.Parameter)}
    return fingerprint(buffers.items()) if buffers else None


def backbone_name(backbone: nn.Module) -> str:
    """timm's architecture and tag, Hugging Face's name of the checkpoint, or the class's name."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    if config.get("architecture"):
        return ".".join(filter(None, (config["architecture"], config.get("tag"))))
    checkpoint = getattr(getattr(backbone, "config", None), "_name_or_path", "")
    return checkpoint or type(backbone).__name__
