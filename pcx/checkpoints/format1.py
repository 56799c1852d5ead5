"""Files of format 1, which knew Visual Prompt Tuning alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SETTINGS = ("kind", "counts", "dropout", "dropout_groups", "path", "read_only")
KEYS = {*SETTINGS, "trained_lr", "backbone", "fingerprint"}


def read_format1(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The configuration of a file of format 1 as one of format 2.

    Raises:
        KeyError: the configuration is not whole.
    """
    missing = KEYS - set(config)
    if missing:
        raise KeyError(*sorted(missing))
    return {
        "method": "vpt",
        "settings": {
            **{name: config[name] for name in SETTINGS},
            "num_classes": _head_size(tensors),
        },
        "backbone": {
            "name": config["backbone"],
            "arguments": {},
            "fingerprint": config["fingerprint"],
            "architecture": {},
        },
        "token_reduction": None,
        "checksums": {},
        "trained_lr": config["trained_lr"],
    }


def _head_size(tensors: dict[str, Tensor]) -> int:
    """How many logits the saved head gives: rows of its last matrix, 0 without one."""
    matrices = [t for n, t in tensors.items() if n.startswith("backbone.") and t.dim() == 2]
    return matrices[-1].shape[0] if matrices else 0
