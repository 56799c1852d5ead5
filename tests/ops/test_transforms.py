"""Forward mode, torch.func's transforms, learned scales, dtypes and damaged values of the ops."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import pcx
from pcx.ops.dispatch import report

BACKENDS = ["auto", "reference"]
if any(line.backend == "cpu" and line.reason is None for line in report()):
    BACKENDS.append("cpu")
# torch's own, of the decompositions that forward mode loads
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


def tensors(m=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (draw(3, 2, 5, 8) for _ in range(3))
    return q, k, v, draw(2, m, 8), draw(2, m, 8)


def written_out(q, k, v, prefix_k, prefix_v, scale=None) -> Tensor:
    """Attention as products and a softmax, in float64."""
    q, k, v, prefix_k, prefix_v = (t.double() for t in (q, k, v, prefix_k, prefix_v))
    keys, values = (
        torch.cat([p.expand(len(q), *p.shape), own], 2) for p, own in ((prefix_k, k), (prefix_v, v))
    )
    logits = q @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return logits.softmax(-1) @ values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(5))
def test_forward_mode(backend, place):
    given = list(tensors())
    tangent = torch.randn_like(given[place])

    def run(function):
        def of_one(x):
            return function(*given[:place], x, *given[place + 1 :])

        return torch.func.jvp(of_one, (given[place],), (tangent,))

    found = run(lambda *x: pcx.prefix_attention(*x, backend=backend))
    for each, expected in zip(found, run(written_out), strict=True):
        torch.testing.assert_close(each, expected)
    with forward_ad.dual_level():
        given[place] = forward_ad.make_dual(given[place], tangent)
        out = pcx.prefix_attention(*given, backend=backend)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, found[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_torch_func(backend):
    given = tensors()

    def loss(attend, x, *rest):
        return attend(x, *rest).square().sum()

    def by(function, *more):
        each = torch.vmap(torch.func.grad(loss, 1), (None, 0, 0, 0, None, None))
        own = [t[:, None] for t in given[:3]]
        return (
            torch.func.grad(loss, 1)(function, *given),
            each(function, *own, *given[3:]),
            torch.func.grad(lambda x: torch.func.grad(loss, 1)(function, x, *given[1:]).sum())(
                given[0]
            ),
        )

    found = by(lambda *x: pcx.prefix_attention(*x, backend=backend))
    for each, expected in zip(found, by(written_out), strict=True):
        torch.testing.assert_close(each, expected)


def test_vmap_over_the_choice_of_sets():
    q, k, v, *_ = tensors()
    sets = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    index = torch.tensor([[0, 1, 1], [1, 0, 0]])

    def attend(chosen):
        return pcx.prefix_attention(q, k, v, sets, sets, prefix_index=chosen)

    found = torch.vmap(attend)(index)
    torch.testing.assert_close(found, torch.stack([attend(chosen) for chosen in index]))


def test_a_backend_that_does_not_exist_is_named_under_transforms():
    with pytest.raises(ValueError, match="backend: got 'cup'"):
        torch.func.grad(lambda x: pcx.prefix_attention(x, *tensors()[1:], backend="cup").sum())(
            tensors()[0]
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (3, 1, 5, 1)])
def test_a_tensor_as_scale_keeps_its_gradient(backend, shape):
    scale = torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_()
    found = pcx.prefix_attention(*tensors(), scale=scale, backend=backend)
    expected = written_out(*tensors(), scale=scale)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), scale)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("scale", ["1", float("nan"), float("inf"), True, torch.ones(7)])
def test_other_scales_are_named(scale):
    with pytest.raises(ValueError, match="^scale: "):
        pcx.prefix_attention(*tensors(), scale=scale)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 3.0), (torch.bfloat16, 8.0), (torch.float16, 60.0)]
)
def test_the_lse_of_16_bits_is_computed_in_32(dtype, size):
    q, k, v, prefix_k, prefix_v = tensors(dtype=torch.float32)
    given = [t.to(dtype) for t in (q * size, k * size, v, prefix_k * size, prefix_v)]
    plain = pcx.prefix_attention(*given)
    out, lse = pcx.prefix_attention(*given, return_lse=True)
    wide = pcx.prefix_attention(*(t.double() for t in given), return_lse=True)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), wide[1], rtol=1e-5, atol=1e-3)
    error = [float((x.double() - wide[0]).abs().max()) for x in (plain, out)]
    assert error[1] <= 1.5 * error[0] + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_lies_behind_the_lengths_does_not_matter(backend, value):
    q, k, v, *_ = tensors()
    sets = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    lengths = torch.tensor([0, 2, 4])
    dirty = sets.clone()
    for row, length in zip(dirty, lengths, strict=True):
        row[:, length:] = value
    found, gradients = [], []
    for each in (sets, dirty):
        each.requires_grad_()
        out = pcx.prefix_attention(q, k, v, each, each, prefix_lengths=lengths, backend=backend)
        found.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), each)[0])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)
    for gradient, length in zip(gradients[1], lengths, strict=True):
        assert not gradient[:, length:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lse", [False, True])
def test_a_row_masked_by_the_least_number_takes_the_mean(backend, lse):
    q, k, v, *_ = tensors(dtype=torch.float32)
    none, bias = torch.empty(2, 0, 8), torch.zeros(5, 5)
    bias[2] = torch.finfo(torch.float32).min
    found = pcx.prefix_attention(q, k, v, none, none, bias=bias, backend=backend, return_lse=lse)
    row = (found[0] if lse else found)[:, :, 2]
    torch.testing.assert_close(row, v.mean(2))


def test_a_float32_bias_is_not_rounded_to_16_bits():
    q, k, v, prefix_k, prefix_v = (t.to(torch.bfloat16) for t in tensors())
    bias = 300 + torch.arange(5.0)[None] * 0.25  # bfloat16 has steps of 2 there
    found = pcx.prefix_attention(q, k, v, prefix_k[:, :0], prefix_v[:, :0], bias=bias)
    wide = [t.double() for t in (q, k, v, prefix_k[:, :0], prefix_v[:, :0])]
    expected = pcx.prefix_attention(*wide, bias=bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    rounded = pcx.prefix_attention(*wide, bias=bias.to(torch.bfloat16).double())
    assert (rounded - expected).abs().max() > 0.05  # what rounding would do


@pytest.mark.parametrize("backend", BACKENDS)
def test_pagerank_without_a_way_for_scores_is_uniform(backend):
    q, k = torch.rand(2, 2, 7, 8) + 1, torch.randn(2, 2, 7, 8)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[0] = False
    scores = pcx.weighted_pagerank(q, k, iters=2, bias=mask, backend=backend)
    torch.testing.assert_close(scores[0], torch.full((2, 7), 1 / 7))
    alone = pcx.weighted_pagerank(q[1:], k[1:], iters=2, backend=backend)
    torch.testing.assert_close(scores[1:], alone)
    strong = torch.full((2, 2, 8), 60.0)
    scores = pcx.weighted_pagerank(q, k, iters=2, prefix_k=strong, backend=backend)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_sample_stays_there(backend):
    q, k, v, prefix_k, prefix_v = tensors()
    expected = pcx.prefix_attention(q, k, v, prefix_k, prefix_v, backend=backend)
    ranks = pcx.weighted_pagerank(q, k, iters=3, backend=backend)
    q[1, 0, 2, 3] = torch.nan
    found = pcx.prefix_attention(q, k, v, prefix_k, prefix_v, backend=backend)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert found[1, 0, 2].isnan().all()
    found = pcx.weighted_pagerank(q, k, iters=3, backend=backend)
    torch.testing.assert_close(found[[0, 2]], ranks[[0, 2]])
    assert found[1, 0].isnan().all()
