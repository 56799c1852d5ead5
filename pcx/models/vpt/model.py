"""Visual Prompt Tuning over an unchanged backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcx.arguments import real_number, whole_number
from pcx.backbones import attention
from pcx.backbones.probing import without_hooks
from pcx.backbones.spec import BackboneSpec, check_promptable
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel, check_choice
from pcx.models.record import Condensation
from pcx.models.vpt.block import PATHS, PromptedBlock
from pcx.models.vpt.prompts import counts_per_layer, draw_prompts, prompt_parameter

KINDS = ("deep", "shallow", "prefix")


class VPT(TunedModel):
    """Visual Prompt Tuning of a frozen vision transformer (VPT paper, Sec. 3.2).

    "deep" puts m learnable prompts before every layer and drops their outputs (Eq. 7),
    [x_i, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]); "shallow" puts them before the first layer and
    lets them travel (Eq. 4-6); "prefix" learns keys and values instead of tokens (VPT-Prefix).

    On the path "folded" the prompts enter as m extra keys and values of each layer's attention,
    computed once per step for the whole batch, which is exactly the same function; "concat" is the
    literal published form. Without gradients a batch of few tokens takes the concatenated form on
    the path "folded" too, where that takes less time. The frozen weights lie in the same memory as
    `backbone`'s until either is moved or converted (move the backbone first to share it among
    several VPTs); its modules, modes and flags are not touched. VPT keeps its own copy of the head.

    Args:
        backbone: a vision transformer of timm, Hugging Face or open_clip.
        num_prompts: prompts per layer, or a sequence with one count per layer; 0 is allowed.
        kind: "deep", "shallow" or "prefix".
        dropout: share of prompt elements dropped in training; the paper's code has 0.1 for deep.
            Each sample draws its own mask, as published.
        dropout_groups: draw this many masks per batch instead, each shared by neighbouring samples:
            as many times fewer keys and values to compute; the expectation is the same, but the
            samples of a group share their noise.
        path: "folded" or "concat"; by default folded where the kind allows it.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" draws the head anew (0.02; bias zero), "published" as the VPT
            paper's code does (kaiming-normal, fan-out; bias -log 99), whose first steps are rough
            for few classes; "keep" starts from the backbone's own head.
        read_only: compute only the tokens that the head reads in the last block of the folded path,
            where that is exact (pooling by [CLS]) and saves time (not of small batches).

    Raises:
        ValueError: an argument is out of range, or the backbone's family is not supported.

    Example:
        >>> backbone = timm.create_model("vit_base_patch16_224", num_classes=196)
        >>> model = pcx.VPT(backbone, num_prompts=200)
        >>> logits = model(images)  # [B, 3, 224, 224] -> [B, 196]
    """

    method = "vpt"

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
        head_init: str = HEAD_INITS[0],
        read_only: bool = True,
    ):
        check_choice("kind", kind, KINDS)
        if dropout_groups is not None:
            dropout_groups = whole_number("dropout_groups", dropout_groups, 1)
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        self.kind = kind
        self.dropout_groups = dropout_groups
        self.read_only = read_only
        like = next(self.backbone.parameters())
        counts = counts_per_layer(num_prompts, len(self.spec.blocks), kind)
        self.prompts = nn.ParameterList(draw_prompts(m, self.spec, kind, like) for m in counts)
        self._wrap_blocks()
        self.set_dropout(dropout)
        self.path = path or ("concat" if kind == "shallow" else "folded")
        self.train(backbone.training)

    def _check_fits(self) -> None:
        attention.fuse(self.backbone)
        check_promptable(self.backbone, self.spec)

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
        check_choice("path", path, PATHS)
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
        return self.spec.blocks_in(self.backbone)

    @property
    def anatomy(self) -> BackboneSpec:
        """`spec`, under the name that it had before pcx had other methods."""
        return self.spec

    @property
    def adds_tokens(self) -> bool:
        """Whether prompts are among the image's tokens."""
        return self.path == "concat"

    @property
    def trained_lr(self) -> float | None:
        """The learning rate of the training, recorded by fit and read by condense."""
        return self.record.trained_lr

    @trained_lr.setter
    def trained_lr(self, lr: float | None) -> None:
        self.record.trained_lr = lr

    @property
    def condensation(self) -> Condensation | None:
        """How `pcx.condense` made the model, None of one that it did not make."""
        return self.record.condensation

    @condensation.setter
    def condensation(self, found: Condensation | None) -> None:
        self.record.condensation = found

    def train(self, mode: bool = True) -> VPT:
        """Sets the mode of prompts and head; the backbone stays in eval mode, as published."""
        super().train(mode)
        for layer in self.layers:
            layer.training = mode
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        for layer in self.layers:
            layer.checkpoint = enable

    def set_dropout(self, dropout: float) -> None:
        """Changes the share of prompt elements dropped in training."""
        self.dropout = dropout = real_number("dropout", dropout, least=0, below=1)
        for layer in self.layers:
            layer.dropout = dropout

    def keep(self, kept: Sequence[Tensor | Sequence[int]]) -> VPT:
        """A new VPT with only some prompts, over the same backbone's memory.

        Args:
            kept: per layer, the indices of the prompts to keep, ascending, none twice.

        Raises:
            ValueError: the layers do not match, or an index is out of range or no whole number.
        """
        layers = kept if isinstance(kept, Sequence) else ()
        if len(layers) != len(self.prompts):
            raise ValueError(f"kept: {len(layers)} layers, expected {len(self.prompts)}")
        small = self.copy()
        for i, index in enumerate(kept):
            prompts = self.prompts[i].detach()
            given = index.tolist() if hasattr(index, "tolist") else index
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise ValueError(f"kept: layer {i}: {given!r}, expected a list of indices")
            most = prompts.shape[-2] - 1
            rows = [whole_number(f"kept: layer {i}", row, most=most) for row in given]
            if rows != sorted(set(rows)):
                raise ValueError(f"kept: layer {i}: {rows}, expected ascending ones, none twice")
            places = torch.tensor(rows, dtype=torch.int64, device=prompts.device)
            small.prompts[i] = prompt_parameter(prompts.index_select(-2, places))
        return small

    def config(self) -> dict[str, Any]:
        """What `from_config` needs besides the backbone and the weights, as JSON."""
        return {
            **super().config(),
            "counts": list(self.counts),
            "kind": self.kind,
            "dropout": self.dropout,
            "dropout_groups": self.dropout_groups,
            "path": self.path,
            "read_only": self.read_only,
        }

    @classmethod
    def from_config(cls, backbone: nn.Module, config: Mapping[str, Any]) -> VPT:
        """A VPT of this configuration over a backbone with any head; its weights are to be set."""
        settings = dict(config)
        return super().from_config(backbone, {"num_prompts": settings.pop("counts"), **settings})

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """A backbone for inference alone, whose prompts' keys and values are constants.

        Raises:
            ValueError: the prompts do not fold (kind "shallow").
        """
        self.check_folds()
        copied = self.copy().eval()
        copied.path = "folded"
        for layer in copied.layers:
            layer.make_constant(layer.constants_of_prompts())
        return copied.backbone

    @property
    def folds(self) -> bool:
        """Whether prompts can become constants: not those of kind "shallow"."""
        return self.kind != "shallow"

    def check_folds(self, name: str = "model") -> None:
        """Raises a ValueError where prompts cannot become constants; `name` is the argument's."""
        if not self.folds:
            raise ValueError(
                f"{name}: the prompts of kind='shallow' do not fold: their outputs travel on"
            )

    def _wrap_blocks(self) -> None:
        for i, spec in enumerate(self.spec.blocks):
            block: Any = self.backbone.get_submodule(spec.name)
            checkpoint = getattr(block, "gradient_checkpointing", False)
            if checkpoint:  # Hugging Face re-runs its layers outside of ours
                block.gradient_checkpointing = False
            with without_hooks(block):
                module = self.backbone.get_submodule(spec.attention)
                attention.route(block, module, spec.calls, spec.dim, spec.needs)
            wrapped = PromptedBlock(
                block,
                i,
                self.prompts,
                kind=self.kind,
                dropout_groups=self.dropout_groups,
                calls=spec.calls,
                head_dims=(spec.heads, spec.head_dim, spec.value_dim),
                needs=spec.needs,
                prefix_tokens=self.spec.prefix_tokens,
                read_tokens=self.spec.read_tokens if self.read_only else None,
                last=i == len(self.spec.blocks) - 1,
            )
            wrapped.checkpoint = checkpoint
            self.backbone.set_submodule(spec.name, wrapped)
        if self.spec.blocks:
            last = self.layers[-1]
            last.seen_by = (last, *last.block.modules(), *self._seeing_the_last())

    def _seeing_the_last(self) -> list[nn.Module]:
        """The modules, but for the backbone itself, that the last block's tokens go through."""
        parts = self.spec.blocks[-1].name.split(".")
        around = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        behind = [] if self.spec.norm is None else [self.spec.norm]
        return [self.backbone.get_submodule(name) for name in (*around, *behind)]
