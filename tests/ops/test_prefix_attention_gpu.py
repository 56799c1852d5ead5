"""prefix_attention's backends on a CUDA device, against the reference in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pcx import prefix_attention, weighted_pagerank
from pcx.ops.reference import prefix_attention as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).cuda()


def inputs(dtype=torch.bfloat16, batch=3, heads=4, n=197, own=None, m=50, dim=64, sets=()):
    """Queries, keys and values as timm's qkv projection lays them out, and prefixes."""
    if own is None:
        q, k, v = rand(batch, n, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q = rand(batch, n, heads, dim).transpose(1, 2)
        k, v = (rand(batch, own, heads, dim, seed=s).transpose(1, 2) for s in (1, 2))
    prefixes = (rand(*sets, heads, m, dim, seed=s) for s in (3, 4))
    return [t.to(dtype).requires_grad_() for t in (q, k, v, *prefixes)]


def outcome(attend, tensors, wide=False):
    """Output, LSE, and the gradients of a loss of both, in float64."""
    out, lse = attend(*tensors)
    weight = rand(*out.shape, seed=5).to(out.dtype)
    loss = (out * weight).sum().double() + lse.double().sin().sum()
    return [t.detach().double() for t in (out, lse, *torch.autograd.grad(loss, tensors))]


def check(tensors, backend="triton", **arguments):
    """No output or gradient is further from the truth than three times torch's own."""

    def mine(*tensors):
        return prefix_attention(*tensors, return_lse=True, backend=backend, **arguments)

    def torch_s(*tensors):
        return prefix_attention(*tensors, return_lse=True, backend="reference", **arguments)

    found, plain = outcome(mine, tensors), outcome(torch_s, tensors)
    bias = arguments.get("bias")
    if bias is not None and bias.dtype != torch.bool:
        arguments["bias"] = bias.double()
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = outcome(torch_s, wide)
    eps = torch.finfo(tensors[0].dtype).eps
    for a, b, right in zip(found, plain, exact, strict=True):
        if right.numel():
            bound = 3 * (b - right).abs().max() + eps * right.abs().max()
            assert (a - right).abs().max() <= bound


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
BACKENDS = ["triton", pytest.param("cuda", marks=hopper)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [0, 1, 10, 50, 100, 200, 1024])
def test_prefix_lengths(m, dtype):
    check(inputs(dtype, m=m))


@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [0, 1, 10, 50, 59, 75, 100, 200, 1024])
def test_prefix_lengths_on_hopper(m, dtype):
    check(inputs(dtype, m=m), "cuda")


@hopper
@pytest.mark.parametrize("n", [1, 5, 8, 9, 49, 63, 64, 65, 72, 73, 192, 257, 320, 577])
def test_tokens_on_hopper(n):
    check(inputs(n=n, m=20), "cuda")
    check(inputs(n=n, own=33, m=0), "cuda")


@hopper
@pytest.mark.parametrize(("batch", "heads", "n"), [(64, 12, 197), (400, 3, 40), (90, 2, 577)])
def test_more_heads_of_samples_than_the_chip_holds_blocks(batch, heads, n):
    check(inputs(batch=batch, heads=heads, n=n, m=37), "cuda")


@hopper
@pytest.mark.parametrize(("batch", "n", "own", "m"), [(2000, 5, 5, 1), (900, 64, 33, 0)])
def test_many_items_of_one_stage(batch, n, own, m):
    check(inputs(batch=batch, n=n, own=own, m=m), "cuda")


@hopper
def test_ragged_sets_over_more_items_than_blocks():
    tensors = inputs(batch=90, sets=(4,))
    index = torch.arange(90).cuda() % 4
    lengths = torch.tensor([50, 0, 17, 1]).cuda()
    for dtype in (torch.int64, torch.int32):
        check(tensors, "cuda", prefix_index=index.to(dtype), prefix_lengths=lengths.to(dtype))


@hopper
@pytest.mark.parametrize(("batch", "expected"), [(64, "cuda"), (1, "triton")])
def test_auto_takes_the_cuda_kernels_where_they_fill_the_chip(batch, expected):
    tensors = inputs(batch=batch, m=200)

    def run(backend):
        out = prefix_attention(*tensors, backend=backend)
        return out, *torch.autograd.grad(out.float().square().sum(), tensors)

    found = {name: run(name) for name in ("auto", "cuda", "triton")}
    assert all(map(torch.equal, found["auto"], found[expected]))
    assert not any(map(torch.equal, found["cuda"][1:], found["triton"][1:]))


