"""Finds a backbone's blocks by running it once, without class names.

One forward of one image runs on a copy whose tensors have shapes alone, under hooks on every module
and a mode that sees every function. A *block* is the module whose own forward adds a result of
attention to its own input, the stream. Its *reader* is the first module that is given this sum.
Attention is a call of `F.scaled_dot_product_attention`, or a softmax and the product that reads it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pcx.backbones.attention import fuse, made_up

_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_VIEWS = {F.dropout, Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}


@dataclass(frozen=True)
class TensorLike:
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class BlockSpec:
    """What one block is and where its parts are; names are dotted names in the backbone."""

    name: str
    stage: int  # counts changes of width, from 0
    dim: int  # width of the stream
    layout: str  # of the stream: "BNC", "BHWC" or "BCHW"
    attention: str  # the module that makes the first attention call; the block itself where it does
    before: str | None  # the norm between the stream and that module, None where there is none
    reader: str | None  # the first module that is given x + attention(x), None where there is none
    mlp: str | None
    calls: int  # of attention, each of F.scaled_dot_product_attention or written out
    heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    call_form: str  # shape of the queries: "BHND", "(BH)ND", or more letters for windows
    windows: int  # attention calls' batch over the images' batch, 1 where tokens all meet
    arguments: tuple[str, ...]  # what the backbone passes to the block besides the stream
    returns_tuple: bool
    stream: tuple[int, ...]  # shape of one image's stream
    given: tuple[int, ...]  # shape of the first tensor that the attention module is given
    given_more: tuple[tuple[str, Any], ...]  # its other arguments
    values: tuple[Any, ...]  # of the arguments; a tensor's is a `TensorLike`
    needs: tuple[tuple[str, Any], ...] = ()  # arguments for tokens without a place, see `needed`

    @property
    def is_flat(self) -> bool:
        """Whether the block takes any sequence of tokens, all of which meet in its attention."""
        sequence = self.layout == "BNC" and self.call_form == "BHND" and self.windows == 1
        return sequence and all(v is None or _are_tensors(v) for _, v in self.needs)


@torch.no_grad()
def probe_blocks(
    backbone: nn.Module, size: Sequence[int]
) -> tuple[tuple[BlockSpec, ...], str | None]:
    """The blocks of a backbone, none where attention is not fused, and the norm behind the last.

    Blocks come in the order of their computation; the norm is a dotted name, or None.

    Args:
        backbone: any model over images; not changed.
        size: (C, H, W) of an image.

    Raises:
        Exception: whatever the backbone raises on an image without values.
    """
    model = hollow(backbone)
    fuse(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    trace = _Trace()
    with without_hooks(model), trace.following(model, ""), trace:
        model(torch.empty(1, *size, device="meta", dtype=dtype))
    norm = trace.reader_of_last
    found = _specs(model, trace)
    return found, norm if norm and _is_norm(model.get_submodule(norm)) else None


@torch.no_grad()
def probe_listed(
    backbone: nn.Module, names: Sequence[str], dim: int
) -> tuple[tuple[BlockSpec, ...], None]:
    """Blocks that the library lists, each run by itself on made-up tokens [1, n, dim].

    For a model whose forward does not run on an image without values.

    Raises:
        Exception: whatever a block raises on tokens alone.
    """
    like = next(backbone.parameters())
    trace = _Trace()
    for name in names:
        block = backbone.get_submodule(name)
        with without_hooks(block), trace.following(block, name), trace:
            block(torch.zeros(1, 6, dim, device=like.device, dtype=like.dtype))
    return _specs(backbone, trace), None


def _specs(model: nn.Module, trace: _Trace) -> tuple[BlockSpec, ...]:
    widths: list[int] = []
    found = []
    for frame in trace.blocks:
        _, width = _layout(frame.tensors[0])
        if not widths or widths[-1] != width:
            widths.append(width)
        found.append(_spec_of(model, frame, trace.norm_before(frame), stage=len(widths) - 1))
    return tuple(found)


def hollow(model: nn.Module) -> Any:
    """A copy in eval mode whose weights have shapes alone."""
    shapes = {id(t): _on_meta(t) for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shapes).eval()


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes away a user's forward hooks for the time of a probe.

    Such hooks count calls and look at values, and a probe's values are made up. Those of torch's
    own, such as weight norm's, stay.
    """
    taken = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            taken.append((hooks, dict(hooks)))
            for number, hook in taken[-1][1].items():
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[number]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def _on_meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
    return tensor.to("meta")


