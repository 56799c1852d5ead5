"""prefix_attention against attention written out, and its errors."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from pcx import prefix_attention
from pcx.ops.dispatch import exporting
from pcx.ops.library import EXTENSION
from pcx.ops.prepared import Prepared
from pcx.ops.reference import prefix_attention as reference

B, H, N, S, M, D, DV = 3, 2, 5, 7, 4, 8, 6


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(m=M, sets=()):
    return (
        rand(B, H, N, D),
        rand(B, H, S, D, seed=1),
        rand(B, H, S, DV, seed=2),
        rand(*sets, H, m, D, seed=3),
        rand(*sets, H, m, DV, seed=4),
    )


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu" and not EXTENSION:
        pytest.skip("pcx._C was not built here")
    return request.param


def written_out(q, k, v, prefix_k, prefix_v, bias=None, scale=None):
    """Sample by sample, softmax by hand; prefixes [B, H, m, d]."""
    rows, denominators = [], []
    for b in range(len(q)):
        keys, values = torch.cat([prefix_k[b], k[b]], 1), torch.cat([prefix_v[b], v[b]], 1)
        logits = q[b] @ keys.mT * (1 / math.sqrt(D) if scale is None else scale)
        if bias is not None:
            logits[..., prefix_k.shape[2] :] += bias.expand(B, H, N, S)[b]
        weights = logits.exp()
        rows.append(weights / weights.sum(-1, keepdim=True) @ values)
        denominators.append(weights.sum(-1).log())
    return torch.stack(rows), torch.stack(denominators)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, S), (1, H, N, S), (B, 1, N, S), (N, S)])
@pytest.mark.parametrize("m", [0, 1, M])
def test_shared_prefix(m, bias_shape, scale, backend):
    q, k, v, pk, pv = inputs(m)
    bias = None if bias_shape is None else rand(*bias_shape, seed=9)
    expected, lse = written_out(
        q, k, v, pk.expand(B, -1, -1, -1), pv.expand(B, -1, -1, -1), bias, scale
    )
    arguments = {"bias": bias, "scale": scale, "backend": backend}
    torch.testing.assert_close(prefix_attention(q, k, v, pk, pv, **arguments), expected)
    found = prefix_attention(q, k, v, pk, pv, **arguments, return_lse=True)
    torch.testing.assert_close(found, (expected, lse))


def test_sets_are_chosen_by_index(backend):
    q, k, v, pk, pv = inputs(sets=(2,))
    index = torch.tensor([1, 0, 1])
    expected, _ = written_out(q, k, v, pk[index], pv[index])
    found = prefix_attention(q, k, v, pk, pv, prefix_index=index, backend=backend)
    torch.testing.assert_close(found, expected)


def test_lengths_hide_the_end_of_a_set(backend):
    q, k, v, pk, pv = inputs(sets=(2,))
    index, lengths = torch.tensor([1, 0, 1]), torch.tensor([2, 0])
    found = prefix_attention(
        q, k, v, pk, pv, prefix_index=index, prefix_lengths=lengths, backend=backend
    )
    for b, g in enumerate(index):
        n = int(lengths[g])
        alone = [t[b : b + 1] for t in (q, k, v)]
        torch.testing.assert_close(
            found[b : b + 1], prefix_attention(*alone, pk[g, :, :n], pv[g, :, :n])
        )


def test_a_boolean_bias_hides_keys(backend):
    q, k, v, pk, pv = inputs()
    seen = torch.tensor([True, False, True, True, False, False, True])
    expected = prefix_attention(q, k[:, :, seen], v[:, :, seen], pk, pv)
    torch.testing.assert_close(
        prefix_attention(q, k, v, pk, pv, bias=seen, backend=backend), expected
    )


def test_a_row_that_attends_to_nothing_gives_zeros(backend):
    q, k, v, pk, pv = (t.requires_grad_() for t in inputs(0))
    seen = torch.ones(N, S, dtype=torch.bool)
    seen[2] = False
    out, lse = prefix_attention(q, k, v, pk, pv, bias=seen, return_lse=True, backend=backend)
    assert not out[:, :, 2].any()
    assert (lse[:, :, 2] == -math.inf).all()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert q.grad.isfinite().all()
    assert not q.grad[:, :, 2].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_on_as_sdpa_does(backend, bad):
    q, k, v, pk, pv = inputs()
    q[0, 0, 1, 0] = bad
    v[1, 1, 2, 3] = bad
    keys, values = (torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
    expected = F.scaled_dot_product_attention(q, keys, values)
    found = prefix_attention(q, k, v, pk, pv, backend=backend)
    torch.testing.assert_close(found, expected, equal_nan=True)


@given(m=st.integers(0, 9), s=st.integers(1, 9), n=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_properties(backend, m, s, n, seed):
    q, k, v = rand(2, H, n, D, seed=seed), rand(2, H, s, D, seed=seed), rand(2, H, s, DV, seed=seed)
    pk = rand(H, m, D, seed=seed + 1).requires_grad_()
    pv = rand(H, m, DV, seed=seed + 1).requires_grad_()

    def attend(*tensors):
        return prefix_attention(*tensors, backend=backend)

    out = attend(q, k, v, pk, pv)
    keys = torch.cat([pk.expand(2, -1, -1, -1), k], 2)
    values = torch.cat([pv.expand(2, -1, -1, -1), v], 2)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, keys, values))
    order = torch.randperm(m)
    torch.testing.assert_close(attend(q, k, v, pk[:, order], pv[:, order]), out)
    whole = torch.autograd.grad(out.sum(), (pk, pv))
    halves = [
        torch.autograd.grad(attend(q[i], k[i], v[i], pk, pv).sum(), (pk, pv))
        for i in (slice(0, 1), slice(1, 2))
    ]
    for both, one, two in zip(whole, *halves, strict=True):
        torch.testing.assert_close(both, one + two)
    sets = [p.detach().expand(2, *p.shape).clone().requires_grad_() for p in (pk, pv)]
    for both, each in zip(
        whole, torch.autograd.grad(attend(q, k, v, *sets).sum(), sets), strict=True
    ):
        torch.testing.assert_close(both, each.sum(0))


@pytest.mark.parametrize("case", ["shared", "sets", "ragged", "bias"])
def test_gradients(case, backend):
    sets = (2,) if case in ("sets", "ragged") else ()
    tensors = [t[:3, :1, :2].clone() for t in inputs()[:3]]
    tensors += [t[..., :1, :2, :].clone() for t in inputs(sets=sets)[3:]]
    arguments = {"return_lse": True, "backend": backend}
    if sets:
        arguments["prefix_index"] = torch.tensor([1, 0, 1])
    if case == "ragged":
        arguments["prefix_lengths"] = torch.tensor([2, 1])
    if case == "bias":
        tensors.append(rand(3, 1, 1, 2))

    def attend(q, k, v, pk, pv, bias=None):
        return prefix_attention(q, k, v, pk, pv, bias=bias, **arguments)

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in tensors])


def test_more_batch_dimensions(backend):
    """As windows of images have them, with a bias that all images share."""
    q, k, v = (rand(2, 3, H, n, D, seed=n) for n in (N, S, S))
    pk, pv = rand(H, M, D, seed=3), rand(H, M, D, seed=4)
    for bias in (rand(3, 1, N, S), rand(2, 1, H, 1, S), rand(2, 3, 1, N, S), rand(N, S)):
        found, lse = prefix_attention(q, k, v, pk, pv, bias=bias, return_lse=True, backend=backend)
        assert lse.shape == (2, 3, H, N)
        for i in range(2):
            own = bias[i] if bias.dim() == 5 else bias
            alone = prefix_attention(q[i], k[i], v[i], pk, pv, bias=own)
            torch.testing.assert_close(found[i], alone)
    index = torch.tensor([[0, 1, 1], [1, 0, 1]])
    sets = [rand(2, H, M, D, seed=s) for s in (5, 6)]
    found = prefix_attention(q, k, v, *sets, prefix_index=index, backend=backend)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    expected = prefix_attention(*flat, *sets, prefix_index=index.flatten())
    torch.testing.assert_close(found.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_of_the_order_of_torch_s_own(backend, dtype):
    exact = [t.requires_grad_() for t in inputs(30)]
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    expected = reference.prefix_attention(*exact)
    keys, values = (
        torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in zip(low[3:], low[1:3], strict=True)
    )
    plain = F.scaled_dot_product_attention(low[0], keys, values)
    found = prefix_attention(*low, backend=backend)
    assert found.dtype == dtype
    pairs = [
        (found, plain, expected),
        *zip(
            torch.autograd.grad(found.sum(), low),
            torch.autograd.grad(plain.sum(), low),
            torch.autograd.grad(expected.sum(), exact),
            strict=True,
        ),
    ]
    for mine, torch_s, right in pairs:
        bound = 2 * (torch_s - right).abs().max() + 1e-3 * torch.finfo(dtype).eps ** 0.5
        assert (mine - right).abs().max() <= bound


@pytest.mark.skipif(not EXTENSION, reason="pcx._C was not built here")
class TestRegistration:
    """What torch asks of an operation, here of the C++ one."""

    @staticmethod
    def call(*tensors, **arguments):
        return prefix_attention(*tensors, return_lse=True, backend="cpu", **arguments)

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
    @pytest.mark.parametrize("sets", [(), (2,)])
    def test_opcheck(self, sets):
        tensors = [t.requires_grad_() for t in inputs(sets=sets)]
        index = torch.tensor([1, 0, 1]) if sets else None
        lengths = torch.tensor([3, 4]) if sets else None
        bias = rand(1, 1, 1, N, S).requires_grad_()
        torch.library.opcheck(
            torch.ops.pcx.prefix_attention.default, (*tensors, index, lengths, bias, 0.5, "auto")
        )

    def test_compiles_into_one_graph(self):
        tensors = [t.requires_grad_() for t in inputs()]
        expected = self.call(*tensors)
        compiled = torch.compile(self.call, fullgraph=True, backend="aot_eager")
        found = compiled(*tensors)
        torch.testing.assert_close(found, expected)
        assert [t.stride() for t in found] == [t.stride() for t in expected]
        for a, b in zip(
            torch.autograd.grad(found[0].sum(), tensors),
            torch.autograd.grad(expected[0].sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_only_what_is_asked_for_is_computed(self):
        """The first layer of a VPT needs the prefix's gradients alone."""
        q, k, v, pk, pv = inputs()
        every = [t.clone().requires_grad_() for t in (q, k, v, pk, pv)]
        whole = torch.autograd.grad(self.call(*every)[0].sum(), every)
        alone = [pk.clone().requires_grad_(), pv.clone().requires_grad_()]
        part = torch.autograd.grad(self.call(q, k, v, *alone)[0].sum(), alone)
        assert all(map(torch.equal, part, whole[3:]))

    def test_repeats_bit_by_bit(self):
        tensors = [t.float().requires_grad_() for t in inputs()]
        one, two = (torch.autograd.grad(self.call(*tensors)[0].sum(), tensors) for _ in range(2))
        assert all(map(torch.equal, one, two))

    def test_a_second_derivative_is_the_references(self):
        found = []
        expected = partial(prefix_attention, return_lse=True, backend="reference")
        for call in (self.call, expected):
            tensors = [t.requires_grad_() for t in inputs()]
            out, lse = call(*tensors)
            first = torch.autograd.grad(
                out.square().sum() + lse.square().sum(), tensors, create_graph=True
            )
            found.append(torch.autograd.grad(sum(x.square().sum() for x in first), tensors))
        for gradient, expected in zip(*found, strict=True):
            torch.testing.assert_close(gradient, expected)

    def test_a_third_derivative_is_refused(self):
        tensors = [t.requires_grad_() for t in inputs()]
        x = self.call(*tensors)[0]
        (x,) = torch.autograd.grad(x.square().sum(), tensors[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="no third derivative"):
            torch.autograd.grad(x.square().sum(), tensors[:1], create_graph=True)

    def test_no_samples(self):
        q, k, v, pk, pv = (t.requires_grad_() for t in inputs())
        out, _ = self.call(q[:0], k[:0], v[:0], pk, pv)
        assert out.shape == (0, H, N, DV)
        out.sum().backward()
        assert not pk.grad.any()


def test_export_needs_torch_alone():
    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return prefix_attention(*tensors)

    tensors = inputs()
    program = torch.export.export(Attend(), tensors)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "pcx" in target]
    torch.testing.assert_close(program.module()(*tensors), prefix_attention(*tensors))


