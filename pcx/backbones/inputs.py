"""What a backbone expects of its images, and reading each sample of a loader once."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import timm.data
from torch import nn

from pcx.backbones.hugging_face import vision_config
from pcx.backbones.residual import unwrapped


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images a backbone was made for."""
    backbone = _backbone_of(model)
    embed: Any = getattr(backbone, "patch_embed", None)
    if hasattr(backbone, "pretrained_cfg"):
        trained_on = timm.data.resolve_model_data_config(backbone)["input_size"]
    else:  # Hugging Face's, or one that was built from its class
        config = vision_config(getattr(backbone, "config", None))
        size = getattr(config, "image_size", None) or getattr(backbone, "image_size", None) or 224
        size = size if isinstance(size, tuple | list) else (size, size)
        trained_on = (getattr(config, "num_channels", 3), *size)
    parts = embed.modules() if isinstance(embed, nn.Module) else ()
    channels = (m.in_channels for m in parts if isinstance(m, nn.Conv2d))
    return (next(channels, trained_on[0]), *(getattr(embed, "img_size", None) or trained_on[1:]))


def _backbone_of(model: Any) -> Any:
    """The backbone of a tuned or frozen model, or the model itself, without a method's wrapper."""
    return unwrapped(getattr(model, "backbone", model))


def data_config(model: nn.Module) -> dict:
    """The images a backbone was trained on: input_size (C, H, W), mean, std, crop and so on.

    Read from timm's configuration of the model, from the image processor that was saved beside a
    Hugging Face checkpoint, or from what open_clip notes on its towers. A model without any of them
    gets mean and std 0.5, ViT's own, and a warning that says so.
    """
    backbone = _backbone_of(model)
    if hasattr(backbone, "pretrained_cfg"):
        config = timm.data.resolve_model_data_config(backbone)
        return {**config, "input_size": input_size(model)}
    mean, std = _processor_statistics(backbone)
    return {
        "input_size": input_size(model),
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _processor_statistics(backbone: nn.Module) -> tuple[tuple, tuple]:
    """(mean, std) that open_clip notes on a tower, or Hugging Face beside a model's checkpoint."""
    tower: Any = getattr(backbone, "tower", backbone)
    if hasattr(tower, "image_mean"):
        return tuple(tower.image_mean), tuple(tower.image_std)
    checkpoint = getattr(getattr(backbone, "config", None), "_name_or_path", "")
    found = _read_processor(checkpoint) if checkpoint else "its checkpoint is not known"
    if not isinstance(found, str):
        return found
    warnings.warn(
        f"model: mean and std of its images are taken to be 0.5, for {found}; normalise your "
        "images as it was trained (DeiT and DINOv2 use ImageNet's)",
        stacklevel=3,
    )
    return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@functools.cache  # the hub is asked once
def _read_processor(checkpoint: str) -> tuple[tuple, tuple] | str:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint)
        return tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{checkpoint} has no image processor to read ({type(error).__name__})"
