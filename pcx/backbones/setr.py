"""Backbones for semantic segmentation: a vision transformer, and SETR's decoder behind it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones import hugging_face
from pcx.backbones.inputs import input_size
from pcx.backbones.memory import over_same_memory
from pcx.backbones.outputs import last_map
from pcx.backbones.probing import hollow
from pcx.backbones.spec import find_spec, library_facts
from pcx.backbones.towers import Tower, with_head

DECODERS = ("pup", "naive")
CHANNELS = 256  # of the paper's decoders
# What libraries and pcx ask of a backbone, and its transformer answers.
_OF_TOWER = ("pretrained_cfg", "patch_embed", "config", "image_size", "forward_intermediates")


class Decoder(nn.Module):
    """SETR's decoder: from a map of image tokens to logits of pixels (Zheng et al. 2021, Sec. 3.3).

    "pup" (progressive upsampling) norms the tokens, doubles the resolution once per stage after a
    3 x 3 convolution with BatchNorm and ReLU, and ends with a 1 x 1 convolution to the classes.
    "naive" has one such 1 x 1 convolution in place of the stages.

    Args:
        width: channels of the map.
        num_classes: of pixels; 0 leaves the last convolution out.
        stages: of "pup".
        channels: between the convolutions.
        kind: "pup" or "naive".
    """

    def __init__(self, width: int, num_classes: int, stages: int, channels: int, kind: str):
        super().__init__()
        self.kind, self.channels = kind, channels
        self.norm = nn.LayerNorm(width, eps=1e-6)
        size, widths = (3, [width] + [channels] * (stages - 1)) if kind == "pup" else (1, [width])
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(w, channels, size, padding=size // 2, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for w in widths
        )
        self.classifier: nn.Module = nn.Identity()
        self.reset(num_classes)

    @property
    def num_classes(self) -> int:
        """Of pixels, 0 where it gives features."""
        return getattr(self.classifier, "out_channels", 0)

    def reset(self, num_classes: int) -> None:
        """Puts a new last convolution in, or none for 0 classes."""
        like = self.norm.weight
        new: nn.Module = nn.Identity()
        if num_classes:
            new = nn.Conv2d(self.channels, num_classes, 1).to(like.device, like.dtype)
        self.classifier = new

    def draw(self) -> None:
        """Draws all but the last convolution anew."""
        for module in (self.norm, *self.stages.modules()):
            if isinstance(module, nn.LayerNorm | nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, D, h, w] -> logits [B, C, H, W], with H = h * 2**stages for "pup", else h."""
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for stage in self.stages:
            x = stage(x)
            if self.kind == "pup":
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.classifier(x)


