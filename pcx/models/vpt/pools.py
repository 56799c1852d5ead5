"""What the head of a VPT reads behind the last norm (VPT paper, Fig. 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pcx.backbones.residual import Wrapper
from pcx.backbones.spec import BackboneSpec

# From tokens [B, P + m + N, D], with P prefix tokens and m prompts, to those whose mean is read.
POOLS: dict[str, Callable[[Tensor, int, int], Tensor] | None] = {
    "cls": None,
    "image": lambda x, prefix, prompts: x[:, prefix + prompts :],
    "prompt": lambda x, prefix, prompts: x[:, prefix : prefix + prompts],
    "global": lambda x, prefix, prompts: x[:, prefix:],  # as published, without [CLS]
}
OF_PROMPTS = ("prompt", "global")  # those that read the last layer's prompts


class Pooled(Wrapper):
    """The backbone's last norm, of whose tokens a mean is handed on as the one that the head reads.

    Args:
        inner: the norm.
        pool: a key of `POOLS`.
        prefix: tokens before the prompts.
        last: the last block, which says how many prompts it gives.
    """

    def __init__(self, inner: nn.Module, pool: str, prefix: int, last: Any):
        super().__init__(inner)
        self.pool, self.prefix = pool, prefix
        self._last = (last,)  # in a tuple, as it is registered in the backbone

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, P + m + N, D] -> their mean, [B, 1, D]."""
        rows: Any = POOLS[self.pool]
        (last,) = self._last
        prompts = last.prompts_among() if last.keeps_prompts else 0
        return rows(self.inner(x), self.prefix, prompts).mean(1, keepdim=True)


def check_pool(spec: BackboneSpec, pool: str) -> None:
    """Raises a ValueError where a backbone's head cannot be given another token to read."""
    if pool != "cls" and (spec.norm is None or spec.read_tokens != 1):
        raise ValueError(
            f"pool: {pool!r} needs a head that reads [CLS] behind a last norm, which "
            f"{spec.family} has not as it is; use pool='cls', or build the backbone with "
            "global_pool='token'"
        )


def check_read_prompts(pool: str, counts: list[int], kind: str) -> None:
    """Raises a ValueError where the head would read prompts and there are none to read."""
    if pool == "prompt" and not counts[0 if kind == "shallow" else -1]:
        raise ValueError(
            f"pool: 'prompt' reads the last layer's prompts, and it has none of {counts}; use "
            "another pool, or give that layer prompts"
        )
