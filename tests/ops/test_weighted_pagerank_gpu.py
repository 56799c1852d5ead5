"""weighted_pagerank's kernels in CUDA C++ and Triton, against the definition in float64."""

import pytest
import torch
from ops.test_weighted_pagerank import by_definition, graph

import pcx
from pcx.ops.library import EXTENSION

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("cuda" not in EXTENSION, reason="pcx was built without CUDA"),
]


def on_gpu(n, dtype, **arguments):
    return [t.cuda() for t in graph(n, dtype, **arguments)]


def in_triton(q, k, iters):
    init = q.new_full((1, 1, 1), 1 / q.shape[2], dtype=torch.float32).expand(q.shape[:3])
    return torch.ops.pcx.weighted_pagerank_triton(
        q, k, init, None, None, None, iters, q.shape[-1] ** -0.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n",
    [1, 7, 50, 64, 65, 96, 97, 128, 129, 145, 160, 161, 197, 208, 209, 240, 257, 272, 273, 577],
)
@pytest.mark.parametrize("iters", [1, 5, 30, 50])
def test_equals_the_definition(n, dtype, iters):
    q, k = on_gpu(n, dtype, dim=64)
    found = pcx.weighted_pagerank(q, k, iters=iters)
    expected = by_definition(q, k, iters)
    assert found.dtype == torch.float32
    assert ((found - expected).abs() / expected).max() < 1e-4
    assert (found.double().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 16, 24, 32, 40, 72, 80, 96, 120, 128, 6, 136])
@pytest.mark.parametrize("n", [70, 257])
@pytest.mark.parametrize("iters", [1, 5])
def test_head_dims(n, dim, dtype, iters):
    q, k = on_gpu(n, dtype, dim=dim)
    found = pcx.weighted_pagerank(q, k, iters=iters)
    expected = by_definition(q, k, iters)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "left"), [(197, 187), (150, 140), (90, 64), (20, 1), (577, 208), (577, 257)]
)
@pytest.mark.parametrize("iters", [1, 5])
def test_among_some_tokens(n, left, dtype, iters):
    q, k = on_gpu(n, dtype, dim=64)
    generator = torch.Generator().manual_seed(n)
    index = torch.stack([torch.randperm(n, generator=generator)[:left] for _ in range(2)]).cuda()
    init = torch.rand(2, 3, left, generator=generator).cuda() + 0.1
    found = pcx.weighted_pagerank(q, k, iters=iters, init=init, among=index)
    rows, keys = (
        torch.stack([x[i][:, index[i]] for i in range(2)]) for x in (q, k)
    )  # fmt: skip
    expected = by_definition(rows, keys, iters, init.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("n", [130, 257])
@pytest.mark.parametrize("iters", [1, 4, 5])
def test_more_heads_than_blocks_at_a_time(n, dim, dtype, iters):
    """A block then takes several, whose tokens, start and rows it reads ahead."""
    q, k = on_gpu(n, dtype, dim=dim, batch=200)
    assert q.shape[0] * q.shape[1] > 4 * torch.cuda.get_device_properties(0).multi_processor_count
    generator = torch.Generator().manual_seed(n)
    some = torch.rand(200, n, generator=generator).argsort(1)[:, : n - 10].cuda()
    for left, arguments in ((n, {}), (n - 10, {"among": some})):
        arguments["init"] = torch.rand(200, 3, left, generator=generator).cuda() + 0.1
        found = pcx.weighted_pagerank(q, k, iters=iters, **arguments)
        parts = [
            pcx.weighted_pagerank(
                q[i : i + 10],
                k[i : i + 10],
                iters=iters,
                **{name: x[i : i + 10] for name, x in arguments.items()},
            )
            for i in range(0, 200, 10)
        ]
        assert torch.equal(found, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "dim"), [(33, 24), (197, 64), (577, 64), (300, 80), (1370, 32)])
