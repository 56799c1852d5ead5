"""A function of batches that a CUDA graph repeats without Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """Calls `run`, from a CUDA graph for batches of the first one's shape.

    The first batch is run as it is, which also warms up what a graph cannot hold; the next of its
    shape is recorded. Results are overwritten by the next replay.

    Args:
        run: from tensors to tensors, without waiting for the GPU.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]]):
        self.run = run
        self.shapes: list | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        shapes = [(t.shape, t.dtype, t.device) for t in batch]
        if self.shapes is None:
            self.shapes = shapes
            return self._on_another_stream(batch)
        if shapes != self.shapes:
            return self.run(*batch)
        if self.graph is None:
            self._record(batch)
        assert self.graph is not None
        for held, given in zip(self.batch, batch, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.results

    def _on_another_stream(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As a recording is: libraries set up their workspaces by stream."""
        stream = torch.cuda.Stream(batch[0].device)
        stream.wait_stream(torch.cuda.current_stream(batch[0].device))
        with torch.cuda.stream(stream):
            results = self.run(*batch)
        torch.cuda.current_stream(batch[0].device).wait_stream(stream)
        return results

    def _record(self, batch: tuple[Tensor, ...]) -> None:
        self.batch = [t.clone() for t in batch]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(batch[0].device), torch.cuda.graph(graph):
                self.results = self.run(*self.batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "cuda_graph: the model or the criterion waits for the GPU, which a graph cannot "
                f"hold ({str(error).splitlines()[0]}); leave cuda_graph off"
            ) from error
        self.graph = graph
