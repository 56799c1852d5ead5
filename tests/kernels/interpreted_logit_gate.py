"""Run by test_logit_gate.py with TRITON_INTERPRET=1: Triton's kernel on the CPU."""

import pytest
import torch

from pcx.kernels import logit_gate as kernel
from pcx.ops.reference import logit_gate as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sets", [(), (3,)])
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 16), (33, 17, 24), (40, 70, 48)])
def test_logit_gradients(dtype, sets, n, m, dim):
    generator = torch.Generator().manual_seed(n + m)
    q, out, grad_out = (
        torch.randn(3, n, 2, dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
    )
    keys, values = (torch.randn(*sets, 2, m, dim, generator=generator).to(dtype) for _ in range(2))
    lse = torch.randn(2, 3, n, generator=generator).transpose(0, 1) + 4
    lse[1, 0, 0] = -torch.inf  # a row that attends to nothing
    arguments = (grad_out, q, keys, values, out, lse, 0.3)
    found = kernel.prefix_logit_gradient(*arguments)
    expected = reference.prefix_logit_gradient(*(t.double() for t in arguments[:-1]), 0.3)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