@pytest.mark.parametrize("iters", [1, 30])
def test_in_triton(n, dim, dtype, iters):
    q, k = on_gpu(n, dtype, dim=dim)
    found = in_triton(q, k, iters)
    expected = by_definition(q, k, iters)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    assert (found.double().sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(found, in_triton(q, k, iters))


def test_the_kernels_are_taken_where_they_fit():
    """Their sums are in another order than Triton's."""
    clusters = torch.cuda.get_device_capability()[0] == 9
    for n, dtype, iters, same in (
        (197, torch.float32, 5, False),
        (209, torch.float32, 5, not clusters),
        (272, torch.bfloat16, 5, not clusters),
        (272, torch.bfloat16, 1, False),
        (273, torch.float32, 5, True),
        (273, torch.bfloat16, 1, True),
    ):
        q, k = on_gpu(n, dtype, dim=64)
        found = pcx.weighted_pagerank(q, k, iters=iters)
        assert torch.equal(found, in_triton(q, k, iters)) == same


def test_a_named_backend_runs_or_says_why():
    q, k = on_gpu(197, torch.float32, dim=64)
    found = {
        backend: pcx.weighted_pagerank(q, k, iters=5, backend=backend)
        for backend in ("auto", "cuda", "triton", "reference")
    }
    assert torch.equal(found["cuda"], found["auto"])
    assert torch.equal(found["triton"], in_triton(q, k, 5))
    assert not torch.equal(found["cuda"], found["triton"])
    for scores in found.values():
        torch.testing.assert_close(scores, found["reference"], rtol=1e-4, atol=0)
    for backend, tensors, arguments, reason in (
        ("cuda", (q, k), {"bias": torch.zeros(197, 197, device="cuda")}, "it takes no bias"),
        ("cuda", (q, k), {"prefix_k": k[0, :, :3]}, "it takes no prefix_k"),
        ("cuda", (q, k), {"iters": 0}, "iters of at least 1, got 0"),
        ("cuda", on_gpu(273, torch.float32, dim=64), {}, "at most 272 tokens, got 273"),
        ("cuda", (q[..., :62], k[..., :62]), {}, "multiple of 8, at most 128, got 62"),
        ("cuda", (q.double(), k.double()), {}, "q has Double"),
        ("triton", (q.double(), k.double()), {}, "q has torch.float64"),
        ("triton", on_gpu(20, torch.float32, dim=136), {}, "it needs d <= 128, got 136"),
        ("cpu", (q, k), {}, "it needs CPU tensors, q is on cuda"),
    ):
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run: .*{reason}"):
            pcx.weighted_pagerank(*tensors, **{"iters": 2, **arguments}, backend=backend)


def test_the_attention_matrix_is_never_there():
    q, k = on_gpu(1370, torch.bfloat16, dim=64, batch=4)
    pcx.weighted_pagerank(q, k, iters=2)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pcx.weighted_pagerank(q, k, iters=5)
    matrix = 4 * 3 * 1370**2 * 2
    assert torch.cuda.max_memory_allocated() - before < matrix / 20


@pytest.mark.parametrize("n", [197, 257])
def test_layouts_of_timm_a_head_start_and_zero_iterations(n):
    qkv = torch.randn(3, n, 3, 6, 64, generator=torch.Generator().manual_seed(0)).cuda()
    q, k, _ = (3 * qkv).bfloat16().permute(2, 0, 3, 1, 4).unbind(0)
    init = torch.ones(1, 1, n, device="cuda")
    init[..., 0] = n**0.5
    shifted = torch.nn.functional.pad(q, (1, 0))[..., 1:]  # rows at odd addresses
    for iters in (0, 4):
        expected = by_definition(q, k, iters, init.double())
        for queries in (q, q.contiguous(), shifted):
            found = pcx.weighted_pagerank(queries, k, iters=iters, init=init)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [20, 300])
