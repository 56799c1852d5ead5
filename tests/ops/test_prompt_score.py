"""The scores' kernel against autograd through LayerNorm, and its errors."""

import pytest
import torch
import torch.nn.functional as F

from pcx.ops.prompt_score import prompt_score
from pcx.ops.reference import prompt_score as reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_autograd(gradient, prompts, layer_norm, weight, eps):
    """One sample at a time, through torch's own LayerNorm."""
    taylor, inner = [], []
    for g in gradient:
        p = prompts.clone().requires_grad_()
        out = F.layer_norm(p, p.shape[-1:], weight, None, eps) if layer_norm else p * 1
        (by_prompt,) = torch.autograd.grad(out, p, g)
        product = by_prompt * prompts
        taylor.append(product.norm(dim=-1))
        inner.append(product.sum(-1).abs())
    return torch.stack([torch.stack(taylor), torch.stack(inner)])


def inputs(batch=3, m=5, dim=37, device="cpu"):
    generator = torch.Generator().manual_seed(batch + m + dim)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((batch, m, dim), (m, dim), (dim,))
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["none", "plain", "affine"])
@pytest.mark.parametrize("dim", [1, 16, 37, 192])
def test_scores_equal_autograd(device, dtype, norm, dim):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gradient, prompts, weight = inputs(dim=dim, device=device)
    gradient = gradient.to(dtype)
    weight = weight if norm == "affine" else None
    expected = by_autograd(gradient.double(), prompts, norm != "none", weight, 1e-6)
    wide = torch.promote_types(dtype, torch.float32)
    for cast in (prompts.to(wide), prompts):
        found = prompt_score(
            gradient, cast, layer_norm=norm != "none", weight=weight, eps=1e-6
        ).double()
        tolerance = 1e-9 if dtype == torch.float64 and cast is prompts else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["operation", "reference"])
def test_gradients_of_any_layout(backend):
    call = torch.ops.pcx.prompt_score if backend == "operation" else reference.prompt_score
    gradient, prompts, weight = inputs(batch=4, m=6, dim=20)
    expected = by_autograd(gradient, prompts, True, weight, 1e-5)
    for laid_out in (
        gradient.transpose(0, 1).contiguous().transpose(0, 1),
        gradient.transpose(1, 2).contiguous().transpose(1, 2),
        gradient[:1].expand(4, 6, 20),
    ):
        right = expected if laid_out.stride(0) else expected[:, :1].expand(2, 4, 6)
        torch.testing.assert_close(call(laid_out, prompts, True, weight, 1e-5), right)


@pytest.mark.parametrize(("batch", "m"), [(0, 5), (3, 0)])
def test_nothing_to_score(batch, m):
    gradient, prompts, weight = inputs(batch, m)
    assert prompt_score(gradient, prompts, weight=weight).shape == (2, batch, m)


def test_repeats_bit_by_bit_on_any_number_of_threads():
    gradient, prompts, weight = (t.float() for t in inputs(7, 9, 300))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(prompt_score(gradient, prompts, layer_norm=True, weight=weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_opcheck():
    torch.library.opcheck(
        torch.ops.pcx.prompt_score.default,
        (*inputs()[:2], True, None, 1e-5),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_bad_shapes_are_named():
    gradient, prompts, weight = inputs()
    with pytest.raises(ValueError, match=r"prompts: shape \(4, 37\), expected \[m, D\]"):
        prompt_score(gradient, prompts[:4])
    with pytest.raises(ValueError, match=r"weight: shape \(36,\), expected \[37\]"):
        prompt_score(gradient, prompts, layer_norm=True, weight=weight[1:])
    with pytest.raises(TypeError, match=r"gradient: torch.int64, expected floating point"):
        prompt_score(gradient.long(), prompts)
    with pytest.raises(ValueError, match=r"prompts: on meta, gradient on cpu"):
        prompt_score(gradient, prompts.to("meta"))
