"""The one dispatch of all ops: what backends an op has, and why one of them cannot run.

An op's file lists its backends as rows of a `Dispatch`. The reasons of these rows decide what
`backend="auto"` calls, what the error says where a backend is asked for by name, and what `report`
tells of this machine.
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
    },
)


def _anything(*arguments) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One backend of an op.

    Args:
        name: as the argument `backend` takes it.
        device: the type of the device that its tensors lie on; any by default.
        needs: what of NEEDS must be installed.
        majors: the major compute capabilities of the GPUs that it is written for; any by default.
        auto: whether "auto" takes it; False of one that is used where it is named alone.
        can_run: takes the op's checked arguments, from the first tensor on; None where the backend
            can run, or the reason why it cannot.
        run: the backend's function of the op's checked arguments; None where the torch op finds
            it by the device of its tensors.
    """

    name: str
    device: str | None = None
    needs: tuple[str, ...] = ()
    majors: tuple[int, ...] = ()
    auto: bool = True
    can_run: Callable[..., str | None] = _anything
    run: Callable[..., Any] | None = None


class Dispatch:
    """The backends of one op, the preferred ones first.

    Args:
        argument: the name of the op's first tensor, for messages.
        rows: its backends.
    """

    def __init__(self, argument: str, *rows: Backend):
        self.argument = argument
        self.rows = {row.name: row for row in rows}
        self._added: list[Backend] = []

    def add(self, row: Backend) -> None:
        """Adds a backend with a `run` of its own; "auto" takes it first wherever it can run.

        A backend that is to be asked for by name alone says `auto=False`.

        Raises:
            ValueError: the name is taken, or the row has no `run`.
        """
        if row.name in ("auto", *self.rows):
            raise ValueError(f"row: the name {row.name!r} is taken, choose another one")
        if row.run is None:
            raise ValueError(f"row: {row.name!r} has no function to run, give run=")
        self.rows[row.name] = row
        self._added.append(row)

    def own_run(self, backend: str, *arguments: Any) -> Callable[..., Any] | None:
        """The function of a row that brings its own, None where the op itself finds what to call.

        Args:
            backend: "auto", or a name, which is checked.
            arguments: the op's checked arguments, as `can_run` takes them.

        Raises:
            ValueError: there is no backend of that name, or it cannot run.
        """
        if backend != "auto":
            self.check(backend, *arguments)
            return self.rows[backend].run
        for row in self._added:
            if row.auto and not exporting() and self.cannot(row.name, *arguments) is None:
                return row.run
        return None

    def cannot(self, name: str, first: torch.Tensor, *arguments) -> str | None:
        """None where the backend can run on checked arguments, or the reason why it cannot."""
        row = self.rows[name]
        if row.device is not None and first.device.type != row.device:
            kind = row.device.upper()
            return f"it needs {kind} tensors, {self.argument} is on {first.device.type}"
        return _missing(row) or row.can_run(first, *arguments)

    def check(self, name: str, *arguments) -> None:
        """Raises a ValueError where there is no such backend, or it cannot run on the arguments."""
        if name not in self.rows:
            raise ValueError(f"backend: got {name!r}, expected one of {('auto', *self.rows)}")
        reason = self.cannot(name, *arguments)
        if reason:
            raise ValueError(f"backend: {name!r} cannot run: {reason}")

    def unavailable(self, name: str) -> str | None:
        """None where the backend can run on this machine at all, or the reason why it cannot."""
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
    """Of `report`: an op, one of its backends, and why this machine cannot run it, or None."""

    op: str
    backend: str
    reason: str | None
    auto: bool  # whether "auto" may take it


def report() -> list[Line]:
    """Every op's backends on this machine, the preferred ones first; needs no tensors."""
    return [
        Line(op, row.name, dispatch.unavailable(row.name), row.auto)
        for op, dispatch in OPS.items()
        for row in dispatch.rows.values()
    ]


def exporting() -> bool:
    """`torch.compiler.is_exporting()`, which in torch 2.11 is true of all that is compiled."""
    return torch.compiler._is_exporting_flag