def test_a_compiler_is_not_taken_for_an_export():
    """Or a compiled model would quietly do without the kernels."""

    class Told(torch.nn.Module):
        def forward(self, x):
            return x.new_tensor(float(exporting()))

    x = torch.zeros(1)
    assert not torch.compile(Told(), backend="eager", fullgraph=True)(x)
    for strict in (False, True):
        assert torch.export.export(Told(), (x,), strict=strict).module()(x)


@pytest.mark.parametrize("sets", [(), (3,)])
def test_gradients_are_laid_out_as_the_fake_says(sets):
    """Those of prefix sets by prompt, [G, m, H, d]."""
    if "cpu" not in EXTENSION:
        pytest.skip("needs pcx._C")
    q, k, v = (torch.randn(3, 2, n, 8) for n in (5, 6, 6))
    prefixes = [torch.randn(*sets, 2, 4, 8) for _ in range(2)]
    out, lse = torch.randn(3, 5, 2, 8).transpose(1, 2), torch.randn(2, 3, 5).transpose(0, 1)
    arguments = (out, None, q, k, v, *prefixes, None, None, None, out, lse, 0.3)
    needs = [True, True, True, True]
    real = torch.ops.pcx.prefix_attention_backward(*arguments, needs, "cpu")
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = torch.ops.pcx.prefix_attention_backward(*tensors, needs, "cpu")
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    if sets:
        assert real[3].transpose(1, 2).is_contiguous()


