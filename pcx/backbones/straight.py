"""Blocks as straight lines of calls, for inference alone.

A block's forward in Python walks through modules that do nothing in eval mode, asks for switches,
and adds, norms and casts in passes of their own. `straightened` captures the same computation by
`torch.fx`: its matrix products are the block's own modules, and a residual sum with the LayerNorm
that reads it is one call.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pcx.backbones import attention
from pcx.backbones.probing import BlockSpec, TensorLike, made_up_values
from pcx.backbones.residual import HOOKS, SumReader, Wrapper
from pcx.ops.add_layer_norm import add_layer_norm

# torch.fx exchanges methods of nn.Module while it traces, so that one thread traces at a time.
_TRACING = threading.Lock()
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Straight(Wrapper):
    """Runs a block of a backbone as the straight line of calls that was captured from it.

    Its attention calls can be handed over as those of a routed block.

    Args:
        block: the block, whose modules and parameters the calls use.
        source: Python of a function `forward(self, x, ...)`, where `self` is the block; or, with
            `given`, this module, and the dots are the given tensors.
        names: what the source refers to besides.
        given: arguments besides x with which the block was captured, by name: a `TensorLike`, or
            the value itself. Calls with others run the block as it is.
    """

    holds = "block"
    block: Any
    _run: Callable[..., Tensor]

    def __init__(
        self,
        block: nn.Module,
        source: str,
        names: dict[str, Any],
        given: dict[str, Any] | None = None,
    ):
        super().__init__(block)
        self._source, self._names, self._given = source, names, given
        self._positional = tuple(inspect.signature(type(block).forward).parameters)[2:]
        self._read()
        setattr(self, attention.ROUTED, True)
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the block gives."""
        if self._given is None:
            return self._run(self.block, *args, **kwargs)
        tensors = self._as_given(self._given, args, kwargs)
        if tensors is not None:
            return self._run(self, *tensors)
        if torch.compiler.is_compiling():
            return self.block(*args, **kwargs)
        with attention.unrouted():
            return self.block(*args, **kwargs)

    def _as_given(self, given: dict[str, Any], args: tuple, kwargs: dict) -> list[Tensor] | None:
        """x and the tensors of a call whose arguments are as those of the capture, else None."""
        passed = {**dict(zip(self._positional, args[1:], strict=False)), **kwargs}
        if not args or passed.keys() != given.keys():
            return None
        tensors = [args[0]]
        for name, expected in given.items():
            value = passed[name]
            if isinstance(value, Tensor) != isinstance(expected, TensorLike):
                return None
            if isinstance(value, Tensor):
                tensors.append(value)
            elif value != expected:
                return None
        return tensors

    def _read(self) -> None:
        names = {"torch": torch, **self._names}
        exec(compile(self._source, f"<straight {type(self.block).__name__}>", "exec"), names)
        self._run = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._read()


@torch.no_grad()
def straightened(block: nn.Module, spec: BlockSpec) -> Straight | None:
    """The same block as a straight line of calls, or None where it cannot be captured.

    It is captured for any arguments; or, where its forward asks what they are, for those that the
    backbone passes to it. It is proven on made-up tokens that both make the same attention calls
    and compute the same: on a few tokens of two sizes, or on the backbone's number of tokens where
    it is given tensors that belong to them, such as rotations.

    Args:
        block: in eval mode; not changed.
        spec: what is known of it.
    """
    if any(module.training or is_watched(module) for module in block.modules()):
        return None
    few = attention.made_up_tokens(block, spec.dim)
    trials = [few, torch.cat([few, few.flip(1)], 1).expand(2, -1, -1)]
    captured = _captured(block, block, None)
    if captured is not None and _is_proven(block, captured, spec.calls, trials, {}):
        return captured
    given = dict(zip(spec.arguments, spec.values, strict=True))
    simple = all(v is None or isinstance(v, TensorLike | bool | int | str) for v in given.values())
    if not given or not simple or len(spec.stream) != 3:
        return None
    captured = _captured(block, _caller(block, given), given)
    if captured is None:
        return None
    passed = made_up_values(given, few.device)
    if any(isinstance(value, Tensor) for value in passed.values()):
        whole = attention.made_up(spec.stream, few.dtype, few.device)
        trials = [whole, torch.cat([whole, whole.flip(1)])]
    return captured if _is_proven(block, captured, spec.calls, trials, passed) else None


