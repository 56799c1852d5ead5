"""How a function of batches is run: as it is, or from a CUDA graph without Python.

Training steps, evaluation, scoring and frozen models run their batches through `prepared`, so that
this file alone decides how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EXECUTIONS = ("eager", "cuda-graph")
Run = Callable[..., Any]


def prepared(make: Callable[[], Run], device: torch.device, execution: str = "eager") -> Run:
    """Prepares a function of batches to be run eagerly or from a CUDA graph.

    Args:
        make: gives the function, from batches to tensors.
        device: where the batches are.
        execution: "eager", or "cuda-graph" to record the function for batches of the first one's
            shape and replay it (CUDA alone).

    Raises:
        ValueError: there is no such execution, or the device is not CUDA's.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"execution: got {execution!r}, expected one of {EXECUTIONS}")
    if execution == "eager":
        return make()
    if device.type != "cuda":
        raise ValueError(f"execution: 'cuda-graph' needs CUDA, the device is {device}")
    return Replayed(make, device)


class Replayed:
    """Replays a function from a CUDA graph for all batches of the first batch's shape.

    The first batch is run as it is, which also warms up what a graph cannot hold; the next of its
    shape is recorded. Results are overwritten by the next replay.

    Args:
        make: gives the function, from tensors to tensors, that does not wait for the GPU. What it
            differentiates is set up on the stream of the recording, to which autograd goes back.
        device: a CUDA device.
    """

    def __init__(self, make: Callable[[], Run], device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.shapes: list | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.run: Run = self._aside(make)

    def __call__(self, *batch: Any) -> Any:
        other = next((x for x in batch if not isinstance(x, Tensor)), None)
        if other is not None:
            raise ValueError(
                f"cuda_graph: it takes batches of tensors, the loader gives a "
                f"{type(other).__name__}; leave cuda_graph off"
            )
        shapes = [(t.shape, t.dtype, t.device) for t in batch]
        first, self.shapes = self.shapes is None, self.shapes or shapes
        if first or shapes != self.shapes:
            return self._aside(self.run, *batch)
        if self.graph is None:
            self.batch = [t.clone() for t in batch]
            self.graph = self._record()
        for held, given in zip(self.batch, batch, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.results

    def _aside(self, run: Callable, *batch: Tensor) -> Any:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = run(*batch)
        current.wait_stream(self.stream)
        return results

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: a loader's pins memory, that of NCCL looks at events.
        recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self.stream.device), recording:
                self.results = self.run(*self.batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"cuda_graph: the pass could not be recorded ({str(error).splitlines()[0]}), as "
                "where the model or the criterion waits for the GPU; leave cuda_graph off"
            ) from error
        return graph