def test_the_fake_raises_the_same_errors():
    q, k, v, pk, pv = (t.to("meta") for t in inputs())
    with pytest.raises(ValueError, match=r"prefix_v: shape \(2, 3, 6\), expected \(2, 4, 6\)"):
        prefix_attention(q, k, v, pk, pv[:, 1:])


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("cuda", {}, "'cuda' cannot run: it needs CUDA tensors, q is on cpu"),
        ("triton", {}, "'triton' cannot run: it needs CUDA tensors, q is on cpu"),
        ("cpu", {"dtype": torch.float16}, "'cpu' cannot run: it computes float32, float64 and"),
    ],
)
def test_a_named_backend_that_cannot_run_says_why(backend, change, message):
    if backend == "cpu" and not EXTENSION:
        pytest.skip("pcx._C was not built here")
    tensors = [t.to(**change) if change else t for t in inputs()]
    with pytest.raises(ValueError, match=message):
        prefix_attention(*tensors, backend=backend)


def test_autocast_casts_as_sdpa_does(backend):
    q, k, v, pk, pv = (t.float().requires_grad_() for t in inputs())
    bias = rand(1, 1, N, S).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention(q, k.bfloat16(), v, pk, pv, bias=bias, backend=backend)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
    expected = prefix_attention(q, k, v, pk, pv, bias=bias)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)
    assert q.grad.dtype == torch.float32