@hopper
def test_all_of_what_is_returned_is_written():
    torch.use_deterministic_algorithms(True)  # then new memory holds NaN
    try:
        for n, m in ((197, 10), (64, 0), (3, 200)):
            tensors = inputs(n=n, m=m)
            out, lse = prefix_attention(*tensors, backend="cuda", return_lse=True)
            grads = torch.autograd.grad(out.float().sum() + lse.sum(), tensors)
            assert all(t.isfinite().all() for t in (out, lse, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


@hopper
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
def test_opcheck_on_hopper():
    torch.library.opcheck(
        torch.ops.pcx.prefix_attention.default,
        (*inputs(n=20, m=7), None, None, None, 0.5, "cuda"),
        rtol=2e-2,
        atol=2e-2,
    )


@hopper
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", range(5))
def test_what_is_not_finite_stays_where_sdpa_leaves_it(which, wrong):
    tensors = [t.detach().clone() for t in inputs(torch.float16, batch=70, n=70)]
    tensors[which][1, 2, 3] = wrong  # of sample 1, or in a prefix a key of head 1
    found = prefix_attention(*tensors, backend="cuda")
    expected = prefix_attention(*tensors, backend="reference")
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, equal_nan=True)


@hopper
def test_a_hopper_kernel_that_cannot_run_says_why():
    q, k, v, pk, pv = (t.detach() for t in inputs(dim=72))
    shifted = [q[..., 4:68], k[..., 8:], v[..., 8:], pk[..., 8:], pv[..., 8:]]
    for tensors, arguments, message in (
        ((q, k, v, pk, pv), {}, "needs d = dv = 64, got 72"),
        (shifted, {}, "the rows of q do not begin on multiples of 16 bytes"),
        (inputs(torch.float32), {}, "q has Float"),
        (inputs(), {"bias": rand(197, 197).bfloat16()}, "it takes no bias"),
    ):
        with pytest.raises(ValueError, match=f"'cuda' cannot run: .*{message}"):
            prefix_attention(*tensors, **arguments, backend="cuda")
    found = prefix_attention(*shifted)
    # Wide, since fused kernels of torch's own may take the memory for aligned.
    expected = prefix_attention(*(t.double() for t in shifted), backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dim", [16, 24, 32, 40, 48, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_dims(dim, dtype):
    check(inputs(dtype, dim=dim, n=70))


@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("more", [3, 4, 8])
def test_rows_that_are_parts_of_wider_ones(dim, more):
    wide = inputs(dim=dim + more, n=70)
    check([x.detach()[..., :dim].requires_grad_() for x in wide])


@pytest.mark.parametrize(("n", "own"), [(1, 197), (2, 50), (49, 49), (577, 577), (33, 5), (7, 300)])
def test_tokens(n, own):
    check(inputs(n=n, own=own))


def test_tf32_is_torch_s_choice():
    tensors = [t.detach() for t in inputs(torch.float32)]
    exact = prefix_attention(*(t.double() for t in tensors))
    error = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            found = prefix_attention(*tensors, backend="triton")
        finally:
            torch.set_float32_matmul_precision("highest")
        error[precision] = float((found - exact).abs().max())
    assert error["highest"] < 1e-5 < error["high"] < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [None, [50, 0, 17]])
def test_sets(lengths, backend):
    lengths = None if lengths is None else torch.tensor(lengths).cuda()
    index = torch.tensor([2, 0, 2, 2, 0]).cuda()  # nobody has set 1
    check(inputs(batch=5, sets=(3,)), backend, prefix_index=index, prefix_lengths=lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_for_each_sample_without_memory_of_its_own(backend):
    q, k, v, pk, pv = inputs()
    sets = [p.detach().expand(3, *p.shape).requires_grad_() for p in (pk, pv)]
    check([q, k, v, *sets], backend)
    weight = rand(*q.shape).bfloat16()
    shared = torch.autograd.grad((prefix_attention(q, k, v, pk, pv) * weight).sum(), pk)[0]
    each = torch.autograd.grad((prefix_attention(q, k, v, *sets) * weight).sum(), sets[0])[0]
    torch.testing.assert_close(each.float().sum(0), shared.float(), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("indexed", [False, True])
def test_gradients_of_sets_lie_by_prompt(indexed, backend):
    tensors = inputs(sets=(3,))
    index = torch.tensor([2, 0, 2]).cuda() if indexed else None
    out = prefix_attention(*tensors, prefix_index=index, backend=backend)
    for gradient in torch.autograd.grad(out.sum(), tensors[3:]):
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(197, 197), (1, 4, 197, 197), (3, 1, 1, 197), (3, 4, 197, 1)])
@pytest.mark.parametrize("boolean", [False, True])
def test_bias(shape, boolean):
    bias = rand(*shape, seed=9)
    check(inputs(), bias=bias > -1 if boolean else bias.bfloat16())


def test_the_gradient_of_a_bias():
    tensors, bias = inputs(torch.float32), rand(1, 4, 197, 197).requires_grad_()
    tensors = [t.detach() for t in tensors]
    (found,) = torch.autograd.grad(prefix_attention(*tensors, bias=bias).square().sum(), bias)
    wide, wide_bias = [t.double() for t in tensors], bias.detach().double().requires_grad_()
    right = reference.prefix_attention(*wide, bias=wide_bias).square().sum()
    (expected,) = torch.autograd.grad(right, wide_bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_windows_share_a_bias():
    q, k, v = (rand(2, 9, 4, 49, 32, seed=s) for s in range(3))
    pk, pv, bias = rand(4, 5, 32, seed=3), rand(4, 5, 32, seed=4), rand(9, 4, 49, 49)
    found = prefix_attention(q, k, v, pk, pv, bias=bias, backend="triton")
    expected = prefix_attention(q, k, v, pk, pv, bias=bias, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_by_bit(backend):
    tensors = inputs(batch=64, m=200)

    def run():
        out = prefix_attention(*tensors, backend=backend)
        return out, *torch.autograd.grad(out.float().square().sum(), tensors)

    assert all(map(torch.equal, run(), run()))


def gradients_by(backend, tensors, grad_out, which=range(5)):
    out = prefix_attention(*tensors, backend=backend)
    return torch.autograd.grad(out, [tensors[i] for i in which], grad_out)


LAYOUTS = {
    "expanded": lambda g: g[:1, :, :1, :1].expand_as(g),
    "by head": lambda g: g.contiguous(),
    "by column": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "at an odd address": lambda g: F.pad(g, (1, 0))[..., 1:],
    "of every other token": lambda g: g.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_in_any_layout(layout, backend):
    tensors = inputs()
    grad_out = LAYOUTS[layout](rand(*tensors[0].shape).bfloat16())
    found = gradients_by(backend, tensors, grad_out)
    dense = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(found, gradients_by(backend, tensors, dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hooks", ["on the CPU", "contiguous", "at odd addresses"])
def test_hooks_may_move_what_is_saved(hooks, backend):
    def moved(t):
        return F.pad(t, (1, 0))[..., 1:] if t.dim() == 4 else t.clone()

    contexts = {
        "on the CPU": torch.autograd.graph.save_on_cpu,
        "contiguous": lambda: torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)
        ),
        "at odd addresses": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved),
    }
    tensors = inputs()
    grad_out = rand(*tensors[0].shape).bfloat16()
    expected = gradients_by(backend, tensors, grad_out)
    with contexts[hooks]():
        found = gradients_by(backend, tensors, grad_out)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (1, 3), (0, 4), (3, 4)])
def test_some_gradients_alone(which, backend):
    tensors = inputs()
    grad_out = rand(*tensors[0].shape).bfloat16()
    every = gradients_by(backend, tensors, grad_out)
    only = [t.detach().requires_grad_(i in which) for i, t in enumerate(tensors)]
    found = gradients_by(backend, only, grad_out, which)
    assert all(torch.equal(a, every[i]) for a, i in zip(found, which, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize("sets", [(), (2,)])
def test_opcheck(sets):
    tensors = inputs(torch.float32, n=20, m=7, sets=sets)
    index = torch.tensor([1, 0, 1]).cuda() if sets else None
    lengths = torch.tensor([3, 7]).cuda() if sets else None
    bias = rand(1, 1, 1, 20, 20).requires_grad_()
    torch.library.opcheck(
        torch.ops.pcx.prefix_attention.default,
        (*tensors, index, lengths, bias, 0.5, "auto"),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_compiles_into_one_graph_that_a_cuda_graph_replays(backend):
    tensors = inputs()

    def step(*tensors):
        return prefix_attention(*tensors, backend=backend).float().square().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        found = torch.autograd.grad(compiled(*tensors), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_captures_forward_and_backward(backend):
    tensors = inputs()
    weight = rand(*tensors[0].shape).bfloat16()

    def step():
        out = prefix_attention(*tensors, backend=backend)
        return torch.autograd.grad(out, tensors, weight)

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for t in found:
        t.zero_()
    graph.replay()
    assert all(map(torch.equal, found, expected))


def test_autocast_casts_as_sdpa_does():
    tensors = [t.detach() for t in inputs(torch.float32)]
    q, k, v, pk, pv = tensors
    with torch.autocast("cuda", torch.bfloat16):
        found = prefix_attention(q, k.bfloat16(), v, pk, pv, bias=rand(197, 197))
        assert found.dtype == torch.bfloat16
        keys, values = (torch.cat([p.expand(3, *p.shape), x], 2) for p, x in ((pk, k), (pv, v)))
        expected = F.scaled_dot_product_attention(q, keys, values)
        torch.testing.assert_close(prefix_attention(*tensors), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_second_derivative_is_the_references(with_bias):
    found = []
    for backend in ("auto", "reference"):
        tensors = inputs(torch.float32, n=20, m=7)
        bias = rand(20, 20).requires_grad_() if with_bias else None
        given = [*tensors, *([bias] if with_bias else [])]
        out, lse = prefix_attention(*tensors, bias=bias, backend=backend, return_lse=True)
        loss = out.square().sum() + lse.square().sum()
        first = torch.autograd.grad(loss, given, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), given))
    for gradient, expected in zip(*found, strict=True):
        error = (gradient - expected).abs().max()
        assert error < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_a_row_masked_by_the_least_number_takes_the_mean(dtype, backend):
    q, k, v, prefix_k, prefix_v = (t.detach() for t in inputs(dtype, n=40, m=0))
    bias = torch.zeros(40, 40, device="cuda")
    bias[2] = torch.finfo(torch.float32).min
    out, lse = prefix_attention(
        q, k, v, prefix_k, prefix_v, bias=bias, backend=backend, return_lse=True
    )
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out[:, :, 2].float(), v.float().mean(2), **tolerance)
    assert lse.isfinite().all()


def test_pagerank_without_a_way_for_scores_is_uniform():
    q, k = (t.detach() for t in inputs(torch.float32, n=40, m=0)[:2])
    mask = torch.ones(3, 1, 40, 40, dtype=torch.bool, device="cuda")
    mask[0] = False
    scores = weighted_pagerank(q, k, iters=2, bias=mask)
    torch.testing.assert_close(scores[0], torch.full_like(scores[0], 1 / 40))
    assert scores.isfinite().all()


WITHOUT_THE_EXTENSION = """
import sys; sys.modules["pcx._C"] = None
import test_prefix_attention_gpu as own
from pcx.ops.library import EXTENSION
assert not EXTENSION
for backend in ("triton", "auto"):
    own.check(own.inputs(), backend)
    own.check(own.inputs(own.torch.float32, n=20, m=7), backend, bias=own.rand(20, 20))
own.test_the_gradient_of_a_bias()
own.test_some_gradients_alone((1, 3), "triton")
own.test_a_second_derivative_is_the_references(False)
"""


def test_triton_without_the_extension():
    """Then the gradient, and the way to Triton, are Python's."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTENSION],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.parents[1]), str(folder)])},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples(backend):
    q, k, v, pk, pv = inputs()
    out = prefix_attention(q[:0], k[:0], v[:0], pk, pv, backend=backend)
    assert out.shape == (0, 4, 197, 64)
    out.sum().backward()
    assert not pk.grad.any()


def test_float64_is_the_reference_s():
    tensors = inputs(torch.float64)
    with pytest.raises(ValueError, match="'triton' cannot run: it computes bfloat16"):
        prefix_attention(*tensors, backend="triton")
    assert prefix_attention(*tensors).dtype == torch.float64


@pytest.mark.parametrize("kind", ["none", "shared", "of windows", "a mask of windows"])
@pytest.mark.parametrize(("n", "m", "dim"), [(49, 50, 32), (64, 5, 32), (49, 0, 16), (36, 33, 64)])
def test_windows_are_packed(kind, n, m, dim):
    """300 images of four windows: one program computes several of a head, and gives gradients."""
    dtype = torch.float16 if n == 64 else torch.bfloat16
    from pcx.kernels.prefix_attention.launch import bias_arguments
    from pcx.kernels.prefix_attention.windows import packing_of
    from pcx.ops.bias import five_dimensions

    tensors = inputs(dtype, batch=1200, heads=3, n=n, m=m, dim=dim)
    bias = None
    if kind != "none":
        bias = rand(1 if kind == "shared" else 4, 3, n, n).to(dtype)
        bias = bias[:, :1] > -1 if "mask" in kind else bias
    five = None if bias is None else five_dimensions(bias, (300, 4))
    packing = packing_of(tensors[0], n, m, False, *bias_arguments(five, tensors[0])[1:])
    assert packing.samples > 1

    def attend(q, k, v, *prefixes, backend, bias):
        q, k, v = (t.unflatten(0, (300, 4)) for t in (q, k, v))
        found = prefix_attention(q, k, v, *prefixes, bias=bias, return_lse=True, backend=backend)
        return [t.flatten(0, 1) for t in found]

    def by(backend, bias):
        return lambda *given: attend(*given, backend=backend, bias=bias)

    found, plain = (outcome(by(b, bias), tensors) for b in ("triton", "reference"))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    added = bias is not None and bias.dtype != torch.bool
    exact = outcome(by("reference", bias.double() if added else bias), wide)
    eps = torch.finfo(dtype).eps
    for a, b, right in zip(found, plain, exact, strict=True):
        if right.numel():
            bound = 3 * (b - right).abs().max() + eps * right.abs().max()
            assert (a - right).abs().max() <= bound
