"""Visual Prompt Tuning over an unchanged backbone."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones.spec import dissect
from pcx.models.heads import HEAD_INITS, set_head_size
from pcx.models.memory import over_same_memory
from pcx.models.vpt.block import PATHS, PromptedBlock

KINDS = ("deep", "shallow", "prefix")


class VPT(nn.Module):
    """Visual Prompt Tuning of a frozen vision transformer (VPT paper, Sec. 3.2).

    "deep" puts m learnable prompts before every layer and drops their outputs (Eq. 7),
    [x_i, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]); "shallow" puts them before the first layer and
    lets them travel (Eq. 4-6); "prefix" learns keys and values instead of tokens (VPT-Prefix).

    On the path "folded" the prompts enter as m extra keys and values of each layer's attention,
    computed once per step for the whole batch, which is exactly the same function; "concat" is the
    literal published form. The frozen weights lie in the same memory as `backbone`'s until either
    is moved or converted (move the backbone first to share it among several VPTs); its modules,
    modes and flags are not touched. VPT keeps its own copy of the head.

    Args:
        backbone: a timm vision transformer, or Hugging Face's ...ForImageClassification.
        num_prompts: prompts per layer, or a sequence with one count per layer; 0 is allowed.
        kind: "deep", "shallow" or "prefix".
        dropout: share of prompt elements dropped in training; the paper's code has 0.1 for deep.
            Each sample draws its own mask, as published.
        dropout_groups: draw this many masks per batch instead, each shared by neighbouring samples:
            as many times fewer keys and values to compute; the expectation is the same, but the
            samples of a group share their noise.
        path: "folded" or "concat"; by default folded where the kind allows it.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "published" draws the head anew (kaiming-normal, fan-out; bias -log 99), "keep"
            starts from the backbone's own head.
        read_only: compute only the tokens that the head reads in the last block of the folded path,
            where that is exact (pooling by [CLS]).

    Raises:
        ValueError: an argument is out of range, or the backbone's family is not supported.

    Example:
        >>> backbone = timm.create_model("vit_base_patch16_224", num_classes=196)
        >>> model = pcx.VPT(backbone, num_prompts=200)
        >>> logits = model(images)  # [B, 3, 224, 224] -> [B, 196]
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_prompts: int | Sequence[int],
        *,
        kind: str = "deep",
        dropout: float = 0.0,
        dropout_groups: int | None = None,
        path: str | None = None,
        num_classes: int | None = None,
        head_init: str = "published",
        read_only: bool = True,
    ):
        super().__init__()
        _check_choice("kind", kind, KINDS)
        _check_choice("head_init", head_init, HEAD_INITS)
        if dropout_groups is not None and dropout_groups < 1:
            raise ValueError(f"dropout_groups: {dropout_groups}, expected at least 1, or None")
        if isinstance(backbone, VPT):
            raise ValueError("backbone: already a VPT; give the backbone it was built on")
        self.kind = kind
        self.dropout_groups = dropout_groups
        self.read_only = read_only
        self.trained_lr: float | None = None  # recorded by fit, read by condense
        self.condensation: Any = None  # recorded by condense
        self.backbone = over_same_memory(backbone, backbone.parameters()).eval()
        self.anatomy = dissect(self.backbone)
        if num_classes is not None:
            set_head_size(self.backbone, num_classes)
            self.anatomy = dissect(self.backbone)
        self._own_heads(head_init)
        counts = self._counts_per_layer(num_prompts)
        self.prompts = nn.ParameterList(self._initial(m) for m in counts)
        self._wrap_blocks()
        self.set_dropout(dropout)
        self.path = path or ("concat" if kind == "shallow" else "folded")
        self.train(backbone.training)

    @property
    def counts(self) -> tuple[int, ...]:
        """Prompts per layer."""
        return tuple(prompts.shape[-2] for prompts in self.prompts)

    @property
    def path(self) -> str:
        """ "folded" or "concat"; both compute the same function."""
        return self._path

    @path.setter
    def path(self, path: str) -> None:
        _check_choice("path", path, PATHS)
        if path == "folded" and self.kind == "shallow":
            raise ValueError(
                "path: 'folded' is not possible for kind='shallow': its prompts' outputs travel on "
                "to the next layer; use 'concat'"
            )
        if path == "concat" and self.kind == "prefix":
            raise ValueError("path: kind='prefix' has no tokens to concatenate; use 'folded'")
        self._path = path
        for layer in self.layers:
            layer.path = path

    @property
    def layers(self) -> list[PromptedBlock]:
        """The prompted blocks, first to last."""
        return list(self.backbone.get_submodule(self.anatomy.blocks))

    @property
    def heads(self) -> list[Any]:
        """The classifier heads, none where the head was removed."""
        return [self.backbone.get_submodule(name) for name in self.anatomy.heads]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], or what the backbone takes -> logits [B, C], or features [B, D]."""
        out = self.backbone(x)
        return out.logits if hasattr(out, "logits") else out

    def train(self, mode: bool = True) -> VPT:
        """Sets the mode of prompts and head; the backbone stays in eval mode, as published."""
        super().train(False)
        self.training = mode
        for layer in self.layers:
            layer.training = mode
        for head in self.heads:
            head.train(mode)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        for layer in self.layers:
            layer.checkpoint = enable

    def set_dropout(self, dropout: float) -> None:
        """Changes the share of prompt elements dropped in training."""
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout}, expected 0 <= dropout < 1")
        self.dropout = dropout
        for layer in self.layers:
            layer.dropout = dropout

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: prompts and head."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def keep(self, kept: Sequence[Tensor | Sequence[int]]) -> VPT:
        """A new VPT with only some prompts, over the same backbone's memory.

        Args:
            kept: per layer, the indices of the prompts to keep, ascending.

        Raises:
            ValueError: the layers do not match, or an index is out of range.
        """
        if len(kept) != len(self.prompts):
            raise ValueError(f"kept: {len(kept)} layers, expected {len(self.prompts)}")
        own = {id(p) for p in (*self.prompts, *self.trainable().values())}
        frozen = (p for p in self.parameters() if id(p) not in own)
        small = over_same_memory(self, frozen)
        for i, index in enumerate(kept):
            prompts = self.prompts[i].detach()
            rows = torch.as_tensor(index, dtype=torch.int64, device=prompts.device)
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < prompts.shape[-2]:
                raise ValueError(
                    f"kept: layer {i} has indices {rows.tolist()} for {prompts.shape[-2]} prompts"
                )
            small.prompts[i] = _prompt_parameter(prompts.index_select(-2, rows))
        return small

    def _counts_per_layer(self, num_prompts: int | Sequence[int]) -> list[int]:
        depth = len(self.anatomy.calls)
        one = not isinstance(num_prompts, Sequence)
        try:
            given: Any = [num_prompts] * depth if one else num_prompts
            counts = [operator.index(m) for m in given]
        except TypeError:
            raise ValueError(
                f"num_prompts: {num_prompts!r}, expected a whole number, or one per layer"
            ) from None
        if one and self.kind == "shallow":
            counts[1:] = [0] * (depth - 1)
        if len(counts) != depth:
            raise ValueError(f"num_prompts: {len(counts)} counts for a backbone of {depth} blocks")
        if min(counts) < 0:
            raise ValueError(f"num_prompts: {counts}, expected counts of 0 or more")
        if self.kind == "shallow" and any(counts[1:]):
            raise ValueError(f"num_prompts: {counts}; kind='shallow' has prompts in layer 0 only")
        return counts

    def _initial(self, m: int) -> nn.Parameter:
        """U(-v, v), v = sqrt(6 / (3 * patch height * patch width + D)), as published."""
        like = next(self.backbone.parameters())
        bound = math.sqrt(6 / (self.anatomy.patch_elements + self.anatomy.dim))
        shape: tuple[int, ...] = (m, self.anatomy.dim)
        if self.kind == "prefix":
            (heads, dk, dv) = self.anatomy.heads_dims[0]
            if set(self.anatomy.calls) != {1} or dk != dv:
                raise ValueError("kind: 'prefix' needs one attention call per block with d = dv")
            shape = (2, m, heads * dk)
        return _prompt_parameter(
            torch.empty(shape, device=like.device, dtype=like.dtype).uniform_(-bound, bound)
        )

    def _own_heads(self, init: str) -> None:
        like = next(self.backbone.parameters())
        for head in self.heads:
            for module in head.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    # A new head of an older timm is float32 on the CPU, whatever its backbone is.
                    values = parameter.detach().to(like.device, like.dtype, copy=True)
                    setattr(module, name, nn.Parameter(values))
            if init == "published":
                if not isinstance(head, nn.Linear):
                    raise ValueError(
                        f"head_init: the backbone's head is {type(head).__name__}, which has no "
                        "published initialisation; use head_init='keep'"
                    )
                nn.init.kaiming_normal_(head.weight, mode="fan_out")
                if head.bias is not None:
                    nn.init.constant_(head.bias, -math.log(99))

    def _wrap_blocks(self) -> None:
        blocks = self.backbone.get_submodule(self.anatomy.blocks)
        depth = len(blocks)
        for i in range(depth):
            checkpoint = getattr(blocks[i], "gradient_checkpointing", False)
            if checkpoint:  # Hugging Face re-runs its layers outside of ours
                blocks[i].gradient_checkpointing = False
            blocks[i] = PromptedBlock(
                blocks[i],
                i,
                self.prompts,
                kind=self.kind,
                dropout_groups=self.dropout_groups,
                calls=self.anatomy.calls[i],
                head_dims=self.anatomy.heads_dims[i],
                prefix_tokens=self.anatomy.prefix_tokens,
                read_tokens=self.anatomy.read_tokens if self.read_only else None,
                last=i == depth - 1,
            )
            blocks[i].checkpoint = checkpoint


def _prompt_parameter(values: Tensor) -> nn.Parameter:
    # A layer without prompts has nothing to train, and DDP would wait for its gradient.
    return nn.Parameter(values, requires_grad=values.shape[-2] > 0)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {tuple(choices)}")
