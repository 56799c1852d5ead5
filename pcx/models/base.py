"""The base of all tuned models: a frozen backbone, and what a method adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import timm.data
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones.inputs import data_config
from pcx.backbones.memory import over_same_memory
from pcx.backbones.outputs import feature_maps, logits_of, output_of
from pcx.backbones.residual import Wrapper, plain_names
from pcx.backbones.spec import (
    BackboneSpec,
    check_memory,
    check_not_quantised,
    check_unwrapped,
    find_spec,
    library_facts,
)
from pcx.backbones.towers import with_head
from pcx.models import HEAD_INITS
from pcx.models.block_forward import found_on
from pcx.models.configuration import ConfigMethod
from pcx.models.head_reads import run_for_head
from pcx.models.heads import draw_head, head_size, place_heads, train_in_full
from pcx.models.record import Record

BACKBONE_MODES = ("eval", "train", "drop-path")


class TunedModel(nn.Module):
    """A frozen backbone, and what a method adds to it.

    The frozen weights lie in the same memory as the given backbone's until either is moved or
    converted (move the backbone first to share it among several models). The backbone's modules,
    modes and flags are not touched. The model keeps its own copy of the head. A parameter of the
    backbone that is set to require gradients becomes the model's own too: it is trained in a copy.
    Over a 16-bit backbone the head, and prompts, are float32, so that small updates are not
    rounded away; the logits are float32 then.

    A method is a subclass with a line in `pcx.METHODS`. It sets `method`, adds its parameters
    outside of `self.backbone` or makes parts of it its own with `own`, and says in `config` what
    `from_config` needs. Training, evaluation, saving, loading, freezing, costs and the command
    line then work on it.

    Args:
        backbone: a timm model, a vision model of Hugging Face, or a vision tower of open_clip. One
            without a classifier gets a linear layer behind its features.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" draws the head anew (0.02; bias zero), "published" as the VPT
            paper's code does (kaiming-normal, fan-out; bias -log 99), whose first steps are rough
            for few classes; "keep" starts from the backbone's own head.

    Attributes:
        method: the name in `pcx.METHODS` and in saved files.
        backbone: the model's own copy of the module tree, over the given one's memory.
        spec: what pcx knows of the backbone.
        record: what saving keeps besides the weights.

    Raises:
        ValueError: an argument is out of range, or the backbone's spec was not found.
    """

    method: ClassVar[str]
    backbone_mode: ClassVar[str] = "eval"  # of the backbone in training: one of BACKBONE_MODES
    accepts_loss_kwargs: ClassVar[bool] = False  # what Trainer would pass on to the backbone

    backbone: Any
    spec: BackboneSpec
    record: Record

    def __init__(
        self, backbone: nn.Module, *, num_classes: int | None = None, head_init: str = HEAD_INITS[0]
    ):
        super().__init__()
        check_choice("head_init", head_init, HEAD_INITS)
        check_module("backbone", backbone, "such as timm.create_model gives")
        if num_classes is not None:
            num_classes = whole_number("num_classes", num_classes)
        check_unwrapped(backbone)
        check_not_quantised(backbone)
        check_memory(backbone)
        if isinstance(backbone, TunedModel):
            raise ValueError(
                f"backbone: already a {type(backbone).__name__}; give the backbone it was built on"
            )
        wrapped = next((m for m in backbone.modules() if isinstance(m, Wrapper)), None)
        if wrapped is not None:
            raise ValueError(
                f"backbone: it holds a {type(wrapped).__name__} of another tuned model; give the "
                "backbone that the model was built on"
            )
        self.record = Record()
        copied = over_same_memory(backbone, backbone.parameters()).eval()
        self.backbone = with_head(copied, num_classes)
        self.spec = find_spec(self.backbone)
        self._check_fits()
        self._owned: set[str] = set()  # plain names of the backbone's tensors that are the model's
        place_heads(self.backbone, self.heads)
        for name, head in zip(self.spec.heads, self.heads, strict=True):
            self.own(name)
            train_in_full(head)
            draw_head(head, head_init)
        self._own_what_modes_change()

    def _own_what_modes_change(self) -> None:
        """Makes the backbone's buffers, such as BatchNorm's statistics, own where they change."""
        if self.backbone_mode == "train":
            parts = self._tensors().items()
            self._claim({n: t for n, t in parts if not isinstance(t, nn.Parameter)})

    def _check_fits(self) -> None:
        """Raises a ValueError that says why, where the method has no meaning for the backbone."""

    # What the model is made of.

    @property
    def heads(self) -> list[Any]:
        """The classifier heads, none where the head was removed."""
        return [self.plain_backbone().get_submodule(name) for name in self.spec.heads]

    def own(self, part: str = "", keep: Callable[[str], bool] = lambda name: True) -> None:
        """Makes tensors of the backbone the model's own: cloned, trained, saved and rolled back.

        Args:
            part: dotted name of a module or tensor of the backbone; "" is all of it.
            keep: of a dotted name in the backbone, whether that tensor becomes the model's own.

        Raises:
            ValueError: the backbone has no tensor in that part.
        """
        start = f"backbone.{part}." if part else "backbone."
        found = {n: t for n, t in self._tensors().items() if f"{n}.".startswith(start)}
        if part and not found:
            raise ValueError(
                f"part: the backbone has no tensor in {part!r}; give the dotted name of a tensor, "
                "or of a module that has some"
            )
        self._claim({n: t for n, t in found.items() if keep(n.removeprefix("backbone."))})

    def own_state(self) -> dict[str, Tensor]:
        """The method's parameters and buffers by name: those that are saved, copied, rolled back.

        Names are those of `state_dict` without the wrappers that a method puts around modules of
        the backbone; a tensor of several names has the first of them. The tensors are the model's,
        not copies. A parameter of the backbone that requires gradients becomes the model's own
        here, in memory of its own.
        """
        tensors = self._tensors()
        self._claim({n: t for n, t in tensors.items() if t.requires_grad and not self._is_own(n)})
        return _first_names({n: t for n, t in tensors.items() if self._is_own(n)})

    def frozen_state(self) -> dict[str, Tensor]:
        """The backbone's parameters and saved buffers that are not the model's own.

        Names are those in the plain backbone.
        """
        own = {id(tensor) for tensor in self.own_state().values()}
        return {
            name.removeprefix("backbone."): tensor
            for name, tensor in self._tensors().items()
            if id(tensor) not in own
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by their names without wrappers."""
        plain = plain_names(self)
        return {plain[n]: t for n, t in self.state_dict(keep_vars=True).items()}

    def _claim(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors of the backbone into memory of their own, and parameters into training."""
        for name, tensor in tensors.items():
            if name not in self._owned and isinstance(tensor, nn.Parameter):
                # The parameter itself stays: optimisers hold it, and others may be tied to it.
                tensor.data = tensor.data.clone()
                tensor.requires_grad_()
        self._owned |= set(tensors)

    def _is_own(self, plain: str) -> bool:
        return not plain.startswith("backbone.") or plain in self._owned

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name; none is the given backbone's."""
        self.own_state()
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def plain_backbone(self) -> Any:
        """The backbone without what a library of adapters may have put around it."""
        return self.backbone

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser: matrices and prompts decay, biases and vectors do not."""
        self.own_state()
        return param_groups_weight_decay(self, weight_decay)

    def copy(self) -> Any:
        """A copy over the same frozen memory, whose own tensors are copies."""
        shared = [t for t in self.frozen_state().values() if isinstance(t, nn.Parameter)]
        return over_same_memory(self, shared)

    @property
    def adds_tokens(self) -> bool:
        """Whether what the method adds is among the image's tokens."""
        return False

    # What saving needs.

    def config(self) -> dict[str, Any]:
        """What `from_config` needs besides the backbone and the weights, as JSON."""
        return {"num_classes": self.num_classes}

    def __init_subclass__(cls, **options: Any) -> None:
        """Makes the class's `config` also what Hugging Face's tools expect at that name."""
        super().__init_subclass__(**options)
        if not isinstance(vars(cls).get("config"), ConfigMethod):
            cls.config = ConfigMethod(cls.config)  # type: ignore[assignment,method-assign]

    @classmethod
    def from_config(cls, backbone: nn.Module, config: Mapping[str, Any]) -> Any:
        """A model of this configuration over a backbone with any head; its weights are to be set.

        Raises:
            ValueError: the backbone cannot take the configuration.
        """
        settings = dict(config)
        wanted = settings.pop("num_classes")
        heads = [backbone.get_submodule(name) for name in library_facts(backbone)["heads"]]
        if head_size(heads) == wanted:
            wanted = None  # the head that is there
        return cls(backbone, num_classes=wanted, head_init="keep", **settings)

    @property
    def folds(self) -> bool:
        """Whether `deployed` has a backbone to give, which computes what the model does."""
        return True

    def deployed(self) -> nn.Module:
        """A backbone in eval mode that computes what the model does, for inference alone."""
        return self.copy().eval().backbone

    # What training and users call.

    def forward(
        self, x: Any = None, *, pixel_values: Any = None, labels: Any = None, **inputs: Any
    ) -> Any:
        """Images [B, 3, H, W], or what the backbone takes -> logits [B, C], or features [B, D].

        Called by the names of Hugging Face's models it answers as they do, for their Trainer.

        Args:
            x: the images; the logits themselves are returned.
            pixel_values: the images in place of `x`; an output with `logits` is returned.
            labels: classes [B], or floats [B, C] or [B, 1]; the output has the mean `loss` too.
            inputs: go to the backbone: masks, `interpolate_pos_encoding`, ...
        """
        if (x is None) == (pixel_values is None):
            raise TypeError("x: give the images, as x or as pixel_values")
        images = x if pixel_values is None else pixel_values
        logits = logits_of(run_for_head(self.backbone, images, **inputs))
        if pixel_values is None and labels is None:
            return logits
        return output_of(logits, labels)

    def features(
        self,
        x: Tensor,
        layers: int | Sequence[int] | None = None,
        norm: bool = False,
        **inputs: Any,
    ) -> list[Tensor]:
        """Maps of image tokens behind the blocks, for dense tasks.

        [CLS], registers and prompts are in none of them. Without what the method adds, the maps
        equal timm's `forward_intermediates`.

        Args:
            x: images [B, 3, H, W].
            layers: indices as timm's: of blocks, of a hierarchical model of stages, negative ones
                from the end; an int n is the last n; None is all.
            norm: whether the backbone's last norm is applied.
            inputs: the backbone's own further arguments.

        Returns:
            A map [B, C, H, W] for each layer.

        Raises:
            ValueError: the backbone has no such maps, or tokens are dropped or merged on the way.
        """
        if found_on(self):
            raise ValueError(
                "model: its tokens are dropped or merged on the way, which leaves no maps; call "
                "remove() of what set that up first"
            )
        try:
            return feature_maps(self.plain_backbone(), self.spec, x, layers, norm, **inputs)
        except AssertionError as error:  # timm's, of indices and of images of another size
            raise ValueError(f"layers: {layers!r}, or x: {tuple(x.shape)}: {error}") from error

    def train(self, mode: bool = True) -> Any:
        """Sets the mode of what the method adds and of the heads; the backbone has its own."""
        super().train(mode)
        if self.backbone_mode != "train":
            self.backbone.eval()
        for module in self.backbone.modules():
            if self.backbone_mode == "drop-path" and type(module).__name__.endswith("DropPath"):
                module.training = mode
        for head in self.heads:
            head.train(mode)
        return self

    @property
    def num_classes(self) -> int:
        """How many logits the model gives, 0 where it gives features."""
        return head_size(self.heads)

    @property
    def pretrained_cfg(self) -> Any:
        """timm's configuration of the backbone, read by `timm.data.resolve_model_data_config`."""
        return self.plain_backbone().pretrained_cfg

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the logits, where they are known."""
        return self.record.class_names

    def transform(self, train: bool = False) -> Callable:
        """timm's transform from a PIL image to what the backbone expects.

        Of a model that was trained on a task it is that of the task's evaluation.

        Args:
            train: with timm's augmentation for training.
        """
        return timm.data.create_transform(**self.image_config(), is_training=train)

    def image_config(self) -> dict[str, Any]:
        """How images are prepared: the task's way where it is known, else the backbone's."""
        return self.record.transform or data_config(self)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What training may change in a model: a tuned model's own state.

    Of any other module these are the parameters that require gradients, and all buffers.
    """
    if isinstance(model, TunedModel):
        return model.own_state()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, _ in model.named_parameters()} - trained
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in frozen}


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out a tensor's second and further names."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


@torch.no_grad()
def copy_state(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Writes tensors into those of the same names."""
    for name, tensor in target.items():
        if name in source:
            tensor.copy_(source[name])


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Puts every module back into the mode, training or eval, in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_module(name: str, value: Any, example: str = "such as pcx.VPT(...) gives") -> None:
    """Raises a ValueError where a value is no model."""
    if not isinstance(value, nn.Module):
        said = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise ValueError(f"{name}: got {said}, expected a model, {example}")


def check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    """Raises a ValueError where a value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {tuple(choices)}")
