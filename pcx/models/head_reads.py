"""Whether a backbone runs for its head alone, which lets the last block leave tokens out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pcx.backbones.spec import pools_by_token

_here = threading.local()  # of each thread, since several may run one model


def run_for_head(backbone: nn.Module, x: Any, **inputs: Any) -> Any:
    """Runs a backbone whose output is taken alone, so that blocks may leave out unread tokens.

    A backbone that is called in any other way, such as by `forward_features`, computes all tokens.
    """
    with reading(pools_by_token(backbone)):
        return backbone(x, **inputs)


@contextmanager
def reading(head_alone: bool | None) -> Iterator[None]:
    """Within it, in this thread, blocks know whether nothing but the head's output is taken."""
    before = is_head_alone()
    _here.head_alone = head_alone
    try:
        yield
    finally:
        _here.head_alone = before


def is_head_alone() -> bool | None:
    """Whether nothing but the head's output is taken of the forward that is under way.

    None where this thread runs no forward of a whole model.
    """
    return getattr(_here, "head_alone", None)