@dataclass(eq=False)
class _Frame:
    """One call of one module."""

    name: str
    module: nn.Module
    tensors: list[Tensor]  # among its arguments
    arguments: tuple[str, ...]
    values: tuple[Any, ...]
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # q, k, v
    path: list[_Frame] = field(default_factory=list)  # from the block to its first attention call
    sum: int | None = None  # the tensor x + attention(x)
    reader: str | None = None
    read: set[int] = field(default_factory=set)  # what the reader gave
    follower: str | None = None  # the first module that is given it
    inside: list[tuple[str, set[int], set[int]]] = field(default_factory=list)  # name, in, out
    norms: list[tuple[str, bool, set[int]]] = field(default_factory=list)
    # Of the norms before any attention call: name, whether it reads the stream, what it gave.
    returns_tuple: bool = False


class _Trace(TorchFunctionMode):
    """Follows tensors by identity; a view of all elements of a tensor counts as that tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[_Frame] = []  # in the order of their sums
        self.reader_of_last: str | None = None  # the first module given what the last block gave
        self._last: set[int] = set()  # what that is
        self._stack: list[_Frame] = []
        self._weights: set[int] = set()  # what a softmax gave
        self._roots: dict[int, int] = {}
        self._alive: list[Any] = []  # identities are of tensors that are still there

    @contextmanager
    def following(self, module: nn.Module, start: str) -> Iterator[None]:
        """Hooks on a module and all in it, of names that begin with `start`."""
        hooks = []
        for name, part in module.named_modules(prefix=start):
            hooks.append(part.register_forward_pre_hook(self.entered(name), with_kwargs=True))
            hooks.append(part.register_forward_hook(self.left, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._stack.clear()

    def _of(self, tensors: Sequence[Any]) -> set[int]:
        return {self._roots.get(id(t), id(t)) for t in tensors if isinstance(t, Tensor)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._alive.append((args, out))
        if func is F.scaled_dot_product_attention:
            self._attended(args)
        elif func in _SOFTMAXES:
            self._weights |= self._of([out])
        elif func in _PRODUCTS and self._of(args[:1]) & self._weights:
            self._attended((out, args[1], args[1]))  # q and k were read before
        elif func in _ADDS and self._stack:
            self._added(self._of(args), out)
        elif func in _VIEWS and out.numel() == args[0].numel():
            self._roots[id(out)] = self._roots.get(id(args[0]), id(args[0]))
        return out

    def _attended(self, args: tuple) -> None:
        for i, frame in enumerate(self._stack):
            if not frame.calls:
                frame.path = self._stack[i + 1 :]
            frame.calls.append(args[:3])

    def _added(self, operands: set[int], out: Tensor) -> None:
        frame = self._stack[-1]
        if frame.calls and frame.sum is None and operands & self._of(frame.tensors):
            (frame.sum,) = self._of([out])
            self.blocks.append(frame)

    def entered(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            given = self._of(tensors)
            if given & self._last and self.reader_of_last is None:
                self.reader_of_last = name
            for frame in self._stack:
                if frame.reader is None and frame.sum in given:
                    frame.reader = name
                elif frame.follower is None and given & frame.read:
                    frame.follower = name
            names = list(inspect.signature(type(module).forward).parameters)[2 : len(args) + 1]
            values = tuple(_described(value) for value in (*args[1:], *kwargs.values()))
            self._stack.append(_Frame(name, module, tensors, (*names, *kwargs), values))

        return hook

    def left(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        left = self._stack.pop()
        self._alive.append((left, out))
        left.returns_tuple = isinstance(out, tuple)
        outputs = self._of(out if isinstance(out, tuple) else [out])
        if left.sum is not None:
            self._last, self.reader_of_last = outputs, None
        for frame in self._stack:
            frame.inside.append((left.name, self._of(left.tensors), outputs))
            if not frame.calls and _is_norm(module) and outputs - self._of(left.tensors):
                of_stream = bool(self._of(left.tensors) & self._of(frame.tensors[:1]))
                frame.norms.append((left.name, of_stream, outputs))
            if frame.reader == left.name and not frame.read:
                frame.read = outputs

    def norm_before(self, frame: _Frame) -> str | None:
        """The module between the stream and the attention, where that is one module.

        Where other tokens join the stream before it, it is the norm that the attention reads; where
        its output is cut into windows on the way, the first norm of the stream.
        """
        stream, targets = self._of(frame.tensors[:1]), set[int]()
        for inner in frame.path:
            targets |= self._of(inner.tensors)
        for name, given, gave in frame.inside:
            if given & stream and gave & targets and not gave & stream:
                return name
        within = f"{frame.path[-1].name}." if frame.path else ""
        norms = [norm for norm in frame.norms if not norm[0].startswith(within)]
        read = [name for name, _, gave in norms if gave & targets]
        of_stream = [name for name, reads, _ in norms if reads]
        return next(iter([*read, *of_stream]), None)


def _spec_of(model: nn.Module, frame: _Frame, before: str | None, stage: int) -> BlockSpec:
    q, k, v = frame.calls[0]
    layout, width = _layout(frame.tensors[0])
    form, heads, windows = _call_form(q.shape, v.shape[-1], width)
    reads = frame.path[-1] if frame.path else frame
    reader = frame.reader
    followed = reader is not None and _is_norm(model.get_submodule(reader))
    return BlockSpec(
        name=frame.name,
        stage=stage,
        dim=width,
        layout=layout,
        attention=frame.path[-1].name if frame.path else frame.name,
        before=before,
        reader=reader,
        mlp=frame.follower if followed else reader,
        calls=len(frame.calls),
        heads=heads,
        head_dim=k.shape[-1],
        value_dim=v.shape[-1],
        call_form=form,
        windows=windows,
        arguments=frame.arguments,
        returns_tuple=frame.returns_tuple,
        stream=tuple(frame.tensors[0].shape),
        given=tuple(reads.tensors[0].shape) if reads.tensors else (),
        given_more=tuple(zip(reads.arguments, reads.values, strict=True)),
        values=frame.values,
        needs=needed(frame.module, dict(zip(frame.arguments, frame.values, strict=True))),
    )


def needed(block: nn.Module, given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a block has to be given besides tokens that have no place in the image.

    These are its arguments without a default, and pairs of tensors: Hugging Face's rotations, which
    a block looks for in every call. `attention.placeless` makes the values.

    Args:
        block: the block.
        given: what the backbone passes to it, a tensor as a `TensorLike`.
    """
    parameters = inspect.signature(type(block).forward).parameters
    return tuple(
        (name, value)
        for name, value in given.items()
        if _are_tensors(value)
        or (name in parameters and parameters[name].default is inspect.Parameter.empty)
    )


