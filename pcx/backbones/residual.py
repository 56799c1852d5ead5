"""Interception of modules: the reader of attention's residual sum, the MLP, the attention.

A `Wrapper` takes the place of a module in the model's own copy of a backbone and calls it. No hook
and no mode is left behind: a wrapped model compiles, is copied, pickled and checkpointed as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from pcx.backbones.probing import BlockSpec

# What the hooks of a module's calls lie in.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Wrapper(nn.Module):
    """Holds a module of the backbone and stands in its place.

    Names of the backbone's tensors leave the wrapper out (`plain_name`), so that a wrapped backbone
    has the fingerprint of the one that it was.
    """

    holds: ClassVar[str] = "inner"  # the attribute that holds the module
    inner: Any

    def __init__(self, inner: nn.Module):
        super().__init__()
        setattr(self, self.holds, inner)


class Changing(Wrapper):
    """A wrapper that hands a tensor to `change`, a module that its owner registers.

    Args:
        inner: the module that is wrapped.
        change: a module of the method from a tensor to the tensor to go on with.
    """

    def __init__(self, inner: nn.Module, change: nn.Module):
        super().__init__(inner)
        self._change: tuple[Any] = (
            change,
        )  # in a tuple, so that it is registered once, by its owner

    def take_in(self) -> None:
        """Registers the module here, for a backbone that goes on without its tuned model."""
        self.change = self._change[0]


class OnInput(Changing):
    """Hands a module's first input to `change`, then calls the module.

    `change` may change the tensor in place. At the reader of x + attention(x) the block's next
    residual sum then reads the changed tensor too, since it is the same object (SCT's position
    "attn").
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for the changed input."""
        return self.inner(self._change[0](x), *args, **kwargs)


class SumReader(OnInput):
    """An `OnInput` at the reader of x + attention(x) that can form the sum itself.

    In a frozen model's straight line of calls, the sum, the change and what the module computes are
    then one call.
    """

    def read_sum(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The changed x + y, a new tensor, and what the module gives for it."""
        total = x + y
        return total, self(total)


class OnOutput(Changing):
    """Calls a module, which gives a tensor, then hands that to `change`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The changed output."""
        return self._change[0](self.inner(*args, **kwargs))


def wrap(backbone: nn.Module, block: BlockSpec, part: str, make: Callable[..., Wrapper]) -> Wrapper:
    """Puts `make(module)` in the place of one part of a block and returns it.

    Args:
        backbone: the model's own copy; changed.
        block: of its spec.
        part: "reader", "mlp", "attention" or "before", a field of the block's spec.
        make: from the part's module to the wrapper.

    Raises:
        ValueError: the block has no such part; the message names the block and the part.
    """
    parts = {"reader": block.reader, "mlp": block.mlp, "attention": block.attention}
    parts["before"] = block.before
    name = parts.get(part)
    if name is None or name == block.name:
        raise ValueError(
            f"part: {block.name} has no {part!r} that is a module of its own; its parts are "
            f"{[k for k, v in parts.items() if v not in (None, block.name)]}"
        )
    wrapper = make(backbone.get_submodule(name))
    backbone.set_submodule(name, wrapper)
    return wrapper


def unwrapped(module: Any) -> Any:
    """The module within wrappers."""
    while isinstance(module, Wrapper):
        module = getattr(module, module.holds)
    return module


def plain_names(module: nn.Module, prefix: str = "") -> dict[str, str]:
    """From every name in a module's state to the name without wrappers."""
    found = {}

    def walk(part: nn.Module, name: str, plain: str) -> None:
        for own, _ in (*part._parameters.items(), *part._buffers.items()):
            found[name + own] = plain + own
        for child_name, child in part._modules.items():
            if child is not None:
                held = isinstance(part, Wrapper) and child_name == part.holds
                walk(child, f"{name}{child_name}.", plain if held else f"{plain}{child_name}.")

    walk(module, prefix, prefix)
    return found
