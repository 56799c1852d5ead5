"""Training, evaluation and frozen models from CUDA graphs give what they give eagerly."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from families import build
from own_states import assert_same, weights
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.backbones.straight import Straight
from pcx.ops.prepared import Prepared
from pcx.token_pruning.budget_search import _Evaluation
from pcx.training.execution import Replayed, prepared
from pcx.training.precision import AMP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)
QUIET = {"progress": False}
COMPILER = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself


@pytest.fixture
def loader():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(38, 3, 64, 64), torch.arange(38) % 3)
    return DataLoader(data, batch_size=8, pin_memory=True)  # the last batch has 6


def model_of(dropout=0.0, **arguments):
    torch.manual_seed(1)
    backbone = build("vit", 3, torch.float32).cuda()
    return pcx.VPT(backbone, 5, head_init="keep", dropout=dropout, **arguments)


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lion"])
@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_gives_the_same_bits(loader, opt, amp, dropout):
    found, rows = {}, {}
    for execution in ("eager", "auto"):
        model = model_of(dropout)
        rows[execution] = pcx.fit(
            model,
            loader,
            epochs=10,  # 50 steps
            lr=0.01,
            opt=opt,
            amp=amp,
            clip_grad=1.0,
            val_loader=loader,
            execution=execution,
            **QUIET,
        )
        found[execution] = weights(model)
    assert_same(found["auto"], found["eager"])
    for a, b in zip(rows["auto"], rows["eager"], strict=True):
        times = ("seconds", "loader_share")
        assert {k: v for k, v in a.items() if k not in times} == {
            k: v for k, v in b.items() if k not in times
        }
    assert rows["auto"][-1]["loss"] < rows["auto"][0]["loss"]


@COMPILER
@pytest.mark.parametrize("execution", ["eager", "auto", "compile"])
def test_resuming_continues_as_if_undisturbed(loader, tmp_path, execution):
    arguments = {"epochs": 4, "lr": 0.05, "execution": execution, **QUIET}
    whole = model_of(0.2)
    pcx.fit(whole, loader, checkpoint_dir=tmp_path / "a", **arguments)

    class Interrupted(Exception):
        pass

    class Stops:
        """A loader that ends the run in its third epoch."""

        def __init__(self):
            self.epochs, self.batch_size = 0, 8

        def __len__(self):
            return len(loader)

        def __iter__(self):
            self.epochs += 1
            for i, batch in enumerate(loader):
                if self.epochs == 3 and i == 2:
                    raise Interrupted
                yield batch

    resumed = model_of(0.2)
    with pytest.raises(Interrupted):
        pcx.fit(resumed, Stops(), checkpoint_dir=tmp_path / "b", **arguments)
    again = model_of(0.2)
    pcx.fit(again, Stops(), checkpoint_dir=tmp_path / "b", resume=True, **arguments)
    if execution == "compile":  # the compiler tunes its kernels by timing them, anew for each model
        for name, tensor in weights(again).items():
            torch.testing.assert_close(tensor, weights(whole)[name], rtol=1e-3, atol=1e-4)
    else:
        assert_same(weights(again), weights(whole))


@COMPILER
def test_compiled_training_agrees(loader):
    found = {}
    for execution in ("eager", "compile"):
        model = model_of()
        pcx.fit(model, loader, epochs=3, lr=0.05, execution=execution, **QUIET)
        found[execution] = weights(model)
    for name, tensor in found["compile"].items():
        torch.testing.assert_close(tensor, found["eager"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("execution", ["auto", "cuda-graph"])
def test_a_loss_that_is_not_finite_is_found_and_rolled_back(execution):
    torch.manual_seed(0)
    images = torch.randn(200, 3, 64, 64)
    model = model_of()
    data = TensorDataset(images, torch.arange(200) % 3)
    arguments = {"epochs": 1, "lr": 0.01, "warmup_epochs": 0, "execution": execution, **QUIET}
    pcx.fit(model, DataLoader(data, batch_size=4), **arguments)
    before = weights(model)
    images[101] = torch.nan
    with pytest.raises(pcx.NonFiniteLoss, match="loader: image 1 of .* in epoch 1, step 26"):
        pcx.fit(model, DataLoader(data, batch_size=4), **arguments)
    assert_same(weights(model), before)


def test_labels_are_checked_before_they_reach_the_gpu(loader):
    labels = torch.arange(38) % 3
    labels[30] = 7
    data = TensorDataset(loader.dataset.tensors[0], labels)
    with pytest.raises(ValueError, match="labels 0..7 for a head of 3"):
        pcx.fit(model_of(), DataLoader(data, batch_size=8), epochs=1, lr=0.1, **QUIET)
    with pytest.raises(ValueError, match="labels 0..7 for a head of 3"):
        pcx.evaluate(model_of(), DataLoader(data, batch_size=8))
    torch.zeros(1, device="cuda").item()  # the device is well


def test_what_cannot_be_recorded_goes_on_as_it_is(loader, caplog):
    def waiting(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none") * float(logits.isfinite().all())

    arguments = {"epochs": 2, "lr": 0.05, **QUIET}
    plain, found = model_of(0.2), model_of(0.2)
    pcx.fit(plain, loader, criterion=waiting, execution="eager", **arguments)
    assert not caplog.text
    pcx.fit(found, loader, criterion=waiting, **arguments)
    assert caplog.text.count("running without a CUDA graph: it waits for the GPU") == 1
    assert_same(weights(found), weights(plain))
    with pytest.raises(ValueError, match="execution: 'cuda-graph' cannot record this: it waits"):
        pcx.fit(model_of(), loader, criterion=waiting, execution="cuda-graph", **arguments)


def test_random_draws_go_on_after_a_recording_that_failed():
    """Of a function that torch does not notice to wait, so that the recording itself fails."""

    def run(x):
        event = torch.cuda.current_stream().record_event()
        torch.cuda.synchronize()
        del event
        return F.dropout(x, 0.5)

    found = prepared(lambda: run, DEVICE, "auto")
    x = torch.ones(1000, device=DEVICE)
    torch.manual_seed(3)
    first = [found(x) for _ in range(4)]
    torch.manual_seed(3)
    second = [F.dropout(x, 0.5) for _ in range(4)]
    assert found.refused
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_out_of_memory_while_recording(monkeypatch, caplog):
    def run(x):
        y = x + 1
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**40, device=DEVICE, dtype=torch.uint8)
        return y

    found = prepared(lambda: run, DEVICE, "auto")
    x = torch.ones(3, device=DEVICE)
    for _ in range(4):
        assert torch.equal(found(x), x + 1)
    assert "running without a CUDA graph: OutOfMemoryError" in caplog.text
    must = prepared(lambda: run, DEVICE, "cuda-graph")
    must(x)
    with pytest.raises(torch.OutOfMemoryError):
        must(x)


def test_replays_draw_as_eager_calls_do():
    x = torch.ones(1000, device=DEVICE)
    found = Replayed(lambda: lambda x: F.dropout(x, 0.5), DEVICE)
    torch.manual_seed(5)
    first = [found(x) for _ in range(5)]
    torch.manual_seed(5)
    for drawn in first:
        assert torch.equal(drawn, F.dropout(x, 0.5))


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_frozen_model_replays_a_graph_for_each_shape(amp):
    model = model_of()
    eager = pcx.freeze(model, amp=amp, execution="eager")
    frozen = pcx.freeze(model, amp=amp)
    kept = []
    for batch in (1, 3, 1, 3, 1, 3, 5, 5, 5):
        x = torch.randn(batch, 3, 64, 64, device=DEVICE)
        kept.append((frozen(x), eager(x)))
    for found, expected in kept:  # no later call has overwritten one
        assert torch.equal(found, expected)
    assert len(frozen._run.recordings) == 3
    other = copy.deepcopy(frozen)
    assert torch.equal(other(x), eager(x))
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("amp", "tolerance"), [("no", 1e-4), ("bf16", 3e-2), ("fp16", 5e-3)])
def test_a_frozen_model_computes_what_the_model_does(amp, tolerance):
    model, x = model_of().eval(), torch.randn(3, 3, 64, 64, device=DEVICE)
    with torch.no_grad(), torch.autocast("cuda", AMP[amp], enabled=amp != "no"):
        expected = model(x).float()
    frozen = pcx.freeze(model, amp=amp)
    assert any(isinstance(m, Straight) for m in frozen.modules())
    for _ in range(3):
        assert (frozen(x).float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("ranking", ["pagerank", "random"])
def test_settings_of_a_search_are_recorded(loader, ranking):
    model, found = model_of().eval(), {}
    setting = {"layers": [1, 2], "keep": [0.6, 0.7], "iters": [3, 1], "similar": [1, 0]}
    for execution in ("eager", "cuda-graph"):
        evaluation = _Evaluation(model, loader, 1000, 0, {"ranking": ranking}, "no", execution)
        found[execution] = [evaluation.pruned(setting) for _ in range(2)]
    assert found["eager"] == found["cuda-graph"]
    with pytest.raises(ValueError, match="execution: 'compile' would compile every setting"):
        _Evaluation(model, loader, 10, 0, {}, "no", "compile")


def test_a_frozen_model_that_is_changed_records_anew():
    linear = pcx.Linear(build("vit", 3, torch.float32).cuda())
    frozen, x = pcx.freeze(linear), torch.randn(2, 3, 64, 64, device=DEVICE)
    for _ in range(3):
        before = frozen(x)
    handle = pcx.token_pruning.tome(frozen.backbone, r=2)
    pruned = [frozen(x) for _ in range(3)]
    assert (pruned[-1] - before).norm() > 1e-2 * before.norm()
    for found in pruned:  # merging adds tokens in any order
        torch.testing.assert_close(found, pruned[0])
    handle.remove()
    assert torch.equal(frozen(x), before)
    frozen.double()
    assert frozen(x.double()).dtype == torch.float64
    frozen.float()
    assert torch.equal(frozen(x), before)


def used():
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def fail_to_record():
    """A recording that cannot be ended, of a function that takes 64 MiB."""

    def run(x):
        large = x.expand(2**24).clone()
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return large[:2]

    replayed, x = prepared(lambda: run, DEVICE, "auto"), torch.zeros(1, device=DEVICE)
    for _ in range(3):
        assert torch.equal(replayed(x), torch.zeros(2, device=DEVICE))
    assert replayed.refused


@pytest.mark.parametrize("behind", ["nothing", "a failed recording"])
def test_memory_of_recordings_is_given_back(loader, behind):
    if behind == "a failed recording":
        fail_to_record()
        before = used()
        fail_to_record()
        assert used() <= before + 4 * 2**20
    model, seen = model_of(), []
    for _ in range(4):
        pcx.fit(model, loader, epochs=1, lr=0.01, warmup_epochs=0, **QUIET)
        pcx.evaluate(model, loader)
        seen.append(used())
    assert seen[-1] <= seen[0] + 4 * 2**20, seen


def test_recordings_outlive_what_torch_drops():
    """cuBLAS's workspaces of eager calls, which compiled graphs of torch clear."""
    frozen = pcx.freeze(model_of(), amp="bf16")
    x = torch.randn(4, 3, 64, 64, device=DEVICE)
    for _ in range(3):
        expected = frozen(x)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    for _ in range(3):
        assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_batches_without_gradients_run_on_hopper_kernels(dtype):
    """Outside of recordings; rows that do not begin on 16 bytes go on to Triton."""
    attend, generator = Prepared(), torch.Generator(DEVICE).manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    q, k, v = (made(1, 12, 197, 64) for _ in range(3))
    prefix = made(12, 30, 64), made(12, 30, 64)
    with torch.no_grad():
        expected = pcx.prefix_attention(*(x.float() for x in (q, k, v, *prefix)))
        for _ in range(2):
            torch.testing.assert_close(
                attend(q, k, v, *prefix, None).float(), expected, rtol=2e-2, atol=2e-2
            )
        odd = made(1, 12, 197, 65)[..., 1:]
        expected = pcx.prefix_attention(odd, k, v, *prefix)
        assert torch.equal(attend(odd, k, v, *prefix, None), expected)
    q.requires_grad_()
    for _ in range(2):
        found = attend(q, k, v, *prefix, None)
        assert torch.equal(found, pcx.prefix_attention(q, k, v, *prefix))
        found.sum().backward()


