"""The same promises on a CUDA device."""

import pytest
import torch
from families import FAMILIES, build, images
from torch.utils.data import DataLoader, TensorDataset

import pcx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def logits_and_grads(model, x):
    model.zero_grad()
    logits = model(x)
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.prompts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_equals_concat(family):
    model = pcx.VPT(build(family), 5).double().cuda()
    x = images(family).cuda()
    folded = logits_and_grads(model, x)
    model.path = "concat"
    for a, b in zip(folded, logits_and_grads(model, x), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("family", ["vit", "beit", "eva02", "siglip"])
def test_autocast_error_is_that_of_the_published_form(family):
    model, x = pcx.VPT(build(family), 5).double().cuda(), images(family, batch=8).cuda()
    exact = logits_and_grads(model, x)
    model, x = model.float(), x.float()
    errors = {}
    for path in ("folded", "concat"):
        model.path = path
        with torch.autocast("cuda", torch.bfloat16):
            found = logits_and_grads(model, x)
        errors[path] = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    for folded, concat in zip(errors["folded"], errors["concat"], strict=True):
        assert folded <= 2 * concat + 1e-3


@pytest.mark.filterwarnings("ignore")  # inductor's own, of TF32 and of torch.jit
@pytest.mark.parametrize("path", ["folded", "concat"])
def test_inductor_compiles_into_one_graph(path):
    model, x = pcx.VPT(build("vit", dtype=torch.float32), 5, path=path).cuda(), images("vit")
    x = x.float().cuda()
    expected = logits_and_grads(model, x)
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    logits = compiled(x)
    logits.square().mean().backward()
    for a, b in zip([logits, *(p.grad for p in model.prompts)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_a_compiled_model_calls_the_kernels():
    calls = []

    def count(graph, _):
        calls.extend(node for node in graph.graph.nodes if "prefix_attention" in str(node.target))
        return graph.forward

    model, x = pcx.VPT(build("vit", dtype=torch.float32), 5).cuda(), images("vit").float().cuda()
    torch.compile(model, fullgraph=True, backend=count)(x)
    assert len(calls) == len(model.prompts)


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_train_score_and_condense(amp):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 3, 64, 64, generator=generator) + labels[:, None, None, None]
    loader = DataLoader(TensorDataset(x, labels), batch_size=16, shuffle=True)
    torch.manual_seed(0)
    model = pcx.VPT(build("vit", 3, torch.float32), 5, head_init="keep")
    history = pcx.fit(model, loader, epochs=10, lr=0.1, amp=amp, clip_grad=1.0, progress=False)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    on_gpu = pcx.score(model, loader, progress=False)
    on_cpu = pcx.score(model.cpu().double(), _double(loader), progress=False)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)
    model.float().cuda()
    small = pcx.condense(model, loader, 0.4, epochs=2, amp=amp, progress=False)
    assert sum(small.counts) == 6


@pytest.mark.parametrize("amp", ["no", "bf16"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("vit", "deep"), ("vit", "shallow"), ("vit", "prefix"), ("vit-qk-norm", "deep")],
)
def test_scores_from_a_cuda_graph_are_the_same(family, kind, amp):
    torch.manual_seed(0)
    model = pcx.VPT(build(family, 3, torch.float32), 5, kind=kind, head_init="keep").cuda()
    images, labels = torch.randn(60, 3, 64, 64), torch.arange(60) % 3
    loader = DataLoader(  # the last batch is smaller
        TensorDataset(images, labels), batch_size=16, num_workers=1, pin_memory=True
    )
    methods = ("taylor", "taylor-inner", "gate", "cls-attention")
    arguments = {"method": methods, "amp": amp, "progress": False}
    expected = pcx.score(model, loader, execution="eager", **arguments)
    found = pcx.score(model, loader, execution="cuda-graph", **arguments)
    for name in methods:
        for a, b in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_a_criterion_that_waits_for_the_gpu_is_no_graph(caplog):
    model = pcx.VPT(build("vit", 3, torch.float32), 5, head_init="keep").cuda()
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6) % 3), batch_size=2)

    def waiting(logits, labels):
        assert logits.sum().item() < 1e9
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    arguments = {"criterion": waiting, "progress": False}
    with pytest.raises(ValueError, match="execution: 'cuda-graph' cannot record this: it waits"):
        pcx.score(model, loader, execution="cuda-graph", **arguments)
    found = pcx.score(model, loader, **arguments)  # "auto" goes on as it is, and says so
    assert "running without a CUDA graph: it waits for the GPU" in caplog.text
    assert "test_gpu.py" in caplog.text
    expected = pcx.score(model, loader, execution="eager", **arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_graph_checks_every_batch():
    model = pcx.VPT(build("vit", 3, torch.float32), 5, head_init="keep").cuda()
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 3
    for changed, message in (("labels", "labels 0..3 for a head of 3"), ("images", "sample 7 is")):
        x, y = images.clone(), labels.clone()
        if changed == "labels":
            y[7] = 3
        else:
            x[7] = torch.nan
        loader = DataLoader(TensorDataset(x, y), batch_size=2)
        with pytest.raises(ValueError, match=message):
            pcx.score(model, loader, execution="cuda-graph", progress=False)


def _double(loader):
    x, labels = loader.dataset.tensors
    return DataLoader(TensorDataset(x.double(), labels), batch_size=16)
