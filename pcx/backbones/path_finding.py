"""Finds the way of prompts to a block's keys and values, and proves it by numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import attention as seam
from pcx.backbones.probing import BlockSpec, TensorLike, made_up_values
from pcx.backbones.token_path import NormAndAttention, Placed, TokenPath, WholeBlock

SAMPLED = 12  # rows and keys that a proof compares
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of keys, relative; others are 16 bits
CLOSE_OF_16_BITS = 3e-2


def find_path(backbone: nn.Module, spec: BlockSpec) -> TokenPath:
    """The way that is proven, by numbers, to give keys and values as of tokens of the image.

    Args:
        backbone: in eval mode, with fused attention on; its block is run on made-up tokens.
        spec: of the block.

    Raises:
        ValueError: there is none; the message says why.
    """
    block = backbone.get_submodule(spec.name)
    if spec.is_flat:
        seam.probe(block, spec.dim, spec.needs)
        return WholeBlock(spec.calls, spec.needs)
    if spec.calls != 1:
        raise ValueError(f"{spec.name} makes {spec.calls} attention calls over windows or an image")
    if spec.attention == spec.name or not spec.given:
        raise ValueError(f"{spec.name} has no attention module of its own that is given tokens")
    with torch.no_grad():
        rows, reads, call = _reads(block, spec)
        reasons = []
        for path in _candidates(spec):
            try:
                _prove_norm(path, block, spec, rows, reads)
                return _proven(path, block, spec, rows, call)
            except Exception as error:  # a module may fail in any way on tokens that are not its
                reasons.append(str(error))
    ours = [each for each in reasons if each.startswith(f"{spec.name}: ")]
    raise ValueError([*ours, *reasons][0])


def _candidates(spec: BlockSpec) -> Iterator[NormAndAttention]:
    """What may be the way, the less costly first."""
    start = len(spec.name) + 1 if spec.name else 0
    # An image of as many windows as heads does not show which axis is which; the numbers do.
    others = {"BHWND": "BWHND", "BWHND": "BHWND"}
    forms = [spec.call_form]
    if spec.call_form in others and spec.windows == spec.heads:
        forms.append(others[spec.call_form])
    more = {name: value for name, value in spec.given_more if not isinstance(value, TensorLike)}
    for kind in (NormAndAttention, Placed):
        for form in forms:
            path = kind(
                None if spec.before is None else spec.before[start:],
                spec.attention[start:],
                spec.layout,
                "BNC" if len(spec.given) == 3 else "BCHW" if spec.given[1] == spec.dim else "BHWC",
                form,
                spec.heads,
            )
            if isinstance(path, Placed):
                path = replace(path, shape=spec.given[1:], more=tuple(more.items()))
            yield path


def trial_of(spec: BlockSpec, block: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Made-up tokens for a block, and its other arguments: few tokens where it takes any number."""
    few = seam.made_up_tokens(block, spec.dim)
    if spec.is_flat:
        return few, seam.placeless(spec.needs, few)
    given = dict(zip(spec.arguments, spec.values, strict=True))
    stream = seam.made_up(spec.stream, few.dtype, few.device)
    return stream, made_up_values(given, few.device)


