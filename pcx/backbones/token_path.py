"""The way of vectors without a place in the image to the keys and values of a block.

A transformer block runs on any tokens [G, m, C], prompts alone too (`WholeBlock`). A block that
cuts an image into windows, or lays it out in rows and columns, runs on images alone. There the
vectors go through the norm and the attention module within it (`NormAndAttention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones import attention as seam


class TokenPath:
    """A way of vectors to a block's keys and values, which `path_finding` finds and proves.

    Attributes:
        takes_tokens: whether the block itself runs on prompts among its tokens.
    """

    takes_tokens: ClassVar[bool]

    def capture(self, block: nn.Module, tokens: Tensor) -> list[seam.Call]:
        """The block's attention calls with tokens [G, m, C] alone.

        Returns:
            Calls whose keys and values are [G, H, m, d].
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WholeBlock(TokenPath):
    """The block itself, on tokens [G, m, C].

    Attributes:
        calls: attention calls that it makes.
        needs: what it has to be given besides, of its spec.
    """

    takes_tokens = True
    calls: int
    needs: seam.Needs = ()

    def capture(self, block: nn.Module, tokens: Tensor) -> list[seam.Call]:
        """As `TokenPath.capture`."""
        given = seam.placeless(self.needs, tokens)
        return seam.capture(block, self.calls, tokens, **given)


@dataclass(frozen=True)
class NormAndAttention(TokenPath):
    """A norm, and the attention module that makes the block's one call, on tokens [G, m, C].

    Attributes:
        before: name of the norm within the block, None where the attention reads the stream.
        attention: name of the attention module within the block.
        stream: layout of the stream, "BNC", "BHWC" or "BCHW".
        given: layout of what the attention module is given, one of these.
        form: of its call.
        heads: of its call.
    """

    takes_tokens = False
    before: str | None
    attention: str
    stream: str
    given: str
    form: str
    heads: int

    def capture(self, block: nn.Module, tokens: Tensor) -> list[seam.Call]:
        """As `TokenPath.capture`; queries are [G, H, m, d] too."""
        module = block.get_submodule(self.attention)
        (call,) = seam.capture(module, 1, _laid_out(self.normed(block, tokens), self.given))
        q, k, v = map(self._by_set, (call.q, call.k, call.v))
        return [seam.Call(q, k, v, None, call.scale)]

    def normed(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Tokens [G, m, C] of the stream as the attention reads them."""
        if self.before is None:
            return tokens
        norm = block.get_submodule(self.before)
        if self.stream == "BCHW":
            # Each token is a map by itself: torch 2.14's batch_norm on CPU gives wrong gradients
            # for a map of one column, whose strides could be those of channels-last too.
            return norm(tokens.reshape(-1, tokens.shape[-1], 1, 1)).reshape(tokens.shape)
        return norm(tokens)  # a norm over the last axis takes any number of axes before it

    def attended(self, block: nn.Module, tokens: Tensor, given: Tensor) -> Tensor:
        """What the attention module makes of tokens [B, m, C] whose call gives `given`.

        Args:
            block: the block.
            tokens: as `capture` takes them.
            given: in place of the call's output, [B, H, m, dv].

        Returns:
            [B, m, C].
        """
        module = block.get_submodule(self.attention)
        tokens = _laid_out(self.normed(block, tokens), self.given)
        return _as_rows(seam.run(module, 1, lambda _, call: given, tokens), self.given)

    def by_window(self, call: seam.Call) -> seam.Call:
        """The block's own call as one whose batch dimensions are images, then windows."""
        if self.form in ("BHND", "BWHND"):
            return call
        axes = call.q.dim()
        q, k, v = (self._by_window(t, axes) for t in (call.q, call.k, call.v))
        bias = call.bias if call.bias is None else self._by_window(call.bias, axes)
        return seam.Call(q, k, v, bias, call.scale, call.dropout)

    def _by_window(self, x: Tensor, axes: int) -> Tensor:
        """A tensor of a call whose queries have so many axes, as [B, (W,) H, N, d]."""
        if self.form == "(BH)ND":
            return x.unflatten(0, (-1, self.heads))
        return x.transpose(-3, -4) if self.form == "BHWND" and axes == 5 else x

    def as_called(self, out: Tensor) -> Tensor:
        """What such a call gave, in the form of the block's own."""
        if self.form == "(BH)ND":
            return out.flatten(0, 1)
        return out.transpose(1, 2) if self.form == "BHWND" and out.dim() == 5 else out

    def _by_set(self, x: Tensor) -> Tensor:
        """Keys or values of the call as [G, H, m, d]; the vectors are one window."""
        x = self._by_window(x, x.dim())
        return x.flatten(0, 1) if x.dim() == 5 else x

    def rows_of(self, x: Tensor) -> Tensor:
        """Keys or values of the block's own call as rows of all heads, [tokens, H * d]."""
        x = self._by_window(x, x.dim())
        return x.transpose(-3, -2).flatten(-2).reshape(-1, x.shape[-3] * x.shape[-1])


@dataclass(frozen=True)
class Placed(NormAndAttention):
    """As `NormAndAttention`, for an attention module that takes a certain number of tokens alone.

    The vectors stand in the places of an image's tokens, whose keys and values are then looked up.

    Attributes:
        shape: of what the module is given for one image, without the batch.
        more: its other arguments.
        slots: for each token that it is given, the row of its key among those of the call.
    """

    shape: tuple[int, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()
    slots: tuple[int, ...] = ()

    def capture(self, block: nn.Module, tokens: Tensor) -> list[seam.Call]:
        """As `TokenPath.capture`."""
        sets, m, dim = tokens.shape
        room = len(self.slots)
        parts = -(-m // room)
        rows = self.normed(block, tokens)
        rows = F.pad(rows, (0, 0, 0, parts * room - m)).reshape(sets * parts, room, dim)
        call = self.call_on(block, rows)
        found = []
        for x in (call.k, call.v):
            own = self.rows_of(x).unflatten(0, (len(rows), -1))  # [G * parts, rows, H * d]
            own = own[:, torch.tensor(self.slots, device=x.device)]
            own = own.reshape(sets, parts * room, self.heads, -1)[:, :m]
            found.append(own.transpose(1, 2))
        key, value = found
        return [seam.Call(key, key, value, None, call.scale)]  # its queries are not asked for

    def call_on(self, block: nn.Module, rows: Tensor) -> seam.Call:
        """The module's call when it is given rows [G, room, C]."""
        if self.given == "BCHW":
            rows = rows.transpose(1, 2)
        module = block.get_submodule(self.attention)
        (call,) = seam.capture(module, 1, rows.reshape(-1, *self.shape), **dict(self.more))
        return call


def _laid_out(tokens: Tensor, layout: str) -> Tensor:
    """[G, m, C] as what an attention module is given in a layout."""
    if layout == "BCHW":
        return tokens.transpose(1, 2).contiguous().unsqueeze(-1)
    return tokens[:, None] if layout == "BHWC" else tokens


def _as_rows(x: Tensor, layout: str) -> Tensor:
    """Back to [G, m, C]."""
    if layout == "BCHW":
        return x.squeeze(-1).transpose(1, 2)
    return x[:, 0] if layout == "BHWC" else x
