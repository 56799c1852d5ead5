"""The choice of the tokens that a pruning layer keeps, from the scores of its attention heads."""

from __future__ import annotations

import torch
from torch import Tensor

from pcx.ops.dispatch import Backend, Dispatch, exporting
from pcx.ops.library import LIBRARY
from pcx.ops.reference import token_choice as reference


def important_tokens(
    scores: Tensor,
    keep: int,
    *,
    protected: int,
    variances: tuple[float, float] = reference.VARIANCES,
    among: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The I-stage of Zero-TPrune (Sec. 3.2): the patches of the highest scores.

    The heads' scores are filtered by their variance (VHF) and combined (EIR, Eq. 2).

    Args:
        scores: [B, H, N], each head's summing to 1.
        keep: patches that stay, 0 to N - protected; of equal ones the first stay.
        protected: tokens at the front, which all stay.
        variances: bounds on the variance of N times a head's scores, both inclusive.
        among: [B, N] int64, what the N tokens are; 0 to N - 1 by default.
        backend: "cuda" (float32, up to 1024 tokens and 64 heads) or "reference" (torch). "auto" is
            the first of these that can run.

    Returns:
        [B, protected + keep] int64: the tokens that stay, ascending among the N.

    Raises:
        ValueError: more are to be kept than there are, or the backend asked for cannot run.
    """
    arguments = (scores, keep, protected, *variances, among)
    run = IMPORTANT.own_run(backend, *arguments)
    if run is None:  # an exported program needs torch alone
        run = reference.important_tokens if exporting() else torch.ops.pcx.important_tokens
    return run(*arguments)


def dissimilar_tokens(
    votes: Tensor,
    k: Tensor,
    drop: int,
    *,
    protected: int,
    variances: tuple[float, float] = reference.VARIANCES,
    backend: str = "auto",
) -> Tensor:
    """The S-stage of Zero-TPrune (Sec. 3.3): without patches that are like more important ones.

    Patches are ranked by their votes as `important_tokens` ranks them. Of the less important half,
    those go whose keys, averaged over the heads, have the largest cosine with a patch of the other
    half.

    Args:
        votes: [B, H, N], each head's summing to 1.
        k: [B, H, N, d].
        drop: patches to drop, 0 to half of the patches; of equally alike ones the first go.
        protected: tokens at the front, which are in neither half and all stay.
        variances: bounds on the variance of N times a head's votes, both inclusive.
        backend: "cuda" (votes in float32, up to 1024 tokens and 64 heads) or "reference" (torch).
            "auto" is the first of these that can run.

    Returns:
        [B, N - drop] int64: the tokens that stay, ascending.

    Raises:
        ValueError: more are to be dropped than the half holds, or the backend asked for cannot run.
    """
    arguments = (votes, k, drop, protected, *variances)
    run = DISSIMILAR.own_run(backend, *arguments)
    if run is None:  # an exported program needs torch alone
        run = reference.dissimilar_tokens if exporting() else torch.ops.pcx.dissimilar_tokens
    return run(*arguments)


# Those of "_cuda" are the kernels alone; an op gives calls that they cannot run to
# "_written_out", which is torch's.
for _kernels in ("", "_cuda", "_written_out"):
    LIBRARY.define(
        f"important_tokens{_kernels}(Tensor scores, int keep, int protected, float low, "
        "float high, Tensor? among) -> Tensor"
    )
    LIBRARY.define(
        f"dissimilar_tokens{_kernels}(Tensor votes, Tensor k, int drop, int protected, "
        "float low, float high) -> Tensor"
    )

# What the CUDA kernels cannot run, csrc/cuda/token_choice_host.cpp says in the call itself.
IMPORTANT = Dispatch(
    "scores",
    Backend("cuda", "cuda", ("cuda extension",), run=torch.ops.pcx.important_tokens_cuda),
    Backend("reference", run=reference.important_tokens),
)
DISSIMILAR = Dispatch(
    "votes",
    Backend("cuda", "cuda", ("cuda extension",), run=torch.ops.pcx.dissimilar_tokens_cuda),
    Backend("reference", run=reference.dissimilar_tokens),
)


@torch.library.register_fake("pcx::important_tokens", lib=LIBRARY)
@torch.library.register_fake("pcx::important_tokens_cuda", lib=LIBRARY)
def _fake_important(scores, keep, protected, low, high, among):
    return scores.new_empty(scores.shape[0], protected + keep, dtype=torch.int64)


@torch.library.register_fake("pcx::dissimilar_tokens", lib=LIBRARY)
@torch.library.register_fake("pcx::dissimilar_tokens_cuda", lib=LIBRARY)
def _fake_dissimilar(votes, k, drop, protected, low, high):
    return votes.new_empty(votes.shape[0], votes.shape[2] - drop, dtype=torch.int64)


@torch.library.impl(LIBRARY, "important_tokens", "CompositeExplicitAutograd")
@torch.library.impl(LIBRARY, "important_tokens_written_out", "CompositeExplicitAutograd")
def _important(*arguments):
    return reference.important_tokens(*arguments)


@torch.library.impl(LIBRARY, "dissimilar_tokens", "CompositeExplicitAutograd")
@torch.library.impl(LIBRARY, "dissimilar_tokens_written_out", "CompositeExplicitAutograd")
def _dissimilar(*arguments):
    return reference.dissimilar_tokens(*arguments)
