"""Whether a call is part of a CUDA graph, so that what warms up is what is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_WARMING = ContextVar("pcx.warming", default=False)


def is_recorded() -> bool:
    """Whether the present call on CUDA is recorded in a graph, or warms up for a recording.

    Calls that choose a faster form outside of graphs ask this. Everything that a recording runs has
    then run before: kernels are compiled, and waits for the GPU were seen.
    """
    return _WARMING.get() or torch.cuda.is_current_stream_capturing()


@contextmanager
def warming() -> Iterator[None]:
    """Makes the calls within it take the forms that are recorded."""
    token = _WARMING.set(True)
    try:
        yield
    finally:
        _WARMING.reset(token)
