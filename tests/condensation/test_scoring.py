"""Scores against what they are defined to be, one sample and one prompt at a time."""

import gc
import sys
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import build, images
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import transforms

import pcx
from pcx.backbones.inputs import data_config
from pcx.condensation import SCORES
from pcx.condensation.prompt_path import PromptPath
from pcx.condensation.reading import _share
from pcx.training.loaders import plain_loader

KINDS = ("deep", "shallow", "prefix")
QUIET = {"progress": False}


@pytest.fixture(params=KINDS)
def model(request, backbone):
    torch.manual_seed(0)
    model = pcx.VPT(backbone, 3, kind=request.param, dropout=0.5, head_init="keep")
    with torch.no_grad():
        for prompts in model.prompts:
            prompts.mul_(5)
    return model.train()


def one_at_a_time(model, dataset, of):
    """mean over samples of `of(gradients, prompts)`, each gradient from its own backward pass."""
    model.eval()
    used = [p for p in model.prompts if p.shape[-2]]
    totals = [torch.zeros(p.shape[-2], dtype=torch.float64) for p in used]
    for image, label in dataset:
        loss = F.cross_entropy(model(image[None]), label[None])
        for total, prompts, grad in zip(totals, used, torch.autograd.grad(loss, used), strict=True):
            p, g = (
                t.detach().transpose(0, 1).flatten(1) if t.dim() == 3 else t.detach()
                for t in (prompts, grad)
            )
            total += of(g, p)
    return [t / len(dataset) for t in totals]


def assert_scores(found, expected, tolerance=1e-6):
    found = [s for s in found if len(s)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
        assert (b > 0).all()


@pytest.mark.parametrize("path", ["folded", "concat"])
@pytest.mark.parametrize(
    ("method", "of"),
    [
        ("taylor", lambda g, p: (g * p).norm(dim=1)),
        ("taylor-inner", lambda g, p: (g * p).sum(1).abs()),
    ],
)
def test_gradient_scores_equal_a_loop_over_samples(model, dataset, loader, method, of, path):
    if (model.kind, path) in {("shallow", "folded"), ("prefix", "concat")}:
        pytest.skip("the kind has one path")
    model.path = path
    assert_scores(
        pcx.score(model, loader, method=method, **QUIET), one_at_a_time(model, dataset, of)
    )


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_scores_do_not_depend_on_the_batches(model, dataset, batch):
    expected = pcx.score(model, DataLoader(dataset, batch_size=10), **QUIET)
    shuffled = DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True)
    found = pcx.score(model, shuffled, **QUIET)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["exact", "exact-zero"])
def test_exact_equals_brute_force(model, dataset, loader, method):
    found = pcx.score(model, loader, method=method, **QUIET)
    model.eval()
    everything = [torch.arange(m) for m in model.counts]
    with torch.no_grad():
        for layer, count in enumerate(model.counts):
            for i in range(count):
                kept = list(everything)
                kept[layer] = torch.tensor([j for j in range(count) if j != i])
                other = model.keep(kept if method == "exact" else everything).eval()
                if method == "exact-zero":
                    other.prompts[layer].data[..., i, :] = 0
                changes = [
                    (
                        F.cross_entropy(other(x[None]), y[None])
                        - F.cross_entropy(model(x[None]), y[None])
                    ).abs()
                    for x, y in dataset
                ]
                torch.testing.assert_close(
                    found[layer][i], torch.stack(changes).mean(), rtol=1e-9, atol=0
                )


@pytest.mark.parametrize("path", ["folded", "concat"])
@pytest.mark.parametrize("family", ["vit", "beit", "vit-18x2", "eva02"])
def test_gate_is_the_derivative_by_the_logit(family, path):
    """A prompt doubled is a key whose weight doubled: d/dg at 1, by central differences."""
    model, x = pcx.VPT(build(family), 3, path=path), images(family)
    labels = torch.tensor([1, 2])
    found = pcx.score(
        model, DataLoader(TensorDataset(x, labels), batch_size=2), method="gate", **QUIET
    )
    from pcx.models.vpt.probes import Probe

    model.path = "concat"  # where a gate's value acts, and not its gradient alone

    def losses(layer, i, log_gate):
        gate = torch.zeros(2, 3, dtype=torch.float64)
        gate[:, i] = log_gate
        model.layers[layer].probe = Probe(gate=gate)
        with torch.no_grad():
            out = F.cross_entropy(model(x), labels, reduction="none")
        model.layers[layer].probe = None
        return out

    for layer in range(3):
        for i in range(3):
            step = 1e-4
            slope = (losses(layer, i, step) - losses(layer, i, -step)) / (2 * step)
            torch.testing.assert_close(found[layer][i], slope.abs().mean(), rtol=1e-4, atol=1e-12)


