"""The way of vectors without a place in the image to the keys and values of a block.

A transformer block runs on any tokens [G, m, C], prompts alone too (`WholeBlock`). A block that
cuts an image into windows, or lays it out in rows and columns, runs on images alone. There the
vectors go through the norm and the attention module within it (`NormAndAttention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import attention as seam
from pcx.backbones.probing import BlockSpec, TensorLike, without_hooks

SAMPLED = 12  # rows and keys that a proof compares
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of keys, relative; others are 16 bits
CLOSE_OF_16_BITS = 3e-2


@dataclass(frozen=True)
class WholeBlock:
    """The block itself, on tokens [G, m, C].

    Attributes:
        calls: attention calls that it makes.
        needs: what it has to be given besides, of its spec.
    """

    calls: int
    needs: seam.Needs = ()

    def capture(self, block: nn.Module, tokens: Tensor) -> list[seam.Call]:
        """The attention calls, whose keys and values are [G, H, m, d]."""
        given = seam.placeless(self.needs, tokens)
        return seam.capture(block, self.calls, tokens, **given)


@dataclass(frozen=True)
class NormAndAttention:
    """A norm, and the attention module that makes the block's one call.

    Attributes:
        before: name of the norm within the block, None where the attention reads the stream.
        attention: name of the attention module within the block.
        stream: layout of the stream, "BNC", "BHWC" or "BCHW".
        given: layout of what the attention module is given, one of these.
        form: of its call.
        heads: of its call.
    """

    before: str | None
    attention: str
    stream: str
    given: str
    form: str
    heads: int

    def capture(self, block: nn.Module, tokens: Tensor) -> list[seam.Call]:
        """The attention call, whose queries, keys and values are [G, H, m, d]."""
        if self.before is not None:
            norm = block.get_submodule(self.before)
            tokens = _as_rows(norm(_laid_out(tokens, self.stream)), self.stream)
        module = block.get_submodule(self.attention)
        (call,) = seam.capture(module, 1, _laid_out(tokens, self.given))
        q, k, v = map(self._by_set, (call.q, call.k, call.v))
        return [seam.Call(q, k, v, None, call.scale)]

    def attended(self, block: nn.Module, tokens: Tensor, given: Tensor) -> Tensor:
        """What the attention module makes of tokens [B, m, C] whose call gives `given`.

        Args:
            block: the block.
            tokens: as `capture` takes them.
            given: in place of the call's output, [B, H, m, dv].

        Returns:
            [B, m, C].
        """
        if self.before is not None:
            norm = block.get_submodule(self.before)
            tokens = _as_rows(norm(_laid_out(tokens, self.stream)), self.stream)
        module = block.get_submodule(self.attention)
        out = seam.run(module, 1, lambda _, call: given, _laid_out(tokens, self.given))
        return _as_rows(out, self.given)

    def by_window(self, call: seam.Call) -> seam.Call:
        """The block's own call as one whose batch dimensions are images, then windows."""
        if self.form == "(BH)ND":
            q, k, v = (t.unflatten(0, (-1, self.heads)) for t in (call.q, call.k, call.v))
            bias = call.bias if call.bias is None else call.bias.unflatten(0, (-1, self.heads))
        elif self.form == "BHWND" and call.q.dim() == 5:
            q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
            bias = call.bias if call.bias is None else call.bias.transpose(-3, -4)
        else:
            return call
        return seam.Call(q, k, v, bias, call.scale, call.dropout)

    def as_called(self, out: Tensor) -> Tensor:
        """What such a call gave, in the form of the block's own."""
        if self.form == "(BH)ND":
            return out.flatten(0, 1)
        return out.transpose(1, 2) if self.form == "BHWND" and out.dim() == 5 else out

    def _by_set(self, x: Tensor) -> Tensor:
        """Keys or values of the call as [G, H, m, d]; the vectors are one window."""
        if self.form == "(BH)ND":
            return x.unflatten(0, (-1, self.heads))
        if self.form == "BWHND" and x.dim() == 5:
            return x.flatten(0, 1)
        return x.squeeze(2) if self.form == "BHWND" else x


TokenPath = WholeBlock | NormAndAttention


def _laid_out(tokens: Tensor, layout: str) -> Tensor:
    """[G, m, C] in a layout; a norm over the last axis takes any number of axes before it."""
    if layout == "BCHW":
        return tokens.transpose(1, 2).unsqueeze(-1)
    return tokens[:, None] if layout == "BHWC" else tokens


def _as_rows(x: Tensor, layout: str) -> Tensor:
    """Back to [G, m, C]."""
    if layout == "BCHW":
        return x.squeeze(-1).transpose(1, 2)
    return x[:, 0] if layout == "BHWC" else x