@pytest.mark.parametrize("execution", ["eager", "auto"])
@pytest.mark.parametrize("little", [False, True])
def test_training_from_kept_tokens_is_training_from_images(loader, execution, little, monkeypatch):
    if little:  # they are kept in main memory
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (0, 0))
    found = []
    for cache in (None, "tokens"):
        model = model_of(0.2)
        arguments = {"epochs": 5, "lr": 0.05, "amp": "bf16", "execution": execution, **QUIET}
        pcx.fit(model, loader, cache=cache, **arguments)
        found.append(weights(model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-2, atol=1e-3)


def test_what_warms_up_takes_the_forms_that_are_recorded(loader, monkeypatch):
    """A small batch of a folded VPT runs in another form outside of recordings."""
    monkeypatch.setattr("pcx.models.vpt.block.AMONG", {("cuda", False): 1e12})
    model, forms = model_of().eval(), []
    concat = model.layers[0]._concat
    model.layers[0]._concat = lambda *args: (forms.append("concat"), concat(*args))[1]
    found = pcx.evaluate(model, loader, execution="cuda-graph", amp="bf16")
    assert forms == ["concat"]  # the last batch, of another shape
    monkeypatch.setattr("pcx.models.vpt.block.AMONG", {})
    expected = pcx.evaluate(model, loader, execution="eager", amp="bf16")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