def test_no_samples_with_a_bias(backend):
    q, k, v, pk, pv = inputs()
    bias = rand(1, H, N, S).requires_grad_()
    out = prefix_attention(q[:0], k[:0], v[:0], pk, pv, bias=bias, backend=backend)
    assert out.shape == (0, H, N, DV)
    if backend == "cpu":  # torch's own has no gradient for nothing
        out.sum().backward()
        assert not bias.grad.any()


def test_an_index_out_of_range_is_found_without_the_check():
    if not EXTENSION:
        pytest.skip("pcx._C was not built here")
    index = torch.tensor([0, -1, 1])
    with pytest.raises(IndexError, match=r"prefix_index: -1, expected 0\.\.1"):
        torch.ops.pcx.prefix_attention(*inputs(sets=(2,)), index, None, None, 0.5, "auto")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a tensor"),
        (
            {"q": rand(H, N, D)},
            ValueError,
            r"q: shape \(2, 5, 8\), expected \[\.\.\., B, H, N, d\]",
        ),
        ({"k": rand(B, 1, S, D)}, ValueError, r"k: shape \(3, 1, 7, 8\), expected \(3, 2, 7, 8\)"),
        ({"k": rand(B, H, S, D).float()}, TypeError, "k: dtype torch.float32, but q has"),
        ({"v": rand(B, H, S - 1, DV)}, ValueError, "v: shape"),
        ({"v": rand(B, H, S, DV).to("meta")}, ValueError, "v: on meta"),
        ({"prefix_k": rand(H, M, D + 1)}, ValueError, "prefix_k: shape"),
        ({"prefix_v": rand(H, M + 1, DV)}, ValueError, "prefix_v: shape"),
        ({"prefix_index": torch.zeros(B).long()}, ValueError, "no set dimension"),
        ({"bias": rand(N, S + M)}, ValueError, r"bias: shape \(5, 11\) does not broadcast"),
        ({"bias": rand(N, S).half()}, TypeError, "bias: dtype torch.float16, expected bool"),
        ({"prefix_k": rand(M, D)}, ValueError, r"prefix_k: .* expected \[H, m, d\] or"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    names = ("q", "k", "v", "prefix_k", "prefix_v")
    with pytest.raises(error, match=message):
        prefix_attention(**{**dict(zip(names, inputs(), strict=True)), **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prefix_index: needed"),
        ({"prefix_index": torch.tensor([0, 1, 2])}, r"values 0\.\.2, expected 0\.\.1"),
        ({"prefix_index": torch.tensor([0, 1])}, r"prefix_index: .* expected int64 or int32 \[3\]"),
        (
            {"prefix_index": torch.tensor([0, 1, 1]), "prefix_lengths": torch.tensor([1])},
            "prefix_lengths: .* expected int64",
        ),
        (
            {"prefix_index": torch.tensor([0, 1, 1]), "prefix_lengths": torch.tensor([1, 5])},
            r"prefix_lengths: values 1\.\.5, expected 0\.\.4",
        ),
    ],
)
def test_bad_sets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prefix_attention(*inputs(sets=(2,)), **arguments)


def test_prepared_calls_check_a_shape_once():
    attend = Prepared()
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    key, value = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    expected = prefix_attention(q, k, v, key, value)
    for _ in range(3):
        assert torch.equal(attend(q, k, v, key, value, None), expected)
    assert len(attend._chosen) == 1
    scaled = prefix_attention(q, k, v, key, value, scale=0.5)
    assert torch.equal(attend(q, k, v, key, value, 0.5), scaled)
    with pytest.raises(ValueError, match="prefix_k: shape"):
        attend(q, k, v, key[:2], value, None)
    with pytest.raises(TypeError, match="prefix_k: dtype"):
        attend(q, k, v, key.double(), value.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert attend(q, k, v, key, value, None).dtype == torch.bfloat16
    copied = copy.deepcopy(attend)
    assert torch.equal(copied(q, k, v, key, value, None), expected)
