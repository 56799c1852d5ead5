"""What backbones give: logits out of a library's own containers, and maps of image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pcx.backbones.positions import grid_of
from pcx.backbones.spec import BackboneSpec

IGNORED = 255  # the class of pixels that count nowhere


def logits_of(output: Any) -> Tensor:
    """The logits, or features, in what a model gave.

    A tensor is taken as it is. Of a Hugging Face output and of a dict the entry "logits" is taken,
    of a tuple or list the first item.

    Raises:
        TypeError: there is none; the message says what the model gave.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        what = (
            f"a dict of {sorted(output)}" if isinstance(output, Mapping) else type(output).__name__
        )
        raise TypeError(
            f"model: its forward gave {what}, expected a tensor of logits, an output or a dict "
            "with 'logits', or a tuple that begins with them"
        )
    return found


def pooled_features(output: Any, has_cls: bool) -> Tensor:
    """The features [B, D] of whole images in what a vision tower gave.

    A tensor is taken as it is. Of a Hugging Face output these are its projected features, else what
    its pooler gave, else [CLS], else the mean of the tokens.

    Args:
        output: what the tower gave.
        has_cls: whether its first token is [CLS].

    Raises:
        TypeError: there are none; the message says what the tower gave.
    """
    for name in ("image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if found is not None:
            return found.flatten(1)  # convolutional models give [B, D, 1, 1]
    tokens = getattr(output, "last_hidden_state", None)
    if tokens is None:
        return logits_of(output)
    return tokens[:, 0] if has_cls else tokens.mean(1)


def output_of(logits: Tensor, labels: Tensor | None = None) -> Any:
    """An output as Hugging Face's image classifiers give it; a dict where transformers is missing.

    Args:
        logits: [B, C].
        labels: classes [B], several labels [B, C] as floats, or numbers [B] or [B, 1] where C is 1.
            The loss is the mean cross-entropy, binary cross-entropy or squared error, which is the
            choice of Hugging Face's models. Of logits [B, C, H, W] classes [B, H, W], of which
            `IGNORED` counts nowhere.

    Raises:
        ValueError: the labels have another shape.
    """
    found: dict[str, Any] = {"logits": logits}
    if labels is not None:
        found = {"loss": _loss(logits, labels), **found}
    try:
        from transformers.modeling_outputs import ImageClassifierOutput
    except ImportError:
        return found
    return ImageClassifierOutput(**found)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[-1] == 1 and labels.numel() == len(logits):
        return F.mse_loss(logits, labels.reshape(logits.shape).to(logits.dtype))
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels, ignore_index=IGNORED if logits.dim() == 4 else -100)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels: floats {list(labels.shape)} for logits {list(logits.shape)}; give whole "
            "numbers [B], or floats of the shape of the logits"
        )
    wanted = labels.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, wanted)


def feature_maps(
    backbone: Any,
    spec: BackboneSpec,
    x: Tensor,
    layers: int | Sequence[int] | None = None,
    norm: bool = False,
    **inputs: Any,
) -> list[Tensor]:
    """Maps of image tokens [B, C, H, W] behind some blocks, without [CLS], registers and prompts.

    Args:
        backbone: a backbone, or a copy whose blocks are wrapped.
        spec: of the backbone.
        x: images [B, 3, H, W].
        layers: indices of the blocks (of a hierarchical model: of the stages), negative ones from
            the end; an int n is the last n; None is all.
        norm: whether the backbone's last norm is applied.
        inputs: the backbone's own further arguments.

    Raises:
        ValueError: the backbone gives no such maps, or tokens were dropped on the way.
    """
    own = hasattr(backbone, "forward_intermediates")
    if not own and not spec.blocks:
        raise ValueError(f"model: this {spec.family} has no maps of image tokens: {spec.no_blocks}")
    # Attention blocks behind convolutions are not all that the library's indices count.
    flat = bool(spec.blocks) and spec.is_one_sequence and (bool(spec.listed) or not own)
    if not own:
        if not flat:
            raise ValueError(
                f"model: {spec.family} has stages, and its library gives no maps of them; give "
                "timm's model of that kind"
            )
        found = _behind_blocks(backbone, spec, x, layers, norm, inputs)
    else:
        found = backbone.forward_intermediates(
            x,
            indices=layers,
            norm=norm,
            stop_early=True,
            output_fmt="NLC" if flat else "NCHW",
            intermediates_only=True,
            **inputs,
        )
    if not flat:
        return list(found)
    grid = grid_of(backbone, spec, (x.shape[-2], x.shape[-1]))
    return [_as_map(tokens, grid) for tokens in found]


def last_map(backbone: Any, spec: BackboneSpec, x: Tensor, **inputs: Any) -> Tensor:
    """The map of image tokens [B, C, H, W] behind the last block and the last norm.

    Args:
        backbone: without a classifier; or a copy whose blocks are wrapped.
        spec: of the backbone.
        x: images [B, 3, H, W].
        inputs: the backbone's own further arguments.

    Raises:
        ValueError: the backbone gives no such map.
    """
    if hasattr(backbone, "forward_intermediates"):
        return feature_maps(backbone, spec, x, [-1], norm=True, **inputs)[0]
    tokens = getattr(backbone(x, **inputs), "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 3 or not spec.is_one_sequence:
        raise ValueError(f"model: {spec.family} gives no sequence of image tokens")
    return _as_map(tokens, grid_of(backbone, spec, (x.shape[-2], x.shape[-1])))


def _behind_blocks(
    backbone: nn.Module,
    spec: BackboneSpec,
    x: Tensor,
    layers: Any,
    norm: bool,
    inputs: dict[str, Any],
) -> list[Tensor]:
    """Collects the blocks' outputs [B, N, C] by hooks, for a library without a function for it."""
    wanted, _ = feature_take_indices(len(spec.blocks), layers)
    seen: list[Any] = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call[-1]))
        for block in spec.blocks_in(backbone)
    ]
    try:
        backbone(x, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = [seen[i][0] if isinstance(seen[i], tuple) else seen[i] for i in wanted]
    if norm and spec.norm is not None:
        tokens = [backbone.get_submodule(spec.norm)(each) for each in tokens]
    return tokens


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lays the last H * W of [B, N, C] tokens out as [B, C, H, W]; the others are no patches."""
    count = grid[0] * grid[1]
    if tokens.shape[1] < count:
        raise ValueError(
            f"model: {tokens.shape[1]} tokens came out of a block, and a map needs {count}; tokens "
            "that were dropped or merged leave no map"
        )
    return tokens[:, -count:].transpose(1, 2).unflatten(2, grid).contiguous()