class SETR(nn.Module):
    """A vision transformer with SETR's decoder: a class for every pixel.

    It is a backbone as any other, whose head is the decoder: `pcx.VPT(pcx.SETR(backbone, 21), 10)`,
    the other methods but `pcx.MLP` and `pcx.Sidetune`, and training, saving, condensing and
    freezing work on it. A method trains the decoder with what it adds. The decoder reads the last
    block's map of image tokens, behind the norm that the backbone's library applies to all tokens,
    where it has one.

    Args:
        backbone: a model of timm with `forward_intermediates`, or a vision transformer of Hugging
            Face. Its classifier, and all else that the map does not need, is left out. The weights
            are frozen and lie in the same memory as the given backbone's, which is not changed.
        num_classes: of pixels; 0 gives the decoder's features [B, channels, H, W].
        decoder: "pup", progressive upsampling, or "naive", two 1 x 1 convolutions.
        channels: of the decoder between its convolutions; None is the paper's 256, or the width of
            the backbone's map where that is less.

    Attributes:
        tower: the transformer.
        decoder: a `Decoder`.
        stride: pixels from a token of the map to the next, by rows and by columns.

    Raises:
        ValueError: the backbone gives no map of image tokens, or an argument is out of range.

    Example:
        >>> backbone = pcx.SETR(timm.create_model("vit_base_patch16_384", pretrained=True), 150)
        >>> model = pcx.VPT(backbone, num_prompts=10)
        >>> pcx.fit(model, loader, objective="segmentation", epochs=100, lr=0.1)
    """

    global_pool = None  # all image tokens are read

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        decoder: str = DECODERS[0],
        channels: int | None = None,
    ):
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder: got {decoder!r}, expected one of {DECODERS}")
        num_classes = whole_number("num_classes", num_classes)
        channels = None if channels is None else whole_number("channels", channels, 1)
        self.tower: Any = _without_classifier(backbone)
        self.spec = find_spec(self.tower)  # of the transformer alone
        width = self._look_at_map()
        stages = max(1, round(math.log2(max(self.stride))))
        like = next(self.tower.parameters())
        channels = channels or min(CHANNELS, width)
        self.decoder = Decoder(width, num_classes, stages, channels, decoder)
        self.decoder.to(like.device, like.dtype)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """A part of the model, or what the transformer has of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _OF_TOWER:
                raise
        return getattr(self.tower, name)

    @property
    def num_classes(self) -> int:
        """Of pixels, 0 where the decoder gives features."""
        return self.decoder.num_classes

    def get_classifier(self) -> nn.Module:
        """The decoder's last convolution, by timm's name for it."""
        return self.decoder.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Puts a new last convolution in, or none for 0 classes."""
        self.decoder.reset(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay, as timm's models give them."""
        found: set[str] = getattr(self.tower, "no_weight_decay", set)()
        return {f"tower.{name}" for name in found}

    def facts(self) -> dict[str, Any]:
        """Fields of a `BackboneSpec`."""
        facts = library_facts(self.tower)
        return {
            **facts,
            "family": f"SETR of {type(self.tower).__name__}",
            "heads": ("decoder",),
            "listed": tuple(f"tower.{name}" for name in facts["listed"]),
            "read_tokens": None,
            "reads_map": True,
        }

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Images [B, 3, H, W] -> logits of pixels [B, C, H, W]."""
        tokens = last_map(self.tower, self.spec, x, **inputs)
        rows, columns = x.shape[-2:]
        found: Tensor = self.decoder(tokens)
        # The map of an image that the transformer pads, or cuts, is of another size than the image.
        seen = [round(n * step) for n, step in zip(tokens.shape[-2:], self.stride, strict=True)]
        if found.shape[-2:] != tuple(seen):
            found = F.interpolate(found, seen, mode="bilinear", align_corners=False)
        found = found[..., :rows, :columns]
        if found.shape[-2:] == x.shape[-2:]:
            return found
        return F.pad(found, (0, columns - found.shape[-1], 0, rows - found.shape[-2]), "replicate")

    def _look_at_map(self) -> int:
        """The channels of the transformer's map, found on shapes alone.

        `stride` is set to the pixels from a token to the next, by rows and columns. Modules whose
        weights have no part in the map become identities, since nothing could train them.

        Raises:
            ValueError: there is no map.
        """
        model, size = hollow(self.tower).requires_grad_(), input_size(self.tower)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        try:
            with torch.enable_grad():
                image = torch.empty(1, *size, device="meta", dtype=dtype)
                found = last_map(model, self.spec, image)
        except Exception as error:  # a model may fail in any way
            raise ValueError(
                f"backbone: no map of the image tokens of {self.spec.family} was found ({error}); "
                "the column SETR of docs/families.md says which models have one"
            ) from error
        self.stride = (size[1] / found.shape[-2], size[2] / found.shape[-1])
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(found.sum(), list(named.values()), allow_unused=True)
        read = {name for name, grad in zip(named, gradients, strict=True) if grad is not None}
        for name in _without(model, read):
            if self._runs_without(model, name, image):
                self.tower.set_submodule(name, nn.Identity())
        return found.shape[1]

    def _runs_without(self, model: nn.Module, name: str, image: Tensor) -> bool:
        """Leaves a module out of a model of shapes alone, where the map is still computed."""
        before = model.get_submodule(name)
        model.set_submodule(name, nn.Identity())
        try:
            library_facts(model)
            with torch.no_grad():
                last_map(model, self.spec, image)
        except Exception:  # of shapes that no longer fit, of a library that looks for the module
            model.set_submodule(name, before)
            return False
        return True


def _without(model: nn.Module, read: set[str]) -> list[str]:
    """Dotted names of the outermost modules that have parameters, none of which is read."""
    found: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        within = any(name.startswith(f"{outer}.") for outer in found)
        if name and own and not within and not read.intersection(own):
            found.append(name)
    return found


def _without_classifier(backbone: nn.Module) -> Any:
    """A frozen copy over the same memory, without a head, or without its library's classifier."""
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"backbone: got a {type(backbone).__name__}, expected a model, such as "
            "timm.create_model gives"
        )
    if isinstance(backbone, Tower):
        backbone = backbone.tower
    ours = type(backbone).__module__.startswith("pcx.")
    for holder in ("tower", "backbone") if ours else ():
        if isinstance(getattr(backbone, holder, None), nn.Module):
            raise ValueError(
                f"backbone: it is a {type(backbone).__name__} already; give its .{holder} for a "
                "new decoder, or the backbone that it was built on"
            )
    if any("ForImageClassification" in cls.__name__ for cls in type(backbone).__mro__):
        backbone = next(part for part in backbone.children() if hasattr(part, "base_model_prefix"))
    copied = over_same_memory(backbone, backbone.parameters()).eval()
    if hugging_face.is_tower(copied):
        hugging_face.leave_out_drawn_pooler(copied)
        return copied
    return with_head(copied, 0)
