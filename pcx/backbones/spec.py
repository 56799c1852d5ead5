"""What pcx knows of a backbone: its blocks, heads, prefix tokens and patch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pcx.backbones.inputs import input_size
from pcx.backbones.patches import find_patch_projection
from pcx.backbones.path_finding import check_listed, find_path
from pcx.backbones.probing import BlockSpec, probe_blocks, probe_listed, without_hooks
from pcx.backbones.token_path import TokenPath
from pcx.registry import Registry

# Of each library, by the package of a model's class, what cannot be found by running the model.
FINDERS = Registry(
    "backbone",
    {
        "timm": "pcx.backbones.timm_vit:facts_of",
        "transformers": "pcx.backbones.hugging_face:facts_of",
        "open_clip": "pcx.backbones.open_clip:facts_of",
        "pcx": "pcx.backbones.towers:facts_of",
    },
)
PROMPTABLE = (
    "timm's VisionTransformer (ViT, AugReg, DeiT, DeiT-III, DINOv2, CLIP, SigLIP and others), "
    "VisionTransformerDistilled, VisionTransformerRelPos, Eva (EVA-02, DINOv3, RoPE ViTs), Beit, "
    "NaFlexVit; Hugging Face's ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP and SigLIP, with a classifier "
    "or as vision towers; open_clip's VisionTransformer; timm's and Hugging Face's Swin, and other "
    "models with stages (docs/families.md)"
)


@dataclass(frozen=True)
class BackboneSpec:
    """What pcx knows of a backbone.

    Attributes:
        family: name of its class.
        heads: dotted names of the classifier modules, none where it has no head.
        listed: dotted names of what the library lists as blocks, none where it has no such list.
        dim: width of the features that the head reads.
        prefix_tokens: [CLS], distillation and register tokens, which stand at the front.
        read_tokens: how many tokens at the front the head reads, None where it reads more.
        has_cls: whether the first token is [CLS].
        patch_elements: 3 * patch height * patch width, None where images are not cut into patches.
        blocks: what one probing forward found, in the order of their computation.
        norm: dotted name of the norm that reads what the last block gives, None without one.
        no_blocks: why `blocks` is empty, None where it is not.
        patch_projection: dotted name of the convolution that equals a matrix product over the
            patches, None where there is none.
        reads_map: whether the head reads the map of all image tokens, as a decoder of pixels does.
    """

    family: str
    heads: tuple[str, ...]
    listed: tuple[str, ...]
    dim: int
    prefix_tokens: int
    read_tokens: int | None
    has_cls: bool
    patch_elements: int | None
    blocks: tuple[BlockSpec, ...]
    norm: str | None = None
    no_blocks: str | None = None
    patch_projection: str | None = None
    reads_map: bool = False

    def blocks_in(self, backbone: nn.Module) -> list[Any]:
        """The blocks' modules in a backbone, or in a copy whose blocks are wrapped."""
        return [backbone.get_submodule(block.name) for block in self.blocks]

    @property
    def is_one_sequence(self) -> bool:
        """Whether tokens are one sequence of one width from the first block to the last."""
        return all(block.is_flat and block.dim == self.blocks[0].dim for block in self.blocks)


def find_spec(backbone: nn.Module) -> BackboneSpec:
    """Finds a backbone's spec by the facts of its library and one forward on shapes alone.

    Args:
        backbone: a timm or Hugging Face model; not changed.

    Raises:
        ValueError: the model has no head and features that its library says how to find, or wraps
            the backbone, as torch.compile does; the message says what was found and what is
            possible.
    """
    facts = library_facts(backbone)
    blocks, norm, reason = _blocks(backbone, facts["listed"], facts["dim"])
    return BackboneSpec(
        blocks=blocks,
        norm=norm,
        no_blocks=reason,
        patch_projection=find_patch_projection(backbone, facts["patch_elements"]),
        **{"family": type(backbone).__name__, **facts},
    )


def library_facts(backbone: nn.Module) -> dict[str, Any]:
    """The fields of a spec that the backbone's library tells, without running the model.

    Raises:
        ValueError: as `find_spec` raises it.
    """
    check_unwrapped(backbone)
    try:
        return _finder(backbone)(backbone)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"backbone: {type(backbone).__name__} is not supported: {error}. Give a timm model, a "
            "vision model of Hugging Face, or a vision tower of open_clip"
        ) from error


def check_unwrapped(
    model: Any, name: str = "backbone", then: str = "compile or distribute the tuned model"
) -> None:
    """Raises a ValueError where something wraps a model: compiled, parallel, averaged.

    Args:
        model: what was given.
        name: of the argument.
        then: what else to do, for the message.
    """
    for holder in ("_orig_mod", "module"):
        held = getattr(model, holder, None) if isinstance(model, nn.Module) else None
        if isinstance(held, nn.Module) and type(model).__module__.startswith(("torch.", "timm.")):
            raise ValueError(
                f"{name}: {type(model).__name__} wraps the {name}; give the {name} itself, which "
                f"is its .{holder}, and {then}"
            )


