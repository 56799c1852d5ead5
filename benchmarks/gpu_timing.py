"""Timing on a GPU by medians of CUDA graphs, over inputs that together do not fit the L2."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def table(folder: Path, stem: str) -> tuple[Path, list[dict]]:
    """The path of this GPU's CSV, <stem>_<gpu>.csv, and the rows that it already has."""
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "_")
    file = folder / f"{stem}_{name}.csv"
    return file, rows_of(file)


def rows_of(file: Path) -> list[dict]:
    """The rows of a CSV; none if the file does not exist."""
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, each of which is warmed up first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # no later call may reuse the memory of a result
    graph.kept = kept  # type: ignore[attr-defined]
    return graph


def quantiles(
    run: Callable[[], object], calls: int = 1, repeats: int = 30, per_repeat: int = 3
) -> tuple[float, float, float]:
    """(first quartile, median, third quartile) in microseconds per call; `run` makes `calls`."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(per_repeat):
            run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / calls / per_repeat)
    found = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    first, median, third = found.tolist()
    return first, median, third


def graphed(calls: Sequence[Callable[[], object]], repeats: int = 30) -> tuple[float, float, float]:
    """Quartiles in microseconds of one call, over a graph of calls with different inputs."""
    graph = graph_of(calls)
    return quantiles(graph.replay, len(calls), repeats)
