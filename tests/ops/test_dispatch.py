"""The dispatch of all ops: what runs, what an error says, and what is reported of this machine."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pcx
from pcx.ops import dispatch, hardware, library
from pcx.ops.add_layer_norm import add_layer_norm
from pcx.ops.logit_gate import logit_gate
from pcx.ops.prompt_score import prompt_score
from pcx.ops.salient_linear import salient_linear
from pcx.ops.salient_sum import salient_sum
from pcx.ops.token_choice import dissimilar_tokens, important_tokens

Q = torch.linspace(-1, 1, 2 * 3 * 6 * 8).view(2, 3, 6, 8)


def gated(backend):
    gate = torch.zeros(2, 4, requires_grad=True)
    out = logit_gate(Q, gate, Q, Q[0, :, :4], Q[0, :, :4], Q[..., 0], 0.3, backend=backend)
    return torch.autograd.grad(out.sum(), gate)[0]


CALLS = {
    "prefix_attention": lambda b: pcx.prefix_attention(Q, Q, Q, Q[0], Q[0], backend=b),
    "logit_gate": gated,
    "prompt_score": lambda b: prompt_score(Q[0], Q[0, 0], backend=b),
    "weighted_pagerank": lambda b: pcx.weighted_pagerank(Q, Q, iters=2, backend=b),
    "important_tokens": lambda b: important_tokens(Q.mean(3).softmax(2), 3, protected=1, backend=b),
    "dissimilar_tokens": lambda b: dissimilar_tokens(
        Q.mean(3).softmax(2), Q, 2, protected=1, backend=b
    ),
    "add_layer_norm": lambda b: add_layer_norm(Q, Q, None, None, backend=b),
    "salient_sum": lambda b: salient_sum(
        Q, Q, torch.arange(3), Q[0, 0, :3, :3], Q[0, 0, 0, :3], norm=(None, None, 1e-5), backend=b
    ),
    "salient_linear": lambda b: salient_linear(
        Q.clone(), torch.arange(3), Q[0, 0, :3, :3], Q[0, 0, 0, :3], backend=b
    ),
}


class Ops(TorchDispatchMode):
    """Keeps the names of the ops of pcx that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pcx":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def test_every_op_has_its_call_here():
    assert set(CALLS) == set(dispatch.OPS)


@pytest.mark.parametrize("op", CALLS)
def test_an_unknown_backend_is_an_error_that_lists_all(op):
    names = ("auto", *dispatch.OPS[op].rows)
    with pytest.raises(ValueError, match="backend: got 'fast'") as error:
        CALLS[op]("fast")
    assert str(error.value) == f"backend: got 'fast', expected one of {names}"


@pytest.mark.parametrize("op", CALLS)
def test_what_is_named_is_what_runs(op):
    expected = CALLS[op]("auto")
    for backend, row in dispatch.OPS[op].rows.items():
        if row.device == "cuda":
            reason = "it needs CUDA tensors, [a-z]+ is on cpu"
            with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run: {reason}"):
                CALLS[op](backend)
            continue
        if backend == "cpu" and not library.EXTENSION:
            continue
        with Ops() as ops:
            found = CALLS[op](backend)
        assert bool(ops.names) == (backend != "reference")
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", [op for op in CALLS if "cpu" in dispatch.OPS[op].rows])
def test_without_the_extension_a_named_backend_says_so(op, monkeypatch):
    monkeypatch.setattr(library, "EXTENSION", frozenset())
    with pytest.raises(
        ValueError, match="'cpu' cannot run: pcx was installed without its compiled"
    ):
        CALLS[op]("cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_extension_registers_all_its_files(device):
    if device not in library.EXTENSION:
        pytest.skip(f"pcx._C was not built for {device} here")
    names = {
        "cpu": ("prefix_attention", "prefix_attention_backward", "prompt_score"),
        "cuda": ("prefix_attention", "prefix_attention_key_gradients_hopper")
        + ("weighted_pagerank_cuda", "important_tokens_cuda", "dissimilar_tokens_cuda")
        + ("salient_linear", "salient_linear_cuda", "salient_sum", "salient_sum_cuda"),
    }[device]
    for name in ("weighted_pagerank", *names):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(f"pcx::{name}", device.upper()), name


def test_a_report_gives_every_backend_of_every_op():
    lines = dispatch.report()
    assert [(line.op, line.backend) for line in lines] == [
        (op, backend) for op in CALLS for backend in dispatch.OPS[op].rows
    ]
    assert all(line.reason is None for line in lines if line.backend == "reference")


@pytest.mark.parametrize(
    ("triton", "extension", "gpu", "reasons"),
    [
        (False, ("cpu", "cuda"), None, {"triton": "triton is not installed", "cpu": None}),
        (True, (), None, {"cpu": "pcx was installed without its compiled extension pcx._C"}),
        (True, ("cpu",), (9, 0), {"cuda": "pcx was installed without its CUDA kernels"}),
        (True, ("cpu", "cuda"), None, {"cuda": "no CUDA device", "triton": "no CUDA device"}),
        (True, ("cpu", "cuda"), (9, 0), {"cuda": None, "triton": None, "cpu": None}),
        (
            True,
            ("cpu", "cuda"),
            (8, 6),
            {
                "cuda": "it is written for compute capability 9.x, the GPU has 8.6",
                "triton": None,
            },
        ),
    ],
)
def test_a_report_says_what_is_missing(monkeypatch, triton, extension, gpu, reasons):
    monkeypatch.setattr(hardware, "TRITON", triton)
    monkeypatch.setattr(library, "EXTENSION", frozenset(extension))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hardware, "capability", lambda device: gpu)
    found = {x.backend: x.reason for x in dispatch.report() if x.op == "prefix_attention"}
    assert {backend: found[backend] for backend in reasons} == reasons
