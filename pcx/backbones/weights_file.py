"""Weights of a timm model from a file of the user: read as data alone, and none left at random."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pcx.arguments import some_of
from pcx.backbones.timm_vit import facts_of

_WITHIN = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher")


def with_weights(name: str, weights: Path, **arguments: Any) -> nn.Module:
    """Builds a timm model whose weights, but for its head's, are those of a file.

    timm renames and resamples them where it knows how.

    Args:
        name: timm's name of the model.
        weights: .safetensors, timm's .npz, or what torch.save wrote.
        arguments: as `timm.create_model` takes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as data, or its weights do not fill the model.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"weights: no file {weights}")
    if weights.suffix == ".npz":
        overlay, given = {"file": str(weights), "custom_load": True}, None
    else:
        given = read_weights(weights)
        overlay = {"state_dict": dict(given)}
    try:
        with _Copies() as copies:
            model: Any = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
            )
    except Exception as error:  # each family has its own way of reading foreign names
        raise ValueError(
            f"weights: {weights} does not fit {name} ({type(error).__name__}: {error}); give a "
            "file of that model's weights"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # timm keeps the overlay
    heads = facts_of(model)["heads"]
    left = [n for n, p in model.named_parameters() if id(p) not in copies.targets]
    left = [n for n in left if not n.startswith(tuple(f"{head}." for head in heads))]
    if left:
        has = f"; it has {some_of(given)}" if given is not None else ""
        raise ValueError(
            f"weights: {weights} has no values for {some_of(left)} of {name}, which would stay "
            f"random{has}. Give a file of that model's weights, by timm's names"
        )
    _check_all_used(weights, given or {}, model, name)
    return model


def read_weights(file: Path) -> dict[str, Tensor]:
    """Reads tensors by name; no code in the file is run.

    Raises:
        ValueError: the file is of another kind, damaged, or holds more than data.
    """
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # of settings, as DeiT's have
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights: {file} cannot be read ({error}); fetch it again") from error
    except Exception as error:  # torch raises errors of many types
        raise ValueError(
            f"weights: {file} is not what torch.save writes of tensors alone "
            f"({type(error).__name__}); save its state_dict as .safetensors"
        ) from error
    while isinstance(content, dict) and (key := next((k for k in _WITHIN if k in content), None)):
        content = content[key]
    named = content if isinstance(content, dict) else {}
    tensors = {n: t for n, t in clean_state_dict(named).items() if isinstance(t, Tensor)}
    if not tensors:
        raise ValueError(f"weights: {file} holds no tensors by name, expected a state_dict")
    return tensors


class _Copies(TorchFunctionMode):
    """Notes which tensors something was copied into."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            self.targets[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))


def _check_all_used(file: Path, given: Iterable[str], model: Any, name: str) -> None:
    """Raises a ValueError where the file has more blocks than the model."""
    lists = tuple({f"{block.rpartition('.')[0]}." for block in facts_of(model)["listed"]})
    of_blocks = {n for n in given if n.startswith(lists)}
    mine = {n for n in model.state_dict() if n.startswith(lists)}
    if mine < of_blocks:
        raise ValueError(
            f"weights: {file} has more than {name} takes: {some_of(sorted(of_blocks - mine))}; "
            "give a file of that model's weights"
        )
