"""How a function of batches is run: eagerly, or from a CUDA graph, which takes no Python.

Training steps, evaluation, scoring and frozen models run their batches through `prepared`, so that
this file alone decides how.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from pcx.ops.recording import warming

EXECUTIONS = ("auto", "eager", "cuda-graph", "compile")
LOG = logging.getLogger("pcx.execution")
Run = Callable[..., Any]


def check_execution(execution: str, device: torch.device) -> None:
    """Raises a ValueError where there is no such execution, or none on the device."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution: got {execution!r}, expected one of {EXECUTIONS}")
    if execution == "cuda-graph" and device.type != "cuda":
        raise ValueError(
            f"execution: 'cuda-graph' needs CUDA, the device is {device}; use 'auto' or 'eager'"
        )


def prepared(make: Callable[[], Run], device: torch.device, execution: str, graphs: int = 1) -> Run:
    """Prepares a function of batches to be run again and again.

    Args:
        make: gives the function, from batches to tensors.
        device: where the batches are.
        execution: "eager" runs it as it is. "cuda-graph" records it for batches of one shape and
            replays it. "auto" and "compile" do so on CUDA where it can be recorded, and say why
            where it cannot ("compile" is about the model, see `compiled`).
        graphs: how many shapes of batches are recorded; further ones run as they are.

    Raises:
        ValueError: there is no such execution, or the device is not CUDA's.
    """
    check_execution(execution, device)
    if execution == "eager" or device.type != "cuda":
        return make()
    return Replayed(make, device, must=execution == "cuda-graph", graphs=graphs)


def compiled(model: nn.Module, execution: str) -> nn.Module:
    """The model, compiled for execution "compile"; it shares all parameters with the given one."""
    return torch.compile(model, dynamic=False) if execution == "compile" else model  # type: ignore[return-value]


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    given: list[Tensor]  # what the graph reads
    results: Any  # what it writes


class Replayed:
    """Runs a function from CUDA graphs, one for each shape of batches.

    The first batch of a shape is run as it is, which warms up what a graph cannot hold, and shows
    whether the function waits for the GPU. The next batch of that shape is recorded and replayed.
    Recording computes nothing, so that no state has to be put back. Results are copies.

    Args:
        make: gives the function, from batches to tensors. It is called on the stream of the
            recording, to which autograd goes back.
        device: a CUDA device.
        must: whether a function that cannot be recorded is an error; otherwise it goes on as it is,
            after one line in the log that says why.
        graphs: how many shapes are recorded.
    """

    PATIENCE = (
        2  # batches that may wait for the GPU, as first calls do, before recording is given up
    )

    def __init__(
        self, make: Callable[[], Run], device: torch.device, *, must: bool = False, graphs: int = 1
    ):
        self.stream = _stream_beside(device)
        self.must, self.graphs = must, graphs
        self.recordings: dict[Any, _Recording | None] = {}  # None of a shape that ran once
        self.waits = 0
        self.refused = False
        self.said: set[str] = set()
        self.run: Run = self._aside(make)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's results for a batch."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = _key(leaves, spec)
        if self.refused or (key not in self.recordings and len(self.recordings) >= self.graphs):
            if not self.refused:
                self._say(logging.INFO, "batches of another shape run without a CUDA graph")
            return self._aside(self.run, *args, **kwargs)
        if key not in self.recordings:
            with waits_for_gpu() as waits, warming():
                results = self._aside(self.run, *args, **kwargs)
            self._look_at(waits, key)
            return results
        recording = self.recordings[key]
        if recording is None:
            recording = self.recordings[key] = self._record(leaves, spec)
            if recording is None:
                return self._aside(self.run, *args, **kwargs)
        for held, given in zip(recording.given, tensors, strict=True):
            held.copy_(given, non_blocking=True)
        recording.graph.replay()
        return tree_map_only(Tensor, torch.clone, recording.results)

    def _look_at(self, waits: list[str], key: Any) -> None:
        if not waits:
            self.recordings[key] = None
            return
        self.waits += 1
        if self.waits >= self.PATIENCE:
            self._refuse(f"it waits for the GPU ({waits[0]})")

    def _aside(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = run(*args, **kwargs)
        current.wait_stream(self.stream)
        return results

    def _record(self, leaves: list[Any], spec: TreeSpec) -> _Recording | None:
        graph = torch.cuda.CUDAGraph()
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = spec.unflatten(leaves)
        try:
            with torch.cuda.stream(self.stream), own_workspaces(), _recording_to(graph):
                results = self.run(*args, **kwargs)
        except Exception as error:  # whatever the function calls may refuse to be recorded
            _end_recording(self.stream.device)
            if self.must and isinstance(error, torch.OutOfMemoryError):
                raise
            first: BaseException = error  # the end of a recording that failed is an error too
            while first.__context__ is not None:
                first = first.__context__
            self._refuse(f"{type(first).__name__}: {str(first).splitlines()[0]}", error)
            return None
        return _Recording(graph, [x for x in leaves if isinstance(x, Tensor)], results)

    def _refuse(self, why: str, error: Exception | None = None) -> None:
        if self.must:
            raise ValueError(
                f"execution: 'cuda-graph' cannot record this: {why}; use execution='eager'"
            ) from error
        self.refused = True
        self.recordings.clear()
        self._say(logging.WARNING, f"running without a CUDA graph: {why}")

    def _say(self, level: int, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            LOG.log(level, what)


def _key(leaves: list[Any], spec: TreeSpec) -> Any:
    """What two calls must have in common to run from the same graph."""
    found = [
        (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), repr(x))
        for x in leaves
    ]
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return (spec, *found, autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled())


@contextmanager
def waits_for_gpu() -> Iterator[list[str]]:
    """Lists where the code within waits for the GPU, "file:line" each, as torch notices it."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in seen:
        if "called a synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """The one stream for recordings: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Within it cuBLAS takes new workspaces, which are a recording's own.

    A recording that used those of eager calls would write to freed memory once torch drops them,
    as it does for its own compiled graphs.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _recording_to(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Records what the current stream is given, as `torch.cuda.graph` does.

    That one waits for the GPU and frees all memory that torch keeps, also that of pinned batches,
    which takes some 30 ms. Here this is done only where the recording could not have as much memory
    as torch holds, which is what the batch before it took at most.
    """
    if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    # Other threads may go on: a loader's pins memory, that of NCCL looks at events.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        try:
            graph.capture_end()
        except Exception:
            _give_back(pool)
            raise


def _give_back(pool: Any) -> None:
    """Ends what torch 2.11 goes on with behind a recording that cannot be ended.

    Its allocator takes the recording for one that is under way, and keeps every tensor that another
    stream has used, such as each later batch. The recording's own memory would stay taken too.
    """
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # of newer versions, which have ended it themselves
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def _end_recording(device: torch.device) -> None:
    """Ends what a failed recording leaves behind: torch's generator would refuse every draw."""
    with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.rand(1, device=device)
