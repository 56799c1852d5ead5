"""Visual Prompt Tuning over an unchanged backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcx.arguments import real_number, whole_number
from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec, check_promptable
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel, check_choice
from pcx.models.parts import biases_of, cls_token_of
from pcx.models.record import Condensation
from pcx.models.vpt.block import PATHS, PromptedBlock
from pcx.models.vpt.locations import LOCATIONS, pixel_prompts
from pcx.models.vpt.pools import OF_PROMPTS, Pooled, check_pool, check_read_prompts
from pcx.models.vpt.prompts import counts_per_layer, draw_prompts
from pcx.models.vpt.prototypes import INITS, prototypes
from pcx.models.vpt.sources import OwnPrompts, SharedPrompts, shared_prompts
from pcx.models.vpt.variants import Variant, check_stages
from pcx.models.vpt.wrapping import wrap_blocks

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
        depth: which layers have prompts: a slice, or k for the first k and -k for the last; all by
            default. Prompts' outputs are dropped behind the last of them too.
        location: "prepend"; "add" and "add-one" add a prompt for each patch token, or one for all,
            to the tokens before each layer; "prepend-pixel" and "concat-channel" enter before the
            patch embedding (kind "shallow"). For all but the two of "prepend" num_prompts is 0.
        share: "intra": a layer's prompts are all alike; "inter": all layers have the same; "all".
        init: "published", or "cls-prototype" or "patch-prototype" by `images`.
        images: a loader for the prototypes.
        project: width of numbers that one linear layer turns into the prompts of all layers.
        pool: what the head reads: "cls", or the mean of "image", "prompt" or "global" tokens.
        freeze_prompts: leave the prompts as they are drawn (Prompt-Fixed).
        learn_cls: train a copy of the backbone's [CLS] token.
        bias: train copies of the backbone's biases (VPT+Bias).
        merging: of kind "shallow" over Swin: prompts are dropped where patches are merged ("drop"),
            or each is merged with copies of itself, as in the paper's code ("merge").

    Raises:
        ValueError: an argument is out of range, two have no meaning together, or the backbone's
            family is not supported.

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
        depth: slice | int | None = None,
        location: str = "prepend",
        share: str | None = None,
        init: str = INITS[0],
        images: Any = None,
        project: int | None = None,
        pool: str = "cls",
        freeze_prompts: bool = False,
        learn_cls: bool = False,
        bias: bool = False,
        merging: str = "drop",
    ):
        check_choice("kind", kind, KINDS)
        check_choice("init", init, INITS)
        variant = Variant(location, share, project, pool, freeze_prompts, learn_cls, bias, merging)
        variant.check(kind, init)
        if (images is None) != (init == "published"):
            raise ValueError(
                f"images: {'none' if images is None else 'a loader'}, and init={init!r}; "
                "prototypes need a loader of images, and nothing else does"
            )
        if dropout_groups is not None:
            dropout_groups = whole_number("dropout_groups", dropout_groups, 1)
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        check_stages(self.backbone, self.spec, kind, path, variant, init)
        self.kind = kind
        self.variant = variant
        self.dropout_groups = dropout_groups
        self.read_only = read_only
        check_pool(self.spec, pool)
        if self.spec.no_blocks is not None:
            check_promptable(self.backbone, self.spec)
        counts = counts_per_layer(num_prompts, len(self.spec.blocks), kind, depth)
        chosen = depth is not None or not isinstance(num_prompts, int)
        token_paths = check_promptable(self.backbone, self.spec, counts if chosen else None)
        check_read_prompts(pool, counts, kind)
        self.prompts = self._new_prompts(counts)
        if init != "published":
            self._start_from(prototypes(self.backbone, self.spec, images, init, counts))
        wrap_blocks(self, token_paths)
        self._own_parts()
        self.set_dropout(dropout)
        self.path = path or ("concat" if kind == "shallow" else "folded")
        self.train(backbone.training)

    def _check_fits(self) -> None:
        attention.fuse(self.backbone)

    def _new_prompts(self, counts: list[int]) -> OwnPrompts | SharedPrompts:
        """The prompts of each layer, drawn as published."""
        variant, like = self.variant, next(self.backbone.parameters())
        if not LOCATIONS[variant.location].among and any(counts):
            raise ValueError(
                f"num_prompts: {max(counts)}, and location={variant.location!r} has as many "
                "numbers as its place needs; give 0"
            )
        if variant.location == "prepend-pixel":
            return pixel_prompts(self, counts)
        draw = partial(draw_prompts, spec=self.spec, kind=self.kind, like=like)
        if variant.share is None and variant.project is None:
            blocks = zip(counts, self.spec.blocks, strict=True)
            return OwnPrompts(draw(m, block) for m, block in blocks)
        first = self.spec.blocks[0]
        return shared_prompts(
            counts,
            first.dim,
            lambda m, width: draw(m, first, width=width),
            share=variant.share,
            project=variant.project,
        )

    @torch.no_grad()
    def _start_from(self, found: Sequence[Tensor]) -> None:
        for prompts, start in zip(self.prompts, found, strict=True):
            prompts.copy_(start)

    def _own_parts(self) -> None:
        """Puts into the backbone what the variant has there, and takes what it trains."""
        variant = self.variant
        LOCATIONS[variant.location].set_up(self)
        if variant.pool != "cls":
            last, norm = self.layers[-1], str(self.spec.norm)
            last.keeps_prompts = variant.pool in OF_PROMPTS
            pooled = Pooled(
                self.backbone.get_submodule(norm), variant.pool, self.spec.prefix_tokens, last
            )
            self.backbone.set_submodule(norm, pooled)
        if variant.learn_cls:
            self.own(cls_token_of(self.backbone, self.spec))
        if variant.bias:
            self.own(keep=biases_of(self.backbone).__contains__)
        if variant.freeze_prompts:
            for name, parameter in self.named_parameters():
                if name.startswith(("prompts.", "added.", "channel.")):
                    parameter.requires_grad_(False)

    @property
    def counts(self) -> tuple[int, ...]:
        """Prompts per layer."""
        return tuple(map(self.prompts.count, range(len(self.prompts))))

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
            layer.path = "concat" if layer.keeps_prompts else path

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

    def features(
        self,
        x: Tensor,
        layers: int | Sequence[int] | None = None,
        norm: bool = False,
        **inputs: Any,
    ) -> list[Tensor]:
        """As `TunedModel.features`; with a `pool` the last norm gives one token, and no map."""
        if norm and self.variant.pool != "cls":
            raise ValueError(
                f"norm: True, and pool={self.variant.pool!r} leaves no map behind the last norm; "
                "use norm=False"
            )
        return super().features(x, layers, norm, **inputs)

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
            ValueError: the layers do not match, an index is out of range or no whole number, or
                the layers share their prompts and keep others.
        """
        layers = kept if isinstance(kept, Sequence) else ()
        if len(layers) != len(self.prompts):
            raise ValueError(f"kept: {len(layers)} layers, expected {len(self.prompts)}")
        small, places = self.copy(), []
        for i, index in enumerate(kept):
            given = index.tolist() if hasattr(index, "tolist") else index
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise ValueError(f"kept: layer {i}: {given!r}, expected a list of indices")
            most = self.counts[i] - 1
            rows = [whole_number(f"kept: layer {i}", row, most=most) for row in given]
            if rows != sorted(set(rows)):
                raise ValueError(f"kept: layer {i}: {rows}, expected ascending ones, none twice")
            places.append(torch.tensor(rows, dtype=torch.int64))
        check_read_prompts(self.variant.pool, list(map(len, places)), self.kind)
        small.prompts.keep(places)
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
            **self.variant.as_json(),
        }

    @classmethod
    def from_config(cls, backbone: nn.Module, config: Mapping[str, Any]) -> VPT:
        """A VPT of this configuration over a backbone with any head; its weights are to be set."""
        settings = dict(config)
        return super().from_config(backbone, {"num_prompts": settings.pop("counts"), **settings})

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """A backbone for inference alone; keys and values of prompts that fold are constants.

        Others stay tokens: those of kind "shallow", and of a last layer whose prompts are read.
        """
        copied = self.copy().eval().requires_grad_(False)
        if self.folds:
            copied.path = "folded"
        for layer in copied.layers:
            if layer.path == "folded":
                layer.make_constant(layer.constants_of_prompts())
        for module in copied.backbone.modules():
            if hasattr(module, "take_in"):
                module.take_in()
        if not self.folds or self.layers[-1].keeps_prompts:
            copied.backbone.tokens_of_prompts = copied.prompts  # moves with the backbone now
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