def find_path(block: nn.Module, spec: BlockSpec) -> TokenPath:
    """The way that is proven, by numbers, to give keys and values as of tokens of the image.

    Args:
        block: in eval mode, with fused attention on; run on made-up tokens.
        spec: of the block.

    Raises:
        ValueError: there is none; the message says why.
    """
    if spec.is_flat:
        seam.probe(block, spec.dim, spec.needs)
        return WholeBlock(spec.calls, spec.needs)
    if spec.calls != 1:
        raise ValueError(f"{spec.name} makes {spec.calls} attention calls over windows or an image")
    if spec.attention == spec.name:
        raise ValueError(f"{spec.name} makes its attention call itself, not in a module of its own")
    start = len(spec.name) + 1 if spec.name else 0
    path = NormAndAttention(
        None if spec.before is None else spec.before[start:],
        spec.attention[start:],
        spec.layout,
        "BNC" if len(spec.given) == 3 else "BCHW" if spec.given[1] == spec.dim else "BHWC",
        spec.call_form,
        spec.heads,
    )
    # An image of as many windows as heads does not show which axis is which; the numbers do.
    forms = {"BHWND": "BWHND", "BWHND": "BHWND"}
    with without_hooks(block), torch.no_grad():
        try:
            _prove(path, block, spec)
        except ValueError:
            if spec.call_form not in forms or spec.windows != spec.heads:
                raise
            path = replace(path, form=forms[spec.call_form])
            _prove(path, block, spec)
    return path


def trial_of(spec: BlockSpec, block: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """Made-up tokens for a block, and its other arguments: few tokens where it takes any number."""
    few = seam.made_up_tokens(block, spec.dim)
    if spec.is_flat:
        return few, seam.placeless(spec.needs, few)
    given = dict(zip(spec.arguments, spec.values, strict=True))
    passed = {
        name: seam.made_up(value.shape, value.dtype, few.device)
        if isinstance(value, TensorLike)
        else value
        for name, value in given.items()
    }
    return seam.made_up(spec.stream, few.dtype, few.device), passed


def _prove(path: NormAndAttention, block: nn.Module, spec: BlockSpec) -> None:
    """Raises a ValueError where the keys of vectors alone are not those of the image's tokens."""
    stream, given = trial_of(spec, block)
    inputs: list[Tensor] = []
    calls: list[seam.Call] = []

    def attend(_: int, call: seam.Call) -> Tensor:
        calls.append(call)
        return call.output()

    module = block.get_submodule(path.attention)
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        with seam.intercept(attend, []):
            block(stream, **given)
    finally:
        hook.remove()
    tokens = stream.movedim(1, -1) if spec.layout == "BCHW" else stream
    rows = tokens.reshape(-1, spec.dim)
    rows = rows[:: max(1, len(rows) // SAMPLED)][:SAMPLED].flip(0)
    normed = rows[None]
    if path.before is not None:
        norm = block.get_submodule(path.before)
        normed = _as_rows(norm(_laid_out(normed, path.stream)), path.stream)
    read = inputs[0].movedim(1, -1) if path.given == "BCHW" else inputs[0]
    if read.shape[-1] != spec.dim or not _among(normed[0], read.reshape(-1, spec.dim)):
        raise ValueError(
            f"{spec.name}: what its attention reads is not the stream behind one norm, which "
            "prompts take alone"
        )
    (alone,) = path.capture(block, torch.stack([rows, rows.flip(0)]))
    for own, all_of in ((alone.k, calls[0].k), (alone.v, calls[0].v)):
        expected = (2, spec.heads, len(rows), own.shape[-1])
        if tuple(own.shape) != expected:
            raise ValueError(
                f"{spec.name}: its attention gave {len(rows)} vectors keys or values of shape "
                f"{list(own.shape)}, not {list(expected)}: it pools, pads or mixes tokens"
            )
        found = _rows_of_call(all_of, path)
        same = torch.stack([own[0], own[1].flip(1)]).transpose(1, 2).flatten(2)  # [2, m, H * d]
        if not all(_among(each, found) for each in same):
            raise ValueError(
                f"{spec.name}: a token's key or value depends on its place or on other tokens, "
                "and prompts have neither"
            )


def _rows_of_call(x: Tensor, path: NormAndAttention) -> Tensor:
    """All keys of an image's call, [tokens, H * d]."""
    if path.form == "(BH)ND":
        x = x.unflatten(0, (-1, path.heads))
    if path.form == "BHWND":
        x = x.transpose(1, 2)
    return x.transpose(-3, -2).flatten(-2).reshape(-1, x.shape[-3] * x.shape[-1])


def _among(some: Tensor, many: Tensor) -> bool:
    """Whether each of some rows is one of many, to rounding."""
    close = CLOSE.get(some.dtype, CLOSE_OF_16_BITS)
    many = many.double()
    nearest = torch.stack([(row - many).abs().amax(-1).min() for row in some.double()])
    return bool(nearest.max() <= close * max(float(some.abs().max()), 1e-30))


def check_listed(backbone: nn.Module, listed: Sequence[str], blocks: Sequence[BlockSpec]) -> None:
    """Raises a ValueError where a block that the library lists has no attention that was found."""
    for name in listed:
        if not any(f"{block.name}.".startswith(f"{name}.") for block in blocks):
            seam.probe(backbone.get_submodule(name), blocks[0].dim)
