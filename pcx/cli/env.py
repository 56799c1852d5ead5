"""The command `pcx env`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def env() -> None:
    """Prints versions, devices, and for each op the backend used and why others cannot run."""
    from pcx.training.run_folder import device_name, versions

    console = Console(soft_wrap=True, highlight=False)
    for name, version in versions().items():
        console.print(f"{name} {version}")
    for device in _devices():
        console.print(f"device {device}: {device_name(device)}")
    console.print(f"compiled extension pcx._C: {_extension()}")
    console.print(_table())


def _devices() -> list[str]:
    import torch

    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _extension() -> str:
    from pcx.ops.library import EXTENSION

    if not EXTENSION:
        return "not installed; ops run in Triton or torch"
    return f"loaded, with kernels for {' and '.join(sorted(EXTENSION))}"


def _table() -> Table:
    """A table of every op's backends in order of preference, and of the one that is used here."""
    from pcx.ops.dispatch import report

    table = Table("operation", "backend", "on this machine")
    decided = set()
    for line in report():
        used = line.reason is None and line.auto and line.op not in decided
        said = "used" if used else line.reason or "can be asked for by name"
        table.add_row(line.op, line.backend, said)
        if used:
            decided.add(line.op)
    return table