def test_an_infinitely_negative_gate_is_removal(backbone, loader, dataset):
    """What the gate's logit stands for: at minus infinity the prompt is gone."""
    from pcx.models.vpt.probes import Probe

    model = pcx.VPT(backbone, 3).eval()
    x = dataset.tensors[0]
    gate = torch.zeros(10, 3, dtype=torch.float64)
    gate[:, 1] = -torch.inf
    without = model.keep([torch.tensor([0, 2]), torch.arange(3)]).eval()
    model.path, model.layers[0].probe = "concat", Probe(gate=gate)
    torch.testing.assert_close(model(x), without(x))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_gives_the_same_scores(backbone, loader):
    methods = ("taylor", "taylor-inner", "gate", "cls-attention")
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = pcx.VPT(backbone, 3)
    expected = pcx.score(model, loader, method=methods, **QUIET)
    model.compile(backend=compiler, fullgraph=True)
    found = pcx.score(model, loader, method=methods, **QUIET)
    assert graphs
    for name in methods:
        for a, b in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_graph_needs_cuda(model, loader):
    with pytest.raises(ValueError, match="execution: 'cuda-graph' needs CUDA, the device is cpu"):
        pcx.score(model, loader, execution="cuda-graph", **QUIET)


@pytest.mark.parametrize("path", ["folded", "concat"])
@pytest.mark.parametrize("family", ["vit", "beit", "eva02", "deit-distilled"])
def test_cls_attention_is_the_softmax_of_the_cls_row(family, path):
    backbone, x = build(family), images(family)
    model = pcx.VPT(backbone, 3)
    model.path = "concat"
    rows = []

    def watch(layer):
        original = layer._attend_among

        def attend(call, start, width):
            # the mask comes for the tokens without prompts: widen it here by hand
            bias = 0.0
            if call.bias is not None:
                n = call.q.shape[-2]
                bias = torch.zeros(1, call.q.shape[1], n, n, dtype=torch.float64)
                keep = [i for i in range(n) if not start <= i < start + width]
                bias[:, :, torch.tensor(keep)[:, None], torch.tensor(keep)] = call.bias
            weights = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5 + bias).softmax(-1)
            rows.append(weights[:, :, 0, start : start + width].mean((0, 1)).detach())
            return original(call, start, width)

        layer._attend_among = attend

    for layer in model.layers:
        watch(layer)
    model(x)
    for layer in model.layers:
        del layer._attend_among
    model.path = path
    data = DataLoader(TensorDataset(x, torch.tensor([0, 1])), batch_size=2)
    found = pcx.score(model, data, method="cls-attention", **QUIET)
    for a, b in zip(found, rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_several_methods_come_from_one_pass(model, dataset):
    reads = []

    class Counting(TensorDataset):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    loader = DataLoader(Counting(*dataset.tensors), batch_size=4)
    methods = ("taylor", "taylor-inner", "gate", "cls-attention", "magnitude", "random")
    found = pcx.score(model, loader, method=methods, **QUIET)
    assert len(reads) == 10
    assert tuple(found) == methods
    for method in methods:
        alone = pcx.score(model, loader, method=method, **QUIET)
        for a, b in zip(found[method], alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", tuple(SCORES))
def test_scores_have_one_number_per_prompt_and_change_nothing(model, loader, method):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = pcx.score(model, loader, method=method, **QUIET)
    assert [len(s) for s in found] == list(model.counts)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_magnitude_and_random(model, loader):
    found = pcx.score(model, loader, method=("magnitude", "random"), seed=5, **QUIET)
    rows = model.prompts[0].detach()
    norms = (rows**2).sum(-1).sqrt() if model.kind != "prefix" else (rows**2).sum((0, 2)).sqrt()
    torch.testing.assert_close(found["magnitude"][0], norms)
    again = pcx.score(model, loader, method="random", seed=5, **QUIET)
    assert torch.equal(again[0], found["random"][0])


def test_ragged_layers_and_layers_without_prompts(backbone, dataset, loader):
    model = pcx.VPT(backbone, [0, 2])
    found = pcx.score(model, loader, method=("taylor", "gate", "cls-attention"), **QUIET)
    expected = one_at_a_time(model, dataset, lambda g, p: (g * p).norm(dim=1))
    assert [len(s) for s in found["gate"]] == [0, 2]
    assert_scores(found["taylor"], expected)


@pytest.mark.parametrize("how", ["vpt", "timm"])
def test_activation_checkpointing_changes_nothing(backbone, loader, how):
    model = pcx.VPT(backbone, 2)
    expected = pcx.score(model, loader, **QUIET)
    if how == "vpt":
        model.set_grad_checkpointing()
    else:
        model.backbone.set_grad_checkpointing()
    for a, b in zip(pcx.score(model, loader, **QUIET), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert model.layers[0].checkpoint == (how == "vpt")


@pytest.mark.parametrize(("kind", "path"), [("deep", "concat"), ("deep", None), ("shallow", None)])
def test_exact_with_rotations(kind, path):
    """The rotated tokens start further left once a prompt is gone."""
    model = pcx.VPT(build("eva02"), 3, kind=kind, path=path)
    data = DataLoader(TensorDataset(images("eva02"), torch.tensor([1, 2])), batch_size=2)
    (x, labels) = next(iter(data))
    found = pcx.score(model, data, method="exact", **QUIET)
    kept = [[0, 2], *([i for i in range(m)] for m in model.counts[1:])]
    with torch.no_grad():
        losses = [
            F.cross_entropy(m(x), labels, reduction="none") for m in (model.keep(kept), model)
        ]
    torch.testing.assert_close(found[0][1], (losses[0] - losses[1]).abs().mean())


def test_loaders_with_other_samplers(backbone, dataset):
    model = pcx.VPT(backbone, 2)
    expected = pcx.score(model, DataLoader(dataset), **QUIET)
    from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler

    batches = BatchSampler(RandomSampler(dataset), batch_size=4, drop_last=True)
    some = [5, 1, 2]
    for loader, reference in (
        (DataLoader(dataset, batch_sampler=batches), expected),
        (
            DataLoader(dataset, batch_size=2, sampler=SubsetRandomSampler(some), drop_last=True),
            pcx.score(model, DataLoader(Subset(dataset, some)), **QUIET),
        ),
    ):
        for a, b in zip(pcx.score(model, loader, **QUIET), reference, strict=True):
            torch.testing.assert_close(a, b)


def test_cls_attention_needs_a_cls_token(loader):
    with pytest.raises(ValueError, match=r"'cls-attention' needs a \[CLS\] token"):
        pcx.score(pcx.VPT(build("siglip"), 2), loader, method="cls-attention", **QUIET)


def test_own_criterion(backbone, dataset, loader):
    model = pcx.VPT(backbone, 2)
    weighted = pcx.score(
        model,
        loader,
        criterion=lambda logits, y: 3 * F.cross_entropy(logits, y, reduction="none"),
        **QUIET,
    )
    plain = pcx.score(model, loader, **QUIET)
    torch.testing.assert_close(weighted[0], 3 * plain[0])


def test_it_says_what_it_read(backbone, loader, capsys):
    pcx.score(pcx.VPT(backbone, 2), loader)
    said = " ".join(capsys.readouterr().out.split())
    assert "scored 4 prompts on 10 samples; 10 samples in order" in said


def test_bad_input_is_named(backbone, dataset, loader):
    model = pcx.VPT(backbone, 2)
    images, labels = dataset.tensors
    with pytest.raises(ValueError, match="method: got"):
        pcx.score(model, loader, method="grad", **QUIET)
    with pytest.raises(ValueError, match="no prompts to score"):
        pcx.score(pcx.VPT(backbone, 0), loader, **QUIET)
    with pytest.raises(ValueError, match="yielded no sample"):
        pcx.score(model, DataLoader(Subset(dataset, [])), **QUIET)
    with pytest.raises(ValueError, match="criterion: gave shape"):
        pcx.score(model, loader, criterion=lambda a, b: a.mean(), **QUIET)
    with pytest.raises(ValueError, match="labels 5"):
        pcx.score(model, DataLoader(TensorDataset(images, labels + 5)), **QUIET)
    images = images.clone()
    images[7, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the image of sample 7 is not finite"):
        pcx.score(model, DataLoader(TensorDataset(images, labels), batch_size=4), **QUIET)


def test_augmentation_is_taken_away():
    class Images(torch.utils.data.Dataset):
        def __init__(self, eval_transform=None):
            self.transform = transforms.Compose([transforms.RandomHorizontalFlip()])
            self.eval_transform = eval_transform

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return self.transform(i), 0

    config = data_config(build("vit"))
    plain = plain_loader(DataLoader(Images(float), shuffle=True, drop_last=True), config)
    assert plain.loader.dataset.transform is float
    assert "evaluation transform" in plain.description
    weighted = WeightedRandomSampler([1.0] * 5, 5)
    drawn = plain_loader(DataLoader(Images(float), batch_size=4, sampler=weighted), config)
    assert drawn.loader.dataset.transform is float
    assert drawn.loader.sampler is weighted
    assert "as WeightedRandomSampler gives them" in drawn.description
    both = ConcatDataset([Images(float), Images(float)])
    plain = plain_loader(DataLoader(both), config)
    assert all(part.transform is float for part in plain.loader.dataset.datasets)
    hidden = transforms.RandomApply([transforms.CenterCrop(3)])
    for transform in (hidden, nn.Sequential(hidden), transforms.GaussianBlur(3)):
        dataset = Images(float)
        dataset.transform = transform
        assert plain_loader(DataLoader(dataset), config).loader.dataset.transform is float

    class Half(Subset):
        def __getitems__(self, places):
            return [(0.5 * image, label) for image, label in super().__getitems__(places)]

    plain = plain_loader(DataLoader(ConcatDataset([Half(Images(float), [4])])), config)
    assert next(iter(plain.loader.dataset.datasets)).__getitems__([0]) == [(2.0, 0)]
    subset = Subset(Images(), [3, 1])
    plain = plain_loader(DataLoader(subset), config)
    assert plain.loader.dataset.indices == [3, 1]
    assert not any(
        "Random" in type(t).__name__ for t in plain.loader.dataset.dataset.transform.transforms
    )
    assert isinstance(subset.dataset.transform.transforms[0], transforms.RandomHorizontalFlip)


@pytest.mark.parametrize("path", ["folded", "concat"])
def test_nothing_outlives_scoring(backbone, loader, path):
    def scored():
        model = pcx.VPT(backbone, 3)
        model.path = path
        pcx.score(model, loader, **QUIET)
        with pytest.raises(ValueError, match="is not finite"):
            pcx.score(model, loader, criterion=lambda x, y: x.sum(1) * float("nan"), **QUIET)
        return weakref.ref(model)

    alive = scored()
    gc.collect()
    assert alive() is None


class Unbatched(torch.autograd.Function):
    """Twice x, in a way that torch cannot batch."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.numpy() * 2)


def test_a_block_whose_backward_cannot_be_batched(backbone, loader):
    class Doubled(nn.Module):
        def forward(self, x):
            return Unbatched.apply(x)

    for block in backbone.blocks:
        block.norm1 = nn.Sequential(block.norm1, Doubled())
    model, found = pcx.VPT(backbone, 3), {}
    for path in ("folded", "concat"):
        model.path = path
        found[path] = pcx.score(model, loader, **QUIET)
    for a, b in zip(found["folded"], found["concat"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("family", "norm", "matrix"),
    [
        ("vit", True, True),
        ("eva02", True, True),
        ("vit-post-norm", False, True),  # no norm before the attention
        ("vit-qk-norm", True, False),  # a norm behind the projection
        ("vit-18x2", False, False),  # two norms side by side
    ],
)
def test_the_prompts_path_is_recognised(family, norm, matrix):
    """Scores are right without; this is what makes them fast."""
    model = pcx.VPT(build(family), 3).eval()
    for layer, prompts in zip(model.layers, model.prompts, strict=True):
        path = PromptPath(layer, prompts)
        assert ((path.forward.norm is not None), (bool(path.matrices))) == (norm, matrix)


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2 + x


class Scaled(nn.LayerNorm):
    def forward(self, x, scale=2.0):
        return super().forward(x) * scale


class InATuple(nn.LayerNorm):
    def forward(self, x):
        return (super().forward(x),)


@pytest.mark.parametrize("norm", [Doubled, Scaled, InATuple])
def test_a_layer_norm_of_another_kind_is_not_taken_for_one(backbone, dataset, loader, norm):
    block = backbone.blocks[0]
    block.norm1 = norm(block.norm1.normalized_shape, dtype=torch.float64)
    if norm is InATuple:
        inner = block.attn.forward
        block.attn.forward = lambda x, **options: inner(x[0], **options)
    if norm is Scaled:
        plain = block.norm1.forward
        block.norm1.forward = lambda x: plain(x, 3.0)
    model = pcx.VPT(backbone, 3).eval()
    paths = [PromptPath(layer, p) for layer, p in zip(model.layers, model.prompts, strict=True)]
    assert [path.forward.norm is None for path in paths] == [True, False]
    found = pcx.score(model, loader, **QUIET)
    assert_scores(found, one_at_a_time(model, dataset, lambda g, p: (g * p).norm(dim=1)))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_computes_no_layer_below_the_one_it_changes(backbone, loader, kind):
    model = pcx.VPT(backbone, 2, kind=kind).eval()
    calls = [0] * len(backbone.blocks)

    def count(i, *_):
        calls[i] += 1

    for i, layer in enumerate(model.layers):
        layer.block.register_forward_hook(partial(count, i))
    pcx.score(model, loader, method="exact", **QUIET)
    # Once whole, then once for every prompt of this layer and of those below it.
    once = [1 + sum(model.counts[: i + 1]) for i in range(len(calls))]
    assert calls == [len(loader) * m for m in once]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["exact", "exact-zero"])
def test_exact_goes_on_where_it_was_stopped(backbone, dataset, tmp_path, method):
    model = pcx.VPT(backbone, [2, 3]).eval()
    loader = DataLoader(dataset, batch_size=4)
    arguments = {"method": method, "checkpoint_dir": tmp_path, **QUIET}
    expected = pcx.score(model, loader, method=method, **QUIET)
    seen, left = [], [2]

    def criterion(logits, labels):
        seen.append(len(labels))
        if len(labels) < 4:  # in the last batch
            left[0] -= 1
            if left[0] == 0:
                raise Stopped
        return F.cross_entropy(logits, labels, reduction="none")

    arguments["criterion"] = criterion
    with pytest.raises(Stopped):
        pcx.score(model, loader, **arguments)
    seen.clear()
    found = pcx.score(model, loader, resume=True, **arguments)
    assert all(map(torch.equal, found, expected))
    assert set(seen) == {len(dataset) % 4}  # of the last batch alone
    with pytest.raises(ValueError, match="resume: 10 samples in 3 batches are done, where the l"):
        pcx.score(model, DataLoader(dataset, batch_size=5), resume=True, **arguments)
    with pytest.raises(ValueError, match="resume: 10 samples in 3 batches are done, where the l"):
        pcx.score(model, DataLoader(dataset, batch_size=2), resume=True, **arguments)
    with pytest.raises(ValueError, match="resume: .* is of another criterion"):
        pcx.score(model, loader, resume=True, **{**arguments, "criterion": None})
    with pytest.raises(ValueError, match="resume: .* is of another model; give the same, or"):
        pcx.score(pcx.VPT(backbone, [2, 3]), loader, resume=True, **arguments)
    for content in (b"?", b""):
        (tmp_path / f"{method}.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint_dir: .*\.pt is no file of pcx.score"):
            pcx.score(model, loader, resume=True, **arguments)
    with pytest.raises(ValueError, match="checkpoint_dir: .* is a file, expected a folder"):
        pcx.score(model, loader, **{**arguments, "checkpoint_dir": tmp_path / f"{method}.pt"})
    with pytest.raises(ValueError, match="checkpoint_dir: only .* keep sums, got"):
        pcx.score(model, loader, checkpoint_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="resume: needs checkpoint_dir"):
        pcx.score(model, loader, method=method, resume=True, **QUIET)


@pytest.mark.parametrize("path", ["folded", "concat"])
def test_scores_in_bfloat16(path):
    torch.manual_seed(0)
    model = pcx.VPT(build("vit", dtype=torch.float32), 16, path=path).eval()
    loader = DataLoader(TensorDataset(images("vit", 8).float(), torch.arange(8) % 3), 4)
    expected = pcx.score(model, loader, **QUIET)
    found = pcx.score(model, loader, amp="bf16", **QUIET)
    for a, b in zip(found, expected, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02 * float(b.max()))
    with pytest.raises(ValueError, match="amp: got 'fp8', expected one of"):
        pcx.score(model, loader, amp="fp8", **QUIET)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_cast_once_to_the_same_bits_and_left_alone(monkeypatch, kind):
    torch.manual_seed(0)
    model = pcx.VPT(build("vit", dtype=torch.float32), 4, kind=kind).eval()
    loader = DataLoader(TensorDataset(images("vit", 8).float(), torch.arange(8) % 3), 4)
    before = dict(model.named_parameters())
    dtypes = set()
    linear = model.layers[0].block.mlp.fc1
    hook = linear.register_forward_pre_hook(lambda m, _: dtypes.add(m.weight.dtype))
    once = pcx.score(model, loader, amp="bf16", **QUIET)
    assert dtypes == {torch.bfloat16}
    hook.remove()
    with pytest.raises(ZeroDivisionError):
        pcx.score(model, loader, amp="bf16", criterion=lambda *_: 1 / 0, **QUIET)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    monkeypatch.setattr(
        sys.modules["pcx.condensation.scoring"], "weights_cast", lambda *_: nullcontext()
    )
    assert all(map(torch.equal, once, pcx.score(model, loader, amp="bf16", **QUIET)))


def test_scores_in_float32_and_bfloat16_rank_as_in_float64():
    torch.manual_seed(0)
    model = pcx.VPT(build("vit", dtype=torch.float32), 40).eval()
    with torch.no_grad():
        for prompts in model.prompts:
            prompts.mul_(torch.rand(40, 1) * 4 + 1)
    loader = DataLoader(TensorDataset(images("vit", 8).float(), torch.arange(8) % 3), 4)
    narrow = {amp: pcx.score(model, loader, amp=amp, **QUIET) for amp in ("no", "bf16")}
    wide = DataLoader(TensorDataset(images("vit", 8), torch.arange(8) % 3), 4)
    exact = pcx.score(model.double(), wide, **QUIET)
    for full, half, right in zip(narrow["no"], narrow["bf16"], exact, strict=True):
        assert ((full - right).abs() / right).max() < 1e-4
        ranks = torch.stack([half, right]).argsort(-1).argsort(-1).double()
        assert torch.corrcoef(ranks)[0, 1] > 0.99


class Uneven(BatchSampler):
    """Batches of several sizes, and a batch_size that does not say so."""

    def __init__(self):
        super().__init__(range(10), 3, drop_last=True)

    def __iter__(self):
        yield from ([0, 1], [2], [3, 4, 5, 6], [7, 8, 9])

    def __len__(self):
        return 4


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize("processes", [2, 3, 7])
@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(range(10), batch_size=3),
        DataLoader(range(10), batch_size=None),
        DataLoader(range(10), batch_sampler=Uneven()),
        DataLoader(Streamed(), batch_size=4),
        [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]],
    ],
)
def test_processes_read_every_sample_once(loader, processes):
    shares = [_share(loader, rank, processes) for rank in range(processes)]
    for _ in range(2):
        read = [
            int(i) for share in shares for batch in share for i in torch.as_tensor(batch).view(-1)
        ]
        assert sorted(read) == list(range(10))


def test_a_loader_that_is_divided_already_is_refused():
    loader = DataLoader(range(10), sampler=DistributedSampler(range(10), 2, 0))
    with pytest.raises(ValueError, match="loader: it is divided among processes already"):
        _share(loader, 0, 2)


def test_loaders_of_odd_batches(backbone, dataset):
    model = pcx.VPT(backbone, 2).eval()
    xs, ys = (torch.stack(t) for t in zip(*dataset, strict=True))
    expected = pcx.score(model, [(xs, ys)], method=tuple(SCORES), **QUIET)
    found = pcx.score(
        model, [(xs[:4], ys[:4]), (xs[:0], ys[:0]), (xs[4:], ys[4:])], method=tuple(SCORES), **QUIET
    )
    for name in tuple(SCORES):
        assert_scores(found[name], expected[name])
    with pytest.raises(ValueError, match="loader: it yields single samples; give it a batch_size"):
        pcx.score(model, DataLoader(dataset, batch_size=None), **QUIET)
    with pytest.raises(ValueError, match="loader: it yielded no sample"):
        pcx.score(model, iter([(xs, ys)]), method=("taylor", "exact"), **QUIET)
    with torch.inference_mode():
        assert_scores(pcx.score(model, [(xs, ys)], **QUIET), expected["taylor"])
