"""Chooses the tokens that a pruning layer keeps, from the scores of its attention heads."""

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
    """The I-stage of Zero-TPrune (Sec. 3.2): keeps the patches of the highest scores.

    The heads' scores are filtered by their variance (VHF) and combined (EIR, Eq. 2).

    Args:
        scores: [B, H, N]; the scores of each head sum to 1.
        keep: number of patches that stay, 0 to N - protected; the first among equals.
        protected: number of tokens at the front, which all stay.
        variances: (low, high), inclusive bounds on the variance of N times a head's scores.
        among: [B, N] int64, the indices to return for the N tokens; 0 to N - 1 by default.
        backend: "cuda" (float32, up to 1024 tokens and 64 heads) or "reference" (torch). "auto" is
            the first of these that can run.

    Returns:
        [B, protected + keep] int64: the tokens that stay, in their order among the N.

    Raises:
        ValueError: `keep` is more than there are patches, or the backend asked for cannot run.
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
    """The S-stage of Zero-TPrune (Sec. 3.3): drops patches that are like more important ones.

    Patches are ranked by their votes as `important_tokens` ranks them, and split into halves. The
    patches dropped are those of the less important half that have the largest cosine with a patch
    of the other half. Cosines are of the keys averaged over the heads.

    Args:
        votes: [B, H, N]; the votes of each head sum to 1.
        k: [B, H, N, d].
        drop: number of patches to drop, 0 to half of the patches; the first among equals.
        protected: number of tokens at the front, which are in neither half and all stay.
        variances: (low, high), inclusive bounds on the variance of N times a head's votes.
        backend: "cuda" (votes in float32, up to 1024 tokens and 64 heads) or "reference" (torch).
            "auto" is the first of these that can run.

    Returns:
        [B, N - drop] int64: the tokens that stay, ascending.

    Raises:
        ValueError: `drop` is more than half of the patches, or the backend asked for cannot run.
    """
    arguments = (votes, k, drop, protected, *variances)
    run = DISSIMILAR.own_run(backend, *arguments)
    if run is None:  # an exported program needs torch alone
        run = reference.dissimilar_tokens if exporting() else torch.ops.pcx.dissimilar_tokens
    return run(*arguments)


# The "_cuda" ops are the kernels alone. The ops without a suffix call them, and pass calls that the
# kernels cannot run to "_written_out", the reference in plain torch.
for _kernels in ("", "_cuda", "_written_out"):
    LIBRARY.define(
        f"important_tokens{_kernels}(Tensor scores, int keep, int protected, float low, "
        "float high, Tensor? among) -> Tensor"
    )
    LIBRARY.define(
        f"dissimilar_tokens{_kernels}(Tensor votes, Tensor k, int drop, int protected, "
        "float low, float high) -> Tensor"
    )

# The limits of the CUDA kernels are checked in the call (csrc/cuda/token_choice_host.cpp).
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