def _caller(block: nn.Module, given: dict[str, Any]) -> nn.Module:
    """A module that holds the block and calls it with the given values and tensors of its own."""
    tensors = [name for name, value in given.items() if isinstance(value, TensorLike)]
    values = {name: value for name, value in given.items() if name not in tensors}
    passed = ", ".join(f"{name}={name}" for name in tensors)
    source = (
        f"def forward({', '.join(['self', 'x', *tensors])}):\n"
        f"    return self.block(x, {passed}{', ' if passed else ''}**values)\n"
    )
    names: dict[str, Any] = {"values": values}
    exec(source, names)
    made = type("Caller", (nn.Module,), {"forward": names["forward"]})()
    made.block = block
    return made.eval()


def _captured(block: nn.Module, root: nn.Module, given: dict[str, Any] | None) -> Straight | None:
    """A capture of the forward of `root`, which is the block or calls it."""
    try:
        with _TRACING:
            graph = _Tracer().trace(root)
    except Exception:  # whatever a forward does that depends on values
        return None
    _hand_over(graph)
    _fuse_norms(root, graph)
    _hand_sums_over(root, graph)
    for node in graph.nodes:
        node.type = None  # annotations would be among the names
    _drop_unread(graph)
    code = graph.python_code("self")
    # Modules cannot be pickled; the one that is needed is torch, which `Straight` knows.
    names = {n: v for n, v in code.globals.items() if not isinstance(v, ModuleType)}
    return Straight(block, code.src, names, given)


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward of its own instance, which a capture would miss."""
    if any(getattr(module, name, None) for name in HOOKS):
        return True
    forward = vars(module).get("forward")
    return forward is not None and not isinstance(forward, attention.Routed)


class _Tracer(fx.Tracer):
    """Leaves out modules that give their input back in eval mode.

    What is computed from buffers becomes calls, as buffers move and change. Models that other
    threads run meanwhile are left alone.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not self._is_the_block_s(a):
            raise ValueError("a tensor that the forward makes anew would become a constant")
        return super().create_arg(a)

    def _is_the_block_s(self, a: Tensor) -> bool:
        held = *self.root.parameters(), *self.root.buffers(), *self.tensor_attrs
        return any(a is each for each in held)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SumReader) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if type(m) in (nn.Identity, *_DROPOUTS) and not m.training:
            return args[0]
        return super().call_module(m, forward, args, kwargs)


