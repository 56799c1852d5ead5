"""Models for inference alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pcx.backbones.memory import over_same_memory
from pcx.backbones.outputs import logits_of
from pcx.backbones.patches import PatchProduct
from pcx.backbones.residual import Wrapper, unwrapped
from pcx.backbones.spec import BackboneSpec, find_spec
from pcx.backbones.straight import Straight, is_watched, straightened
from pcx.models.base import TunedModel, check_choice, check_module
from pcx.models.block_forward import StandIn, without_stand_ins
from pcx.models.head_reads import run_for_head
from pcx.models.peft_model import is_peft, known_by, tuned
from pcx.models.record import Record
from pcx.training.execution import EXECUTIONS, compiled, prepared
from pcx.training.precision import AMP, cast_weights

GRAPHS = 8  # shapes of batches that a frozen model records


class Frozen(nn.Module):
    """A tuned model, or several on one backbone, for inference.

    `pcx.freeze` and `pcx.ensemble` make it.
    """

    record: Record | None = None  # of the tuned model that was frozen
    _run: Any  # what `prepared` gave, None before the first call
    _made_at: int  # of StandIn.changes

    def __init__(
        self, backbone: nn.Module, amp: torch.dtype | None = None, execution: str = "auto"
    ):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.amp = amp
        self.execution = execution
        self.training = False
        self._forget()

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Images [B, 3, H, W], or what the backbone takes -> logits [B, C], or features [B, D].

        The logits are the caller's own: no later call overwrites them.
        """
        device = next(t.device for t in tree_leaves((x, inputs)) if isinstance(t, Tensor))
        if not self._runs_alone(device, x):
            return self._logits(self.backbone, x, **inputs)
        if self._run is None or self._made_at != StandIn.changes:
            self._made_at = StandIn.changes
            called = compiled(self.backbone, self.execution)
            compute = torch.no_grad()(partial(self._logits, called))
            self._run = prepared(lambda: compute, device, self.execution, GRAPHS)
        return self._run(x, **inputs)

    def _runs_alone(self, device: torch.device, x: Any) -> bool:
        """Whether a call is a plain one: neither differentiated nor part of a larger recording."""
        if self.execution == "eager" or (self.execution == "auto" and device.type != "cuda"):
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        return not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad)

    def _logits(self, backbone: nn.Module, x: Tensor, **inputs: Any) -> Tensor:
        if self.amp is None:
            return logits_of(run_for_head(backbone, x, **inputs))
        with torch.autocast(x.device.type, self.amp):
            return logits_of(run_for_head(backbone, x, **inputs))

    def _forget(self) -> None:
        """Drops what was recorded or compiled, which holds the memory of the weights."""
        self._run = None
        self._made_at = 0

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()  # weights move
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which record anew."""
        return {**self.__dict__, "_run": None}

    @property
    def pretrained_cfg(self) -> Any:
        """timm's configuration of the backbone, read by `timm.data.resolve_model_data_config`."""
        backbone: Any = unwrapped(self.backbone)
        return backbone.pretrained_cfg

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval mode, as a teacher within a module that is trained does too."""
        return self


@torch.no_grad()
def freeze(model: nn.Module, *, amp: str = "no", execution: str = "auto") -> Frozen:
    """Makes a model for inference; what the method adds becomes constants where it folds.

    The keys and values of a VPT's prompts are computed once and kept as buffers; the prompts and
    their projections are gone. Prompts whose outputs are read, as those of kind "shallow", stay
    tokens. An SCT's map at position "mlp" is folded into the MLP, and the one at "attn" is computed
    with the sum before it and the norm behind it. The patch embedding becomes a matrix product, and
    each block a straight line of calls in which a residual sum and the LayerNorm behind it are one,
    where that is proven to be the same. The backbone's weights are shared with the model's, which
    computes as before. A token reduction that is set up on the model stays.

    Args:
        model: a tuned model or a model of peft; or a timm or Hugging Face model, such as one on
            which a token reduction is set up.
        amp: "bf16" or "fp16" to compute in autocast with the weights of linear and convolutional
            layers cast once, which autocast does anew in every call and to the same bits. The cast
            weights are the frozen model's own. "no" leaves precision to the caller.
        execution: "auto" records the model in a CUDA graph for each of the first `GRAPHS` shapes of
            batches on CUDA, and runs it eagerly elsewhere. "eager" and "cuda-graph" ask for one of
            the two. "compile" compiles the model before. Small batches may be computed by other
            kernels when recorded, which changes rounding. Exchange no module of a frozen model
            after its first call: a recording does not see it.

    Returns:
        A module that maps images to logits as the model does in eval mode, to rounding. It has no
        parameter that requires a gradient, and cannot be put into training mode.

    Raises:
        ValueError: the model is neither tuned nor a backbone, it is frozen already, amp is none of
            the three, or there is no such execution.

    Example:
        >>> deployed = pcx.freeze(model)
        >>> logits = deployed(images)
    """
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    check_choice("execution", execution, EXECUTIONS)
    dtype = AMP[amp]
    backbone, spec = _deployed(model)
    make_fast(backbone, spec, dtype)
    frozen = Frozen(backbone, dtype, execution)
    known = known_by(model)
    frozen.record = None if known is None else copy.deepcopy(known.record)
    return frozen


def _deployed(model: nn.Module) -> tuple[nn.Module, BackboneSpec]:
    """A copy for inference alone, over the same memory, and its spec."""
    check_module("model", model)
    if any(isinstance(module, Straight | PatchProduct) for module in model.modules()):
        raise ValueError("model: it is frozen already; freeze the model that it was made from")
    if isinstance(model, TunedModel) or is_peft(model):
        model = tuned(model)
        return model.deployed(), model.spec
    copied = over_same_memory(model, model.parameters()).eval()
    try:
        with without_stand_ins(copied):
            return copied, find_spec(copied)
    except ValueError as error:
        raise ValueError(
            f"model: a {type(model).__name__}, expected a model of a method of pcx.METHODS, or a "
            f"backbone ({error})"
        ) from error


def make_fast(backbone: nn.Module, spec: BackboneSpec, amp: torch.dtype | None) -> None:
    """Changes a model's own copy for inference: straight blocks, and weights that are cast once."""
    with without_stand_ins(backbone) as stand_ins:
        _straighten(backbone, spec, stand_ins)
    if amp is not None:
        _cast(backbone, amp)


def _straighten(backbone: nn.Module, spec: BackboneSpec, stand_ins: Sequence[StandIn]) -> None:
    """Puts a straight line of calls in the place of each block, and a product in that of patches.

    Blocks that cannot be captured stay as they are. Stand-ins of the others name the new ones.
    """
    backbone = unwrapped(backbone)
    if spec.patch_projection is not None:
        projection = backbone.get_submodule(spec.patch_projection)
        if isinstance(projection, nn.Conv2d) and not is_watched(projection):
            backbone.set_submodule(spec.patch_projection, PatchProduct(projection))
    for block in spec.blocks:
        name, module = block.name, backbone.get_submodule(block.name)
        while isinstance(module, Wrapper):
            name, module = f"{name}.{module.holds}", getattr(module, module.holds)
        straight = straightened(module, block)
        if straight is None:
            continue
        backbone.set_submodule(name, straight)
        for stand_in in stand_ins:
            if stand_in.block is module:
                stand_in.block = straight


def _cast(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Casts what autocast would cast in every call: weights, and what the method put in."""
    cast_weights(backbone, dtype)
    for module in backbone.modules():
        if isinstance(module, Wrapper):
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point() and buffer.dtype != torch.float64:
                    setattr(module, name, buffer.to(dtype))
