"""salient_linear: values, gradients, what runs it, and its errors, on the CPU and on a GPU."""

import io

import pytest
import torch
from salient import DEVICES, DTYPES, GPU, KERNELS, assert_near, exact, tensors
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pcx.ops.salient_linear as module
from pcx.ops.dispatch import Backend
from pcx.ops.library import EXTENSION
from pcx.ops.reference import salient_linear as reference
from pcx.ops.salient_linear import DISPATCH, salient_linear

# torch's own, of the decompositions that forward mode loads, and of its compiler's threads
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # its advice on a GPU that has them
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(("dim", "count"), [(1, 1), (8, 1), (8, 8), (24, 7), (64, 32)])
def test_it_is_the_map_and_its_layer_norm(device, dtype, dim, count):
    x, index, weight, bias, *affine = tensors((2, 5, dim), count, dtype, device)
    for norm in (None, (*affine, 1e-6), (None, None, 1e-5), (affine[0], None, 1e-5)):
        wanted, normed = exact(x, index, weight, bias, 0.3, norm)
        changed = x.clone()
        found = salient_linear(changed, index, weight, bias, 0.3, norm=norm)
        least = 1e-12 if dtype == torch.float64 else 1e-5
        assert_near(changed, wanted, dtype, least)
        if norm is None:
            assert found is changed
        else:
            assert found.dtype == dtype
            assert_near(found, normed, dtype, 10 * least)
    others = [i for i in range(dim) if i not in index.tolist()]
    changed = salient_linear(x.clone(), index, weight, bias)
    assert torch.equal(changed[..., others], x[..., others])


@pytest.mark.parametrize("device", DEVICES)
def test_any_layout_of_x(device):
    x, index, weight, bias, *affine = tensors((4, 6, 16), 5, torch.float32, device)
    norm = (*affine, 1e-5)
    for changed in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.repeat(1, 2, 1)[:, ::2].copy_(x),
        x.repeat(1, 1, 2)[..., :16],
        x[0, 0].clone(),
        x[:0].clone(),
    ):
        before = changed.clone()
        found = salient_linear(changed, index, weight, bias, norm=norm)
        if not len(before):
            assert found.shape == before.shape
            continue
        wanted, normed = exact(before, index, weight, bias, norm=norm)
        assert_near(changed, wanted, torch.float32)
        assert_near(found, normed, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtypes(device, narrow):
    x, index, weight, bias, *affine = tensors((2, 5, 16), 6, torch.float32, device)
    norm = (*affine, 1e-6)
    with torch.autocast(device, narrow):
        changed = x.clone()
        found = salient_linear(changed, index, weight, bias, norm=norm)
        wide = salient_linear(x.clone(), index, weight, bias, norm=norm, dtype=torch.float32)
    assert (changed.dtype, found.dtype, wide.dtype) == (torch.float32, narrow, torch.float32)
    wanted, normed = exact(x, index, weight, bias, norm=norm)
    assert_near(changed, wanted, narrow)
    assert_near(found, normed, narrow)
    assert_near(wide, normed, narrow)
    others = [i for i in range(16) if i not in index.tolist()]
    assert torch.equal(changed[..., others], x[..., others])
    assert not torch.equal(changed, salient_linear(x.clone(), index, weight, bias))
    double = [t.double() for t in (x, weight, bias)]
    with torch.autocast(device, narrow):  # leaves float64 alone
        changed = salient_linear(double[0].clone(), index, *double[1:])
    assert_near(changed, exact(x, index, weight, bias)[0], torch.float64, 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_weights_over_16_bits(device, dtype):
    x, index, weight, bias, *_ = tensors((4, 32), 8, dtype, device, torch.float32)
    weight.requires_grad_(), bias.requires_grad_()
    found = salient_linear(x.clone(), index, weight, bias)
    assert found.dtype == dtype
    assert_near(found.detach(), exact(x, index, weight, bias)[0].detach(), dtype)
    gradients = torch.autograd.grad(found.float().square().sum(), (weight, bias))
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    expected = torch.autograd.grad(exact(x, index, weight, bias)[0].square().sum(), (weight, bias))
    for each, wanted in zip(gradients, expected, strict=True):
        assert_near(each, wanted.double(), dtype)


NORMS = ["none", "plain", "affine"]


def with_norm(affine, kind):
    return {"none": None, "plain": (None, None, 1e-5), "affine": (*affine, 1e-5)}[kind]


def both_read(run, norm):
    """A function of x, W and b that reads the changed x and its normed rows."""

    def read(x, index, weight, bias):
        changed = x * 1
        found = run(changed, index, weight, bias, 0.7, norm=norm)
        if isinstance(found, tuple):
            changed, found = found
        return changed.sin() if norm is None else changed.sin() + found.square()

    return read


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("needs", [(0, 1, 2), (1, 2), (0,), (1,), (2,)])
@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 8), (8,)])
def test_gradients(device, kind, needs, shape):
    x, index, *rest = tensors(shape, device=device)
    norm = with_norm(rest[2:], kind)
    given = [x, *rest[:2]]
    for place in needs:
        given[place].requires_grad_()
    inputs = [given[place] for place in needs]

    def run(*chosen):
        all_three = list(given)
        for place, tensor in zip(needs, chosen, strict=True):
            all_three[place] = tensor
        return both_read(salient_linear, norm)(all_three[0], index, *all_three[1:])

    assert torch.autograd.gradcheck(run, inputs)
    found = torch.autograd.grad(run(*inputs).sum(), inputs)
    expected = both_read(exact, norm)(given[0], index, *given[1:])
    for each, wanted in zip(found, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("read", ["x", "normed"])
def test_one_result_alone_is_read(device, read):
    x, index, weight, bias, *affine = tensors(device=device)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def results(run):
        changed = x * 1
        found = run(changed, index, weight, bias, norm=(*affine, 1e-5))
        if isinstance(found, tuple):
            changed, found = found
        return torch.autograd.grad((changed if read == "x" else found).square().sum(), inputs)

    for each, wanted in zip(results(salient_linear), results(exact), strict=True):
        torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NORMS)