def _reads(block: nn.Module, spec: BlockSpec) -> tuple[Tensor, Tensor, seam.Call]:
    """Some made-up tokens of a stream [m, C], what the attention is given of it, and its call."""
    stream, given = trial_of(spec, block)
    inputs: list[Tensor] = []
    calls: list[seam.Call] = []

    def attend(_: int, call: seam.Call) -> Tensor:
        calls.append(call)
        return call.output()

    module = block.get_submodule(spec.attention[len(spec.name) + 1 :])
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        with seam.intercept(attend, []):
            block(stream, **given)
    finally:
        hook.remove()
    if not calls:
        raise ValueError(f"{spec.name} makes no call of F.scaled_dot_product_attention")
    rows = (stream.movedim(1, -1) if spec.layout == "BCHW" else stream).reshape(-1, spec.dim)
    return rows[:: max(1, len(rows) // SAMPLED)][:SAMPLED].flip(0), inputs[0], calls[0]


def _prove_norm(
    path: NormAndAttention, block: nn.Module, spec: BlockSpec, rows: Tensor, reads: Tensor
) -> None:
    """Raises a ValueError where the attention reads something else than the stream, or its norm."""
    normed = path.normed(block, rows[None])[0]
    read = reads.movedim(1, -1) if path.given == "BCHW" else reads
    if read.shape[-1] != spec.dim or not _among(normed, read.reshape(-1, spec.dim)):
        raise ValueError(
            f"{spec.name}: what its attention reads is not the stream behind one norm, which "
            "prompts take alone"
        )


def _proven(
    path: NormAndAttention, block: nn.Module, spec: BlockSpec, rows: Tensor, call: seam.Call
) -> NormAndAttention:
    """The way, whose keys and values of vectors alone are those of the image's tokens.

    Raises:
        ValueError: they are not.
    """
    if isinstance(path, Placed):
        path = replace(path, slots=_slots(path, block, spec, rows[:2]))
    (alone,) = path.capture(block, torch.stack([rows, rows.flip(0)]))
    for own, all_of in ((alone.k, call.k), (alone.v, call.v)):
        expected = (2, spec.heads, len(rows), own.shape[-1])
        if tuple(own.shape) != expected:
            raise ValueError(
                f"{spec.name}: its attention gave {len(rows)} vectors keys or values of shape "
                f"{list(own.shape)}, not {list(expected)}: it pools, pads or mixes tokens"
            )
        found = path.rows_of(all_of)
        same = torch.stack([own[0], own[1].flip(1)]).transpose(1, 2).flatten(2)  # [2, m, H * d]
        if not all(_among(each, found) for each in same):
            raise ValueError(
                f"{spec.name}: a token's key or value depends on its place or on other tokens, "
                "and prompts have neither"
            )
    return path


def _slots(path: Placed, block: nn.Module, spec: BlockSpec, two: Tensor) -> tuple[int, ...]:
    """For each token that the attention module is given, the row of its key among the call's.

    Two vectors [2, C] stand in the places of the tokens, by the bits of each token's number. A row
    that is the key of one of them in every such call is the key of the token that its bits spell.

    Raises:
        ValueError: some token has no key of its own.
    """
    room = math.prod(path.shape) // spec.dim
    pair = path.normed(block, two[None])[0]
    numbers = torch.arange(room, device=pair.device)

    def keys(bits: Tensor) -> Tensor:
        return path.rows_of(path.call_on(block, pair[bits][None]).k)

    whole = [keys(torch.full_like(numbers, bit)) for bit in (0, 1)]
    token = torch.zeros(len(whole[0]), dtype=torch.int64, device=pair.device)
    known = torch.ones_like(token, dtype=torch.bool)
    for bit in range(max(1, (room - 1).bit_length())):
        found = keys(numbers >> bit & 1)
        zero, one = (_close_rows(found, each) for each in whole)
        known &= zero ^ one
        token += one.long() << bit
    slots = torch.full_like(numbers, -1)
    rows = torch.arange(len(token), device=pair.device)
    known &= token < room
    slots[token[known]] = rows[known]
    once = torch.bincount(token[known], minlength=room) == 1
    if not bool(once.all()):
        raise ValueError(
            f"{spec.name}: {int((~once).sum())} of {room} tokens have no key of their own: its "
            "attention pools, reduces or mixes them"
        )
    return tuple(slots.tolist())


def _close_rows(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().amax(-1) <= _bound(a) * b.abs().max()


def _bound(x: Tensor) -> float:
    return CLOSE.get(x.dtype, CLOSE_OF_16_BITS)


def _among(some: Tensor, many: Tensor) -> bool:
    """Whether each of some rows is one of many, to rounding."""
    many = many.double()
    nearest = torch.stack([(row - many).abs().amax(-1).min() for row in some.double()])
    return bool(nearest.max() <= _bound(some) * max(float(some.abs().max()), 1e-30))


def check_listed(backbone: nn.Module, spec: Any) -> None:
    """Raises a ValueError where a block that the library lists has no attention that was found.

    Args:
        backbone: with fused attention on.
        spec: its `BackboneSpec`.
    """
    for name in spec.listed:
        if not any(f"{block.name}.".startswith(f"{name}.") for block in spec.blocks):
            seam.probe(backbone.get_submodule(name), spec.blocks[0].dim)
