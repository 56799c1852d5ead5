"""Every way to fewer tokens on a CUDA device, as on the CPU, compiled, and from a CUDA graph."""

import copy

import pytest
import torch
from families import images, peaked

import pcx
from pcx.token_pruning import ats, soft_prune, tome

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAYS = {
    "pagerank": lambda m: pcx.zero_tprune(m, layers=(1, 2), keep=0.7, iters=(5, 1), similar=2),
    "uniform": lambda m: pcx.zero_tprune(m, layers=(1,), keep=0.6, iters=3, cls_boost=False),
    "cls": lambda m: pcx.zero_tprune(m, layers=(1, 2), keep=0.7, iters=1, ranking="cls"),
    "tome": lambda m: tome(m, r=3),
    "ats": lambda m: ats(m, layers=(1, 2), tokens=(12, 8)),
    "soft": lambda m: soft_prune(m, layers=(1, 2), keep=0.7, iters=5),
}
PROMPTED = ("plain", "prompted")


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """Orders are compared; torch's default for convolutions is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def built(way, prompted):
    """In float32, where the kernels are, on the CPU and on the GPU, and images."""
    model = peaked("vit", dtype=torch.float32)
    if prompted == "prompted":
        model = pcx.VPT(model, 4, head_init="keep", read_only=False).eval()
    models = [copy.deepcopy(model), model.cuda()]
    for each in models:
        WAYS[way](each)
    return *models, images("vit", batch=6, dtype=torch.float32)


@pytest.mark.parametrize("prompted", PROMPTED)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_as_on_the_cpu(way, prompted):
    at_home, model, x = built(way, prompted)
    torch.testing.assert_close(model(x.cuda()).cpu(), at_home(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prompted", PROMPTED)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_from_a_cuda_graph(way, prompted):
    _, model, x = built(way, prompted)
    first, second = x[:3].cuda(), x[3:].cuda()
    expected = [model(first), model(second)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    given = first.clone()
    with torch.cuda.stream(stream):
        model(given)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = model(given)
    for batch, logits in zip((first, second), expected, strict=True):
        given.copy_(batch)
        recorded.replay()
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("way", ["pagerank", "tome", "ats"])
@torch.no_grad()
def test_compiled_into_one_graph(way):
    _, model, x = built(way, "plain")
    torch.compiler.reset()
    expected = model(x.cuda())
    found = torch.compile(model, fullgraph=True)(x.cuda())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_gradients_under_soft_masks():
    at_home, model, x = built("soft", "prompted")
    for each, batch in ((at_home, x), (model, x.cuda())):
        each(batch).square().mean().backward()
    for a, b in zip(model.prompts, at_home.prompts, strict=True):
        assert (a.grad.cpu() - b.grad).norm() < 1e-3 * b.grad.norm()