def test_a_view_keeps_the_gradients_of_its_base(device, kind):
    x, index, weight, bias, *affine = tensors((2, 3, 4, 8), device=device)
    norm = with_norm(affine, kind)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def by_view(x, weight, bias):
        base = x * 1
        found = salient_linear(base.view(2, 12, 8), index, weight, bias, 0.7, norm=norm)
        return base.sin() if norm is None else base.sin() + found.square().view_as(base)

    assert torch.autograd.gradcheck(by_view, inputs)
    torch.testing.assert_close(by_view(*inputs), both_read(exact, norm)(x, index, weight, bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("narrow", DTYPES)
def test_gradients_under_autocast(device, narrow):
    x, index, weight, bias, *affine = tensors((3, 7, 32), 9, torch.float32, device)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    norm = (*affine, 1e-5)
    with torch.autocast(device, narrow, enabled=narrow != torch.float32):
        out = both_read(salient_linear, norm)(x, index, weight, bias)
    found = torch.autograd.grad(out.sum(), inputs)
    wanted = torch.autograd.grad(both_read(exact, norm)(x, index, weight, bias).sum(), inputs)
    for each, expected, given in zip(found, wanted, inputs, strict=True):
        assert each.dtype == given.dtype
        assert_near(each, expected.double(), narrow)


def test_what_is_changed_later_is_not_used():
    x, index, weight, bias, *affine = tensors()
    weight.requires_grad_()
    changed = x.clone()
    normed = salient_linear(changed, index, weight, bias, norm=(*affine, 1e-5))
    with torch.no_grad():
        salient_linear(changed, index, weight.detach(), bias)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


def test_a_second_derivative_is_refused():
    x, index, weight, bias, *_ = tensors()
    weight.requires_grad_()
    out = salient_linear(x.clone(), index, weight, bias).square().sum()
    (first,) = torch.autograd.grad(out, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_torchs_counter_sees_the_product_on_meta_tensors():
    x, index, weight, bias, *affine = (t.to("meta") for t in tensors((4, 16), 5))
    with FlopCounterMode(display=False) as counter:
        assert salient_linear(x, index, weight, bias, norm=(*affine, 1e-5)).shape == (4, 16)
    assert counter.get_total_flops() == 2 * 4 * 5 * 5


def test_inference_mode():
    x, index, weight, bias, *affine = tensors()
    with torch.inference_mode():
        changed = x.clone()
        found = salient_linear(changed, index, weight, bias, norm=(*affine, 1e-5))
    wanted, normed = exact(x, index, weight, bias, norm=(*affine, 1e-5))
    torch.testing.assert_close(changed, wanted)
    torch.testing.assert_close(found, normed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["salient_linear", "salient_linear_cuda", "salient_linear_triton"])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("keep", [True, False])
def test_the_op_keeps_torchs_rules(device, op, kind, keep):
    if device == "cpu" and op != "salient_linear":
        pytest.skip("has no implementation on the CPU")
    if op == "salient_linear_cuda" and "cuda" not in EXTENSION:
        pytest.skip("needs the CUDA extension")
    x, index, weight, bias, *affine = tensors((2, 3, 16), 4, torch.float32, device)
    weights, of_norm = (affine, 1e-5), torch.bfloat16
    if kind == "none":
        weights, of_norm = ([None, None], 0.0), None
    elif kind == "plain":
        weights = ([None, None], 1e-5)
    arguments = (x, index, weight, bias, 0.5, *weights[0], weights[1], of_norm)
    torch.library.opcheck(getattr(torch.ops.pcx, op).default, (*arguments, torch.float32, keep))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("read", ["x", "both", "normed"])
@pytest.mark.parametrize("kind", NORMS)
def test_the_op_of_the_gradient_keeps_torchs_rules(device, read, kind):
    if kind == "none" and read != "x":
        pytest.skip("there are no normed rows")
    x, index, weight, _, scaling, _ = tensors((2, 3, 16), 4, torch.float32, device)
    mean, rstd = x.mean(-1, keepdim=True), 1 / x.std(-1, keepdim=True)
    of_norm = [None] * 4 if kind == "none" else [x, mean, rstd, scaling]
    grads = [None if read == "normed" else x.flip(0), None if read == "x" else x.roll(1, 1)]
    torch.library.opcheck(
        torch.ops.pcx.salient_linear_gradient.default,
        (*grads, index, weight, 0.5, *of_norm, torch.float32),
    )


class Layer(torch.nn.Module):
    """A residual sum, the op, and a layer that reads both results."""

    def __init__(self, shape=(2, 3, 8), count=3, kind="affine", dtype=torch.float32, device="cpu"):
        super().__init__()
        _, index, weight, bias, *affine = tensors(shape, count, dtype, device)
        self.register_buffer("index", index)
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        self.norm = with_norm(affine, kind)
        self.first = torch.nn.Linear(shape[-1], shape[-1], dtype=dtype, device=device)

    def forward(self, x):
        x = x + self.first(x)
        normed = salient_linear(x, self.index, self.weight, self.bias, 0.5, norm=self.norm)
        return x + (0 if self.norm is None else normed.tanh())


def gradients_of(layer, run, x):
    return torch.autograd.grad(run(x).square().sum(), [x, *layer.parameters()])


# In torch 2.11 it raises; "auto" takes torch's own operations there.
NO_GRADIENT_WHEN_COMPILED = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["none", "affine"])
@pytest.mark.parametrize("by", ["what auto takes", "the op"])
def test_torch_compile(monkeypatch, device, backend, kind, by):
    if by == "the op":  # as a backend asked for by name, and inference on CUDA
        if NO_GRADIENT_WHEN_COMPILED:
            pytest.skip("this torch compiles no gradient of a function that changes its input")
        monkeypatch.setattr(module, "_run_of", lambda *_: torch.ops.pcx.salient_linear.default)
    torch.compiler.reset()
    layer = Layer(kind=kind, device=device)
    x = tensors(dtype=torch.float32, device=device)[0].requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found, expected = gradients_of(layer, compiled, x), gradients_of(layer, layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_op_in_a_compiled_graph(device, backend):
    torch.compiler.reset()
    x, index, weight, bias, *affine = tensors(dtype=torch.float32, device=device)
    rest = (index, weight, bias, 0.5, *affine, 1e-5, torch.float32, torch.float32, False)

    def run(x):
        changed = x * 2
        return torch.ops.pcx.salient_linear(changed, *rest)[0] + changed

    with torch.no_grad():
        found = torch.compile(run, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(found, run(x))
        changed = x.clone()

        def alone(x):
            torch.ops.pcx.salient_linear(x, *rest)
            return x.shape[0]

        torch.compile(alone, fullgraph=True, backend=backend)(changed)
    torch.testing.assert_close(changed, exact(x, index, weight, bias, 0.5)[0].float())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_export_needs_torch_alone(strict, grad):
    layer, x = Layer(), tensors(dtype=torch.float32)[0]
    with torch.set_grad_enabled(grad):
        program = torch.export.export(layer, (x,), strict=strict)
        used = {str(node.target) for node in program.graph.nodes}
        assert not any("pcx" in name for name in used), used
        torch.testing.assert_close(program.module()(x), layer(x))


def test_onnx():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, x = Layer().eval().requires_grad_(False), tensors(dtype=torch.float32)[0]
    file = io.BytesIO()
    torch.onnx.export(layer, (x,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace():
    layer, x = Layer().requires_grad_(False), tensors(dtype=torch.float32)[0]
    traced = torch.jit.trace(layer, (x,))
    assert "pcx::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x + 1), layer(x + 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["none", "affine"])
def test_activation_checkpointing(device, kind):
    layer = Layer(kind=kind, dtype=torch.float64, device=device)
    x = tensors(device=device)[0].requires_grad_()
    expected = gradients_of(layer, layer, x)
    found = gradients_of(layer, lambda x: checkpoint(layer, x, use_reentrant=False), x)
    for each, wanted in zip(found, expected, strict=True):
        assert torch.equal(each, wanted)


@pytest.mark.parametrize("kind", ["none", "affine"])
def test_torch_func(kind):
    x, index, weight, bias, *affine = tensors()
    norm = with_norm(affine, kind)

    def loss(run, x, weight, bias):
        return both_read(run, norm)(x, index, weight, bias).sum()

    places = (1, 2, 3)
    for transform in (
        lambda run: torch.func.grad(loss, places)(run, x, weight, bias),
        lambda run: torch.vmap(torch.func.grad(loss, places), (None, 0, None, None))(
            run, x, weight, bias
        ),
        lambda run: torch.func.hessian(loss, 2)(run, x, weight, bias),
        lambda run: torch.func.jvp(lambda w: loss(run, x, w, bias), (weight,), (weight,)),
    ):
        torch.testing.assert_close(transform(salient_linear), transform(exact))
    with pytest.raises(RuntimeError, match="not being vmapped over"):  # x in place
        torch.vmap(lambda w: loss(salient_linear, x, w, bias))(torch.stack([weight, -weight]))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, bias.sum() * x)
        found, wanted = (
            forward_ad.unpack_dual(loss(run, dual, weight, bias)).tangent
            for run in (salient_linear, exact)
        )
        torch.testing.assert_close(found, wanted)


def test_a_backend_that_was_added_has_gradients(monkeypatch):
    monkeypatch.setattr(DISPATCH, "rows", dict(DISPATCH.rows))
    monkeypatch.setattr(DISPATCH, "_added", [])
    calls = []

    def run(*arguments):
        calls.append(arguments)
        return reference.salient_linear(*arguments)

    DISPATCH.add(Backend("mine", run=run))
    x, index, weight, bias, *affine = tensors()
    inputs = [weight.requires_grad_(), bias.requires_grad_()]
    norm = (*affine, 1e-5)
    found = torch.autograd.grad(
        both_read(salient_linear, norm)(x, index, weight, bias).sum(), inputs
    )
    assert len(calls) == 1
    wanted = torch.autograd.grad(both_read(exact, norm)(x, index, weight, bias).sum(), inputs)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_named(device):
    x, index, weight, bias, *affine = tensors(device=device)
    given = {"x": x, "index": index, "weight": weight, "bias": bias}
    for changed, message in (
        ({"x": x.long()}, r"x: torch.int64 of shape \(2, 3, 8\), expected floating-point"),
        ({"x": x[0, 0, 0]}, r"x: torch.float64 of shape \(\), expected .* \[..., D\]"),
        ({"index": index.int()}, r"index: torch.int32 of shape \(3,\), expected torch.int64 \[K\]"),
        ({"index": index[None]}, r"index: torch.int64 of shape \(1, 3\), expected"),
        ({"index": index[:0]}, r"index: 0 channels, expected 1 to D = 8"),
        ({"index": index.repeat(3)}, r"index: 9 channels, expected 1 to D = 8"),
        ({"index": index.to("meta")}, r"index: on meta, x on"),
        ({"weight": weight[:2]}, r"weight: .* of shape \(2, 3\), expected .* \(3, 3\)"),
        ({"weight": weight.long()}, r"weight: torch.int64 .*, expected floating-point"),
        ({"bias": bias[:2]}, r"bias: .* of shape \(2,\), expected .* \(3,\)"),
        ({"scale": float("nan")}, r"scale: nan, expected a finite number"),
        ({"norm": (affine[0][:4], None, 1e-5)}, r"norm: its weight has shape \(4,\), expected"),
        ({"norm": (None, affine[1].to("meta"), 1e-5)}, r"norm: its bias is on meta, x on"),
        ({"norm": affine}, r"norm: list, expected a tuple \(weight, bias, eps\)"),
        ({"dtype": torch.float32}, r"dtype: torch.float32 is that of the normed rows, but norm"),
        ({"norm": (None, None, 1e-5), "dtype": torch.int8}, r"dtype: torch.int8, expected a float"),
        ({"backend": "fast"}, r"backend: got 'fast', expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            salient_linear(**{**given, **changed})
    if device == "cpu":
        for wrong in (-1, 8):
            index[1] = wrong
            with pytest.raises(ValueError, match=r"index: from .*, expected channels 0 to 7"):
                salient_linear(x, index, weight, bias)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_it_has_not_are_refused(device):
    x, index, weight, bias, *affine = tensors(device=device)
    before = x.clone()
    for place, name in enumerate(("weight", "bias")):
        norm = [*affine, 1e-5]
        norm[place] = norm[place].clone().requires_grad_()
        with pytest.raises(ValueError, match=f"norm: its {name} requires a gradient"):
            salient_linear(x, index, weight, bias, norm=tuple(norm))
        with torch.no_grad():
            salient_linear(x.clone(), index, weight, bias, norm=tuple(norm))
    with pytest.raises(ValueError, match="x: a leaf that requires a gradient"):
        salient_linear(x.requires_grad_(), index, weight, bias)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("dim", [64, 192, 384, 768, 1024, 1280])
@pytest.mark.parametrize("count", [1, 8, 32, 96, 100, 192, 256])
def test_the_kernels(backend, dtype, narrow, dim, count):
    if count > dim:
        pytest.skip("there are more channels than columns")
    learned = torch.float32 if dtype != torch.float16 else dtype
    product = narrow or dtype
    if backend == "cuda" and product == torch.float32 and count > 192:
        pytest.skip("the matrix does not fit shared memory in float32")
    for rows in (1, 15, 197, 12608 if dim == 768 else 500):
        x, index, weight, bias, *affine = tensors((rows, dim), count, dtype, "cuda", learned)
        for norm, grad in (
            (None, False),
            ((*affine, 1e-6), False),
            ((None, None, 1e-6), False),
            ((*affine, 1e-6), True),
        ):
            changed = x.clone()
            given = weight.clone().requires_grad_(grad)
            with torch.autocast("cuda", product, enabled=narrow is not None):
                found = salient_linear(changed, index, given, bias, 0.3, norm=norm, backend=backend)
            wanted, normed = exact(x, index, weight, bias, 0.3, norm)
            assert_near(changed.detach(), wanted, product, 2e-5)
            if norm is not None:
                assert found.dtype == product
                assert_near(found.detach(), normed, product, 5e-5)
            others = torch.ones(dim, dtype=torch.bool, device="cuda")
            others[index] = False
            assert torch.equal(changed[:, others].detach(), x[:, others])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [True, False])
def test_what_the_kernels_return(backend, dtype, keep):
    x, index, weight, bias, *affine = tensors((3, 50, 192), 100, dtype, "cuda")
    run = DISPATCH.rows[backend].run
    for of_norm in (None, torch.float32, dtype):
        arguments = (index, weight, bias, 0.5, *affine, 1e-5, of_norm, dtype, keep)
        found = run(x.clone(), *arguments)
        expected = reference.salient_linear(x.clone(), *arguments)
        for each, wanted in zip(found, expected, strict=True):
            assert (each.shape, each.dtype) == (wanted.shape, wanted.dtype)
            assert_near(each, wanted.double(), dtype, 5e-5)
        again = run(x.clone(), *arguments)
        for each, same in zip(found, again, strict=True):
            assert torch.equal(each, same)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", NORMS)
def test_gradients_of_the_kernels(backend, kind):
    x, index, weight, bias, *affine = tensors((4, 50, 192), 100, torch.float32, "cuda")
    norm, inputs = with_norm(affine, kind), [t.requires_grad_() for t in (x, weight, bias)]

    def run(*given, **options):
        return salient_linear(*given, **options, backend=backend)

    out = both_read(run, norm)(x, index, weight, bias)
    found = torch.autograd.grad(out.sum(), inputs)
    wanted = torch.autograd.grad(both_read(exact, norm)(x, index, weight, bias).sum(), inputs)
    for each, right in zip(found, wanted, strict=True):
        assert_near(each, right.double(), torch.float32, 5e-5)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "count"), [(3, 64, 1), (197, 768, 96), (5000, 192, 100)])
@pytest.mark.parametrize("read", ["x", "both", "normed"])
def test_the_kernel_of_the_gradient(device, dtype, rows, dim, count, read):
    x, index, weight, _, scaling, _ = tensors((rows, dim), count, dtype, device, torch.float32)
    wide = x.double()
    mean, rstd = wide.mean(-1, keepdim=True), 1 / (wide.var(-1, keepdim=True, correction=0) + 1e-5)
    grads = [None if read == "normed" else x.flip(0), None if read == "x" else x.roll(1, 1)]
    of_norm = [x, mean.float(), rstd.sqrt().float(), scaling]
    arguments = (*grads, index, weight, 0.3, *of_norm)
    op = torch.ops.pcx.salient_linear_gradient
    found = op(*arguments, dtype)
    exactly = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments]
    expected = reference.row_gradients(*exactly, torch.float64)
    for each, wanted, again in zip(found, expected, op(*arguments, dtype), strict=True):
        assert each.dtype == dtype
        assert_near(each, wanted, dtype, 5e-5)
        assert torch.equal(each, again)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_cuda_graph(backend):
    x, index, weight, bias, *affine = tensors((4, 50, 192), 96, torch.bfloat16, "cuda")
    rest, norm = (index, weight, bias), (*affine, 1e-5)
    changed = x.clone()
    salient_linear(changed, *rest, norm=norm, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = salient_linear(changed, *rest, norm=norm, backend=backend)
    changed.copy_(x)
    graph.replay()
    again = x.clone()
    assert torch.equal(salient_linear(again, *rest, norm=norm, backend=backend), found)
    assert torch.equal(again, changed)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_says_why_it_cannot_run(backend):
    x, index, weight, bias, *_ = tensors((4, 64), 8, torch.float32, "cuda")
    for given, reason in (
        ((x.double(), index, weight, bias), "it computes bfloat16, float16 and float32"),
        ((x[:, :32].contiguous()[:, :24], index % 24, weight, bias), "contiguous"),
    ):
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run: .*{reason}"):
            salient_linear(*given, backend=backend)
        changed = given[0].clone()
        salient_linear(changed, *given[1:])  # "auto" runs every call
        if len(set(given[1].tolist())) == 8:
            assert_near(changed, exact(*given)[0], torch.float32)