def made_up_values(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A block's arguments for a trial: made-up tensors in the place of each `TensorLike`."""
    return {
        name: made_up(value.shape, value.dtype, device) if isinstance(value, TensorLike) else value
        for name, value in given.items()
    }


def _are_tensors(value: Any) -> bool:
    tensors = isinstance(value, tuple) and all(isinstance(each, TensorLike) for each in value)
    return tensors and len(value) > 0


def _described(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_described, value))
    return TensorLike(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _layout(stream: Tensor) -> tuple[str, int]:
    """The stream's layout and width; of four axes the two that are alike are the image's."""
    if stream.dim() != 4:
        return "BNC", stream.shape[-1]
    if stream.shape[2] == stream.shape[3] != stream.shape[1]:
        return "BCHW", stream.shape[1]
    return "BHWC", stream.shape[3]


def _call_form(q: torch.Size, value_dim: int, width: int) -> tuple[str, int, int]:
    """The form of one image's attention call, its heads, and its windows."""
    if len(q) == 3:
        heads = max(width // value_dim, 1)
        return "(BH)ND", heads, q[0] // heads
    if len(q) == 5:
        heads_last = q[2] * value_dim == width and q[1] * value_dim != width
        return ("BWHND", q[2], q[1]) if heads_last else ("BHWND", q[1], q[2])
    return "BHND", q[-3], q[0]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has no matrix, and so leaves the mixing of channels to the next one."""
    return all(p.dim() < 2 for p in module.parameters())
