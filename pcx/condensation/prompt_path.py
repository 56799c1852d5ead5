"""The way from a layer's prompts to their keys and values, and gradients back along it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.models.vpt.block import PromptedBlock
from pcx.ops.prompt_score import prompt_score

# Of a matrix against autograd, relative: what rounding in these types explains.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}


@dataclass
class _Run:
    """One forward from prompts to keys and values, to be differentiated."""

    pairs: list[tuple[Tensor, Tensor]]
    prompt: Tensor  # [m, D], a leaf
    norm: nn.LayerNorm | None  # that takes the prompts themselves, if all goes through one
    normed: Tensor | None  # what it gives [m, D], a leaf too

    @property
    def shared(self) -> list[Tensor]:
        return [tensor for pair in self.pairs for tensor in pair]

    @property
    def entry(self) -> Tensor:
        """The tensor that gradients are led back to."""
        return self.prompt if self.normed is None else self.normed

    def back(self, grads: Sequence[Tensor], batched: bool) -> Tensor:
        """From gradients by keys and values to one by the entry, [m, D] ([B, m, D])."""
        (found,) = torch.autograd.grad(
            self.shared, self.entry, grads, retain_graph=True, is_grads_batched=batched
        )
        return found.reshape(*found.shape[: 1 if batched else 0], *self.prompt.shape)


class PromptPath:
    """Computes a layer's scores from each sample's gradients by the prompts' keys and values.

    What lies between a prompt and its key and value is the block's own and taken as it is: it is
    run once, and autograd leads the gradients of all samples back. Two things that most blocks have
    are recognised by trying them, and are then faster: a LayerNorm that takes the prompts
    themselves, whose backward is part of `prompt_score`; and, behind it, a map that is the same
    matrix for every prompt, whose transpose is one product over all samples' rows.

    Args:
        layer: of kind "deep" or "prefix", with m > 0 prompts; in eval mode.
        prompts: [m, D], or [2, m, H*d] of kind "prefix".
    """

    def __init__(self, layer: PromptedBlock, prompts: Tensor):
        self.kind = layer.kind
        self.prompts = layer.as_block(prompts.detach())
        self.forward: _Run | None = None
        self.matrices: tuple[Tensor, ...] = ()  # of keys, values, ...: all heads' d by D
        if self.kind == "prefix":
            self.pairs = layer.prefixes(self.prompts)
        else:
            with torch.enable_grad():
                self.forward = _through_norm(layer, self.prompts) or _plain(layer, self.prompts)
                self.pairs = [(k.detach(), v.detach()) for k, v in self.forward.pairs]
                self.matrices = _matrices(layer, self.forward)

    def given(self, batch: int) -> list[Tensor]:
        """Keys and values of each sample, [B, H, m, d] of stride 0: k, v, k, ..."""
        return [t.expand(batch, *t.shape) for pair in self.pairs for t in pair]

    def scores(self, grads: Sequence[Tensor]) -> Tensor:
        """[2, B, m] of `prompt_score`, from gradients [B, H, m, d] in the order of `given`."""
        if self.forward is None:  # the prompts are keys and values
            rows, prompts = (
                torch.cat([_rows(t) for t in (key, value)], -1)
                for key, value in (grads, [t[None] for t in self.pairs[0]])
            )
            return prompt_score(rows, prompts[0])
        norm = self.forward.norm
        gradient = _product(grads, self.matrices) if self.matrices else self._led_back(grads)
        if norm is None:
            return prompt_score(gradient, self.prompts)
        return prompt_score(
            gradient, self.prompts, layer_norm=True, weight=norm.weight, eps=norm.eps
        )

    def _led_back(self, grads: Sequence[Tensor]) -> Tensor:
        assert self.forward is not None
        try:
            return self.forward.back(grads, batched=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation of the block's own that torch cannot batch
            return torch.stack(
                [self.forward.back(one, batched=False) for one in zip(*grads, strict=True)]
            )


def _rows(x: Tensor) -> Tensor:
    """[B, H, m, d] -> [B, m, all heads' d]; a view of what `prefix_attention` gives on CUDA."""
    return x.transpose(1, 2).flatten(2)


def _plain(layer: PromptedBlock, prompts: Tensor) -> _Run:
    leaf = prompts.clone().requires_grad_()
    return _Run(layer.prefixes(leaf), leaf, None, None)


def _through_norm(layer: PromptedBlock, prompts: Tensor) -> _Run | None:
    """Cuts the graph behind the LayerNorm; None where not everything goes through one."""
    leaf = prompts.clone().requires_grad_()
    with _cut_behind_norms(layer.block, leaf) as cuts:
        pairs = layer.prefixes(leaf)
    reached = _leaves_behind([t for pair in pairs for t in pair])
    used = [(norm, cut) for norm, cut in cuts if id(cut) in reached]
    if id(leaf) in reached or len(used) != 1:
        return None
    norm, normed = used[0]
    expected = F.layer_norm(leaf.detach(), leaf.shape[-1:], norm.weight, norm.bias, norm.eps)
    found = normed.detach().reshape(leaf.shape).to(expected.dtype)
    if (found - expected).norm() > _ROUNDING[normed.dtype] * expected.norm():
        return None  # a subclass with a mind of its own
    return _Run(pairs, leaf, norm, normed)


def _leaves_behind(tensors: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves that autograd would give gradients to."""
    leaves = {id(t) for t in tensors if t.grad_fn is None}
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting.append(node)
            if hasattr(node, "variable"):  # it adds to a leaf's gradient
                leaves.add(id(node.variable))
    return leaves


@contextmanager
def _cut_behind_norms(block: nn.Module, prompts: Tensor) -> Iterator[list]:
    """Makes what a LayerNorm gives for the prompts themselves a leaf; yields (norm, leaf)."""
    cuts: list[tuple[nn.LayerNorm, Tensor]] = []

    def cut(norm: nn.LayerNorm, arguments: tuple, output: Any) -> Any:
        x = arguments[0] if len(arguments) == 1 else None
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
            return output
        if x.data_ptr() != prompts.data_ptr() or x.shape[-2:] != prompts.shape:
            return output
        cuts.append((norm, output.detach().requires_grad_()))
        return cuts[-1][1]

    norms = [
        m
        for m in block.modules()
        if isinstance(m, nn.LayerNorm) and tuple(m.normalized_shape) == prompts.shape[-1:]
    ]
    hooks = [norm.register_forward_hook(cut) for norm in norms]
    try:
        yield cuts
    finally:
        for hook in hooks:
            hook.remove()


def _matrices(layer: PromptedBlock, run: _Run) -> tuple[Tensor, ...]:
    """The matrices [all heads' d, D] from gradients by a key, value, ... to those by the entry.

    None at all where they are not the same for all prompts: norms of keys, positions, mixing of
    tokens.
    """
    sizes = [t.shape[0] * t.shape[2] for t in run.shared]
    # As many copies of one prompt as the matrix has rows, each differentiated by one number.
    copies = run.prompt.detach()[:1].expand(sum(sizes), -1).contiguous()
    many = _plain(layer, copies) if run.norm is None else _through_norm(layer, copies)
    if many is None:
        return ()
    basis = torch.eye(sum(sizes), dtype=many.shared[0].dtype, device=copies.device).split(sizes, 1)
    ones = [
        b.unflatten(1, (len(t), -1)).transpose(0, 1)
        for b, t in zip(basis, many.shared, strict=True)
    ]
    matrices = many.back(ones, batched=False).to(many.shared[0].dtype).split(sizes)
    generator = torch.Generator(copies.device).manual_seed(0)
    made_up = [
        torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in run.shared
    ]
    expected = run.back(made_up, batched=False)
    found = _product([t[None] for t in made_up], matrices)[0].to(expected.dtype)
    fits = (found - expected).norm() <= _ROUNDING[matrices[0].dtype] * expected.norm()
    return matrices if fits else ()


def _product(grads: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
    """Gradients by the entry [B, m, D] from those [B, H, m, d] by keys, values, ..."""
    batch, _, m, _ = grads[0].shape
    total: Tensor | None = None
    for grad, matrix in zip(grads, matrices, strict=True):
        rows = grad.transpose(1, 2).reshape(batch * m, -1).to(matrix.dtype)  # [B m, all heads' d]
        total = rows @ matrix if total is None else torch.addmm(total, rows, matrix)
    assert total is not None
    return total.view(batch, m, -1)
