"""pcx env."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def env() -> None:
    """Versions, devices, and which backend runs each operation and why not the others."""
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
    from pcx.ops.registration import EXTENSION

    if not EXTENSION:
        return "not there; operations run in Triton or torch"
    return f"loaded, with kernels for {' and '.join(sorted(EXTENSION))}"


def _table() -> Table:
    table = Table("operation", "backend", "on this machine")
    decided = set()
    for operation, backend, reason in backends():
        used = reason is None and operation not in decided
        table.add_row(operation, backend, "used" if used else reason or "can be asked for by name")
        if used:
            decided.add(operation)
    return table


def backends() -> list[tuple[str, str, str | None]]:
    """(operation, backend, None or the reason why it cannot run here), the preferred ones first.

    The answers are for tensors of ordinary shapes on the GPU, or on the CPU where there is none.
    """
    return [
        (operation, backend, _why_not(backend))
        for operation, names in _preferred().items()
        for backend in names
    ]


def _preferred() -> dict[str, tuple[str, ...]]:
    return {
        "prefix_attention": ("cuda", "triton", "reference", "cpu"),
        "weighted_pagerank": ("cuda", "triton", "cpu", "reference"),
        "prompt_score": ("triton", "cpu", "reference"),
        "prefix_logit_gradient": ("triton", "reference"),
    }


def _why_not(backend: str) -> str | None:
    import torch

    from pcx.ops.backends import cannot, capability

    gpu = torch.cuda.is_available()
    q = torch.zeros(1, 1, 1, 64, device="cuda" if gpu else "cpu")
    q = q.bfloat16() if gpu else q
    if backend in ("cuda", "triton") and not gpu:
        return "no CUDA device"
    reason = cannot(backend, q, q, q, q[0], q[0], None, 1.0)
    if reason is None and backend == "cuda" and capability(q.device)[0] != 9:
        return "it needs a GPU of compute capability 9 (Hopper)"
    return reason
