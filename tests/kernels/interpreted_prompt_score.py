"""Run by test_prompt_score.py with TRITON_INTERPRET=1: Triton's kernels on the CPU."""

import pytest
import torch

from pcx.kernels import prompt_score as kernel
from pcx.ops.reference import prompt_score as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", ["none", "plain", "affine"])
@pytest.mark.parametrize(("batch", "m", "dim"), [(1, 1, 16), (5, 3, 37), (9, 2, 64)])
def test_scores(dtype, norm, batch, m, dim):
    generator = torch.Generator().manual_seed(dim)
    gradient = torch.randn(m, batch, dim, generator=generator).to(dtype).transpose(0, 1)
    prompts, weight = (torch.randn(n, dim, generator=generator) for n in (m, 1))
    weight = weight[0] if norm == "affine" else None
    found = kernel.prompt_score(gradient, prompts, norm != "none", weight, 1e-6)
    expected = reference.prompt_score(gradient, prompts, norm != "none", weight, 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing():
    gradient = torch.zeros(0, 3, 16)
    assert kernel.prompt_score(gradient, torch.ones(3, 16), False, None, 0.0).shape == (2, 0, 3)