def check_not_quantised(backbone: nn.Module) -> None:
    """Raises a ValueError where a layer is quantised, which mixes tokens by their common scale."""
    for name, module in backbone.named_modules():
        if ".quantized." in f"{type(module).__module__}.":
            raise ValueError(
                f"backbone: {name} is a quantised {type(module).__name__}, whose scale for one "
                "token depends on the others; start from floating-point weights, and quantise the "
                "finished model, such as pcx.freeze(model).backbone"
            )


def check_values(model: nn.Module, argument: str) -> None:
    """Raises a ValueError, of the argument of that name, where weights have no values yet."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{argument}: {name} is on the device meta, which holds no values; load the "
                "weights first"
            )


def check_memory(backbone: nn.Module) -> None:
    """Raises a ValueError where weights have no values yet, or may not be changed."""
    check_values(backbone, "backbone")
    for name, parameter in backbone.named_parameters():
        if parameter.is_inference() or torch.is_inference_mode_enabled():
            raise ValueError(
                f"backbone: {name} was made within torch.inference_mode, or this is called there; "
                "such weights cannot be trained: build backbone and model outside of it"
            )


def _finder(backbone: nn.Module) -> Any:
    """Chooses by the package of the model's class or of a base class; by default timm's."""
    packages = [cls.__module__.partition(".")[0] for cls in type(backbone).__mro__]
    return FINDERS[next((p for p in packages if p in FINDERS), "timm")]


def _blocks(
    backbone: nn.Module, listed: Sequence[str], dim: int
) -> tuple[tuple[BlockSpec, ...], str | None, str | None]:
    """The blocks, the norm behind them, and the reason where there are none."""
    try:
        blocks, norm = probe_blocks(backbone, input_size(backbone))
    except Exception as error:  # a model may fail in any way on a tensor without values
        try:
            blocks, norm = probe_listed(backbone, listed, dim)
        except Exception:
            blocks, norm = (), None
        if not blocks:
            size = list(input_size(backbone)[1:])
            return (
                (),
                None,
                f"its forward failed on an image of {size} pixels without values ({error}); where "
                "it was built for another size, give timm.create_model pretrained_cfg_overlay="
                "{'input_size': (3, H, W)}",
            )
    if blocks:
        return blocks, norm, None
    return (
        (),
        None,
        (
            "no block adds what F.scaled_dot_product_attention gives to its input (convolutions, "
            "or attention written out)"
        ),
    )


def pools_by_token(backbone: Any) -> bool:
    """Whether the head reads tokens at the front; a timm model may be given another pooling."""
    return getattr(backbone, "global_pool", "token") == "token"


def check_promptable(
    backbone: nn.Module, spec: BackboneSpec, counts: Sequence[int] | None = None
) -> tuple[TokenPath | None, ...]:
    """Proves that prompts can be folded into the attention of blocks.

    Args:
        backbone: with fused attention on; its blocks are run on made-up tokens.
        spec: of the backbone.
        counts: how many prompts each block is to have, where the user says so for each; a block
            without prompts may be any. None is prompts in all blocks that the library lists.

    Returns:
        For each block the way of prompts to their keys and values, None where there is none.

    Raises:
        ValueError: prompts cannot be folded exactly; the message says why, which blocks can carry
            some, and what is supported.
    """
    check_not_quantised(backbone)
    found: list[TokenPath | str] = []
    with without_hooks(backbone):
        for block in spec.blocks:
            found.append(_path_or_reason(find_path, backbone, block))
        reason = spec.no_blocks
        if spec.blocks and counts is None:
            reason = _path_or_reason(check_listed, backbone, spec)
    wanted = counts or [1] * len(spec.blocks)
    failed = [path for path, m in zip(found, wanted, strict=True) if m and isinstance(path, str)]
    reason = reason or next(iter(failed), None)
    if reason is None:
        return tuple(None if isinstance(path, str) else path for path in found)
    can = [i for i, path in enumerate(found) if not isinstance(path, str)]
    hint = f". Blocks {can} of its {len(found)} can: give depth= or num_prompts= for these"
    hint = hint if can else ""
    raise ValueError(
        f"backbone: {spec.family} is not supported: {reason}{hint}. Supported: {PROMPTABLE}"
    )


def _path_or_reason(find: Callable[[nn.Module, Any], Any], backbone: nn.Module, what: Any) -> Any:
    """What `find` gives, or why it fails: a model's own code may fail in any of these ways."""
    try:
        return find(backbone, what)
    except (
        AssertionError,
        AttributeError,
        LookupError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:
        return str(error) or type(error).__name__