def test_biases_and_prefixes(n):
    q, k = on_gpu(n, torch.float32)
    generator = torch.Generator().manual_seed(2)
    prefix = torch.randn(3, 4, 16, generator=generator).cuda()
    mask = torch.arange(n, device="cuda") < 0.6 * n
    additive = torch.randn(2, 1, n, n, generator=generator).cuda()
    index = torch.stack([torch.randperm(n, generator=generator)[: n // 2] for _ in range(2)]).cuda()
    for arguments in (
        {"prefix_k": prefix},
        {"bias": mask[None, None, None]},
        {"bias": additive, "prefix_k": prefix},
        {"prefix_k": prefix, "among": index},
    ):
        found = pcx.weighted_pagerank(q, k, iters=3, **arguments)
        at_home = {name: t.cpu() for name, t in arguments.items()}
        expected = pcx.weighted_pagerank(q.cpu(), k.cpu(), iters=3, **at_home)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peaked", [30.0, 300.0])
@pytest.mark.parametrize("n", [50, 90, 150, 197, 257, 300])
@pytest.mark.parametrize("iters", [1, 2])
def test_large_logits_do_not_overflow(n, dtype, peaked, iters):
    q, k = on_gpu(n, dtype, dim=64, peaked=peaked)
    found = pcx.weighted_pagerank(q, k, iters=iters)
    expected = by_definition(q, k, iters)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-40, 40])
@pytest.mark.parametrize("n", [50, 90, 150, 197, 257, 300])
@pytest.mark.parametrize("iters", [1, 3])
def test_logits_far_from_zero_neither_vanish_nor_overflow(n, dtype, shift, iters):
    """By as much for all keys, which changes nothing; powers of 2 as they are would be 2**-288."""
    q, k = on_gpu(n, dtype, dim=64, peaked=1.0)
    q[..., 0], k[..., 0] = 40, shift
    found = pcx.weighted_pagerank(q, k, iters=iters)
    expected = by_definition(q, k, iters)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [90, 150, 197, 257])
@pytest.mark.parametrize("iters", [1, 3])
def test_heads_that_are_done_again_leave_others_alone(n, iters):
    """A block takes several heads; every third has logits that overflow at first."""
    q, k = on_gpu(n, torch.bfloat16, dim=64, batch=200)
    q[:, ::3] *= 100
    found = pcx.weighted_pagerank(q, k, iters=iters)
    parts = [
        pcx.weighted_pagerank(q[i : i + 10, [h]], k[i : i + 10, [h]], iters=iters)
        for i in range(0, 200, 10)
        for h in range(3)
    ]
    parts = torch.cat(parts, 1).unflatten(1, (20, 3)).transpose(0, 1).flatten(0, 1)
    assert torch.equal(found, parts)


@pytest.mark.parametrize("n", [70, 257, 300])
def test_a_negative_scale_and_numbers_that_are_none(n):
    q, k = on_gpu(n, torch.bfloat16, dim=64)
    for iters in (1, 3):
        found = pcx.weighted_pagerank(q, k, iters=iters, scale=-0.125)
        expected = by_definition(-q, k, iters)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
        spoilt = q.clone()
        spoilt[1, 2, 5, 7] = torch.nan
        found = pcx.weighted_pagerank(spoilt, k, iters=iters)
        assert found[1, 2].isnan().all()
        assert found.isnan().sum() == n


@pytest.mark.parametrize("n", [197, 257, 300])
def test_repeats_bit_by_bit_in_and_out_of_a_cuda_graph(n):
    q, k = on_gpu(n, torch.bfloat16, dim=64, batch=64)
    expected = pcx.weighted_pagerank(q, k, iters=30)
    assert torch.equal(expected, pcx.weighted_pagerank(q, k, iters=30))
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = pcx.weighted_pagerank(q, k, iters=30)
    found.zero_()
    recorded.replay()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("n", [197, 257, 300])
def test_all_is_written_and_no_samples(n):
    torch.use_deterministic_algorithms(True)  # then new memory holds NaN
    try:
        q, k = on_gpu(n, torch.bfloat16, dim=64)
        assert pcx.weighted_pagerank(q, k, iters=3).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert pcx.weighted_pagerank(q[:0], k[:0], iters=3).shape == (0, 3, n)
