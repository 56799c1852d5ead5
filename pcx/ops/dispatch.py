"""The one dispatch of all ops: which backends an op has, and why one of them cannot run.

An op's file lists its backends as rows of a `Dispatch`. Each row can say why it cannot run a call.
These reasons decide which backend `backend="auto"` calls, what the error says if a backend is asked
for by name, and what `report` says about this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pcx.ops import hardware, library
from pcx.registry import Registry

OPS = Registry(
    "op",
    {
        "prefix_attention": "pcx.ops.prefix_attention:DISPATCH",
        "logit_gate": "pcx.ops.logit_gate:DISPATCH",
        "prompt_score": "pcx.ops.prompt_score:DISPATCH",
        "weighted_pagerank": "pcx.ops.weighted_pagerank:DISPATCH",
        "important_tokens": "pcx.ops.token_choice:IMPORTANT",
        "dissimilar_tokens": "pcx.ops.token_choice:DISSIMILAR",
        "add_layer_norm": "pcx.ops.add_layer_norm:DISPATCH",
        "salient_sum": "pcx.ops.salient_sum:DISPATCH",
        "salient_linear": "pcx.ops.salient_linear:DISPATCH",
    },
)


def _anything(*arguments) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One backend of an op.

    Args:
        name: its name in the argument `backend`.
        device: device type that its tensors must have, such as "cuda"; any by default.
        needs: keys of NEEDS that must be installed.
        majors: major compute capabilities of the GPUs that it is written for; any by default.
        auto: whether "auto" may choose it. A backend with False runs only if asked for by name.
        can_run: a function of the op's checked arguments, from the first tensor on. It returns
            None if the backend can run, or the reason why it cannot.
        run: the backend's function of the op's checked arguments. None means that the torch op
            finds the implementation by the device of its tensors.
    """

    name: str
    device: str | None = None
    needs: tuple[str, ...] = ()
    majors: tuple[int, ...] = ()
    auto: bool = True
    can_run: Callable[..., str | None] = _anything
    run: Callable[..., Any] | None = None


class Dispatch:
    """The backends of one op, in order of preference.

    Args:
        argument: name of the op's first tensor, for messages.
        rows: the backends.
    """

    def __init__(self, argument: str, *rows: Backend):
        self.argument = argument
        self.rows = {row.name: row for row in rows}
        self._added: list[Backend] = []

    def add(self, row: Backend) -> None:
        """Adds a backend that brings its own `run`; "auto" prefers it wherever it can run.

        Give the row `auto=False` if it should run only when asked for by name.

        Raises:
            ValueError: the name is taken, or the row has no `run`.
        """
        if row.name in ("auto", *self.rows):
            raise ValueError(f"row: the name {row.name!r} is taken, choose another one")
        if row.run is None:
            raise ValueError(f"row: {row.name!r} has no function to run, give run=")
        self.rows[row.name] = row
        self._added.append(row)

    @property
    def extended(self) -> bool:
        """Whether backends were added from outside."""
        return bool(self._added)

    def own_run(self, backend: str, *arguments: Any) -> Callable[..., Any] | None:
        """The chosen backend's own function, or None if the torch op finds what to call.

        Args:
            backend: "auto" or a backend's name, which is checked.
            arguments: the op's checked arguments, as `can_run` takes them.

        Raises:
            ValueError: no backend has that name, or it cannot run on the arguments.
        """
        if backend != "auto":
            self.check(backend, *arguments)
            return self.rows[backend].run
        for row in self._added:
            if row.auto and not exporting() and self.cannot(row.name, *arguments) is None:
                return row.run
        return None

    def cannot(self, name: str, first: torch.Tensor, *arguments) -> str | None:
        """The reason why the backend cannot run on checked arguments, or None if it can."""
        row = self.rows[name]
        if row.device is not None and first.device.type != row.device:
            kind = row.device.upper()
            return f"it needs {kind} tensors, {self.argument} is on {first.device.type}"
        return _missing(row) or row.can_run(first, *arguments)

    def check_name(self, name: str) -> None:
        """Raises a ValueError where there is no backend of that name."""
        if name not in ("auto", *self.rows):
            raise ValueError(f"backend: got {name!r}, expected one of {('auto', *self.rows)}")

    def check(self, name: str, *arguments) -> None:
        """Checks that a backend of that name exists and can run on the arguments.

        Raises:
            ValueError: it does not exist, or cannot run.
        """
        self.check_name(name)
        reason = self.cannot(name, *arguments)
        if reason:
            others = tuple(other for other in ("auto", *self.rows) if other != name)
            raise ValueError(f"backend: {name!r} cannot run: {reason}; other backends: {others}")

    def unavailable(self, name: str) -> str | None:
        """The reason why the backend can run no call on this machine, or None if it can."""
        row = self.rows[name]
        reason = _missing(row)
        if reason or row.device != "cuda":
            return reason
        if not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = hardware.capability(torch.device("cuda", torch.cuda.current_device()))
        if row.majors and major not in row.majors:
            written = " and ".join(f"{number}.x" for number in row.majors)
            return f"it is written for compute capability {written}, the GPU has {major}.{minor}"
        return None


NEEDS: dict[str, Callable[[], str | None]] = {
    "triton": lambda: None if hardware.TRITON else "triton is not installed",
    "cpu extension": lambda: (
        None
        if "cpu" in library.EXTENSION
        else "pcx was installed without its compiled extension pcx._C"
    ),
    "cuda extension": lambda: (
        None if "cuda" in library.EXTENSION else "pcx was installed without its CUDA kernels"
    ),
}


def _missing(row: Backend) -> str | None:
    for need in row.needs:
        reason = NEEDS[need]()
        if reason:
            return reason
    return None


class Line(NamedTuple):
    """One line of `report`: an op, one of its backends, and whether this machine can run it."""

    op: str
    backend: str
    reason: str | None  # why this machine cannot run it, None if it can
    auto: bool  # whether "auto" may choose it


def report() -> list[Line]:
    """The backends of every op on this machine, in order of preference; needs no tensors."""
    return [
        Line(op, row.name, dispatch.unavailable(row.name), row.auto)
        for op, dispatch in OPS.items()
        for row in dispatch.rows.values()
    ]


def exporting() -> bool:
    """Whether a program that runs without pcx is recorded, by torch.export or torch.jit.trace.

    `torch.compiler.is_exporting()` does not tell: in torch 2.11 it is true under torch.compile too.
    """
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()