def _hand_over(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            node.target = attention.routed_call


def _drop_unread(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        reads = node.op == "get_attr" or node.target in (getattr, operator.getitem)
        if reads and not node.users:
            graph.erase_node(node)


def _fuse_norms(block: nn.Module, graph: fx.Graph) -> None:
    """Puts one call in the place of a LayerNorm that linear layers read, and of the sum before."""
    for node in list(graph.nodes):
        norm = _norm_of(block, node)
        if norm is None or not all(_reads_narrow(block, user) for user in node.users):
            continue
        x, weight, bias, eps = norm
        added = _is_sum(x)
        with graph.inserting_before(node):
            weight, bias = (t if t is None else graph.get_attr(t) for t in (weight, bias))
            terms = x.args if added else (x, None)
            both = graph.call_function(add_layer_norm, (*terms, weight, bias, eps))
            if added:
                total = graph.call_function(operator.getitem, (both, 0))
            normed = graph.call_function(operator.getitem, (both, 1))
        node.replace_all_uses_with(normed)
        graph.erase_node(node)
        if added and _is_first(x, both):
            x.replace_all_uses_with(total)
            graph.erase_node(x)


def _hand_sums_over(block: nn.Module, graph: fx.Graph) -> None:
    """Puts one call in the place of a residual sum and the `SumReader` that reads it first."""
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        if not isinstance(block.get_submodule(str(node.target)), SumReader):
            continue
        x = node.args[0]
        if not _is_sum(x) or len(node.args) > 1 or node.kwargs:
            continue
        with graph.inserting_before(node):
            reader = graph.get_attr(str(node.target))
            both = graph.call_method("read_sum", (reader, *x.args))
            total, read = (graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
        if not all(bool(both < user) for user in x.users if user is not node):
            raise ValueError("a residual sum is read before the module that changes it")
        node.replace_all_uses_with(read)
        graph.erase_node(node)
        x.replace_all_uses_with(total)
        graph.erase_node(x)


def _is_sum(x: Any) -> bool:
    """Whether a node is the sum of two others that are no parameters."""
    added = isinstance(x, fx.Node) and x.op == "call_function" and not x.kwargs
    # A sum with a parameter may spread it over tokens, which the one call does not.
    return (
        added
        and x.target in (operator.add, torch.add)
        and all(isinstance(term, fx.Node) and term.op != "get_attr" for term in x.args)
    )


def _is_first(x: fx.Node, both: fx.Node) -> bool:
    """Whether everything that reads a sum comes behind the call that gives it now."""
    return all(bool(both < user) for user in x.users)


_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")  # of F.layer_norm


def _norm_of(block: nn.Module, node: fx.Node) -> Any:
    """(input, name of weight, name of bias, eps) of a LayerNorm over the last dimension."""
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
            return None
        names: Any = [
            f"{node.target}.{n}" if getattr(module, n) is not None else None
            for n in ("weight", "bias")
        ]
        return node.args[0], *names, module.eps
    if node.target is not F.layer_norm:
        return None
    given: dict[str, Any] = dict(zip(_LAYER_NORM, node.args, strict=False))
    given |= node.kwargs
    names = [given.get("weight"), given.get("bias")]
    if any(isinstance(n, fx.Node) and n.op != "get_attr" for n in names):
        return None
    if len(given["normalized_shape"]) != 1 or not isinstance(given["input"], fx.Node):
        return None
    targets = [n if n is None else n.target for n in names]
    return given["input"], *targets, given.get("eps", 1e-5)


def _reads_narrow(block: nn.Module, node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape, or is a linear layer, whose input autocast casts."""
    if node.target is getattr:
        return str(node.args[1]) == "shape"
    if node.op != "call_module":
        return False
    return type(block.get_submodule(str(node.target))) is nn.Linear


def _is_proven(
    block: nn.Module,
    captured: nn.Module,
    expected: int,
    trials: Sequence[Tensor],
    passed: dict[str, Any],
) -> bool:
    try:
        for x in trials:
            runs = [_run(each, expected, x, passed) for each in (block, captured)]
            (found, calls), (again, captured_calls) = runs
            if not _is_close(found, again) or len(calls) != len(captured_calls):
                return False
            for a, b in zip(calls, captured_calls, strict=True):
                if a.scale != b.scale or not all(map(_is_close, (a.q, a.k, a.v), (b.q, b.k, b.v))):
                    return False
    except Exception:  # a captured forward may fail on anything but what it was captured for
        return False
    return True


def _run(
    block: nn.Module, expected: int, x: Tensor, passed: dict[str, Any]
) -> tuple[Tensor, list[attention.Call]]:
    calls: list[attention.Call] = []

    def attend(_: int, call: attention.Call) -> Tensor:
        calls.append(call)
        return call.v if call.v.shape == call.q.shape else call.empty_output()

    return attention.run(block, expected, attend, x, **passed), calls


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, which a fused sum may change."""
    info = torch.finfo(a.dtype)
    tolerance = (100 if info.bits >= 32 else 4) * info.eps
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
