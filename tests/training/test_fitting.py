"""Training: the recipe, resuming, and stopping on a loss that is not finite."""

import multiprocessing
import os
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.training.run import Run

QUIET = {"progress": False}


def new_model(backbone, **arguments):
    torch.manual_seed(0)
    return pcx.VPT(backbone, 3, head_init="keep", **arguments)


def without_times(history):
    times = ("seconds", "loader_share")
    return [{k: v for k, v in row.items() if k not in times} for row in history]


def weights(model):
    return {k: v.detach().clone() for k, v in model.trainable().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_reports(backbone, loader):
    model = new_model(backbone)
    frozen = {k: v.clone() for k, v in backbone.state_dict().items()}
    history = pcx.fit(model, loader, epochs=30, lr=0.3, val_loader=loader, **QUIET)
    assert [row["epoch"] for row in history] == list(range(1, 31))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["samples"] == 10
    found = pcx.evaluate(model, loader)
    assert found["samples"] == 10
    assert found["accuracy"] == pytest.approx(history[-1]["val_accuracy"])
    assert found["loss"] == pytest.approx(history[-1]["val_loss"])
    assert model.trained_lr == 0.3
    assert all(torch.equal(v, frozen[k]) for k, v in backbone.state_dict().items())


def test_evaluate_equals_a_plain_loop(backbone, dataset):
    model = new_model(backbone).eval()
    images, labels = dataset.tensors
    logits = model(images)
    found = pcx.evaluate(model, DataLoader(dataset, batch_size=3))
    assert found["accuracy"] == pytest.approx(100 * float((logits.argmax(1) == labels).sum()) / 10)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert found["loss"] == pytest.approx(float(expected.detach()))


def test_the_schedule_warms_up_and_falls_to_zero(backbone, loader):
    history = pcx.fit(new_model(backbone), loader, epochs=20, lr=0.1, warmup_epochs=4, **QUIET)
    rates = [row["lr"] for row in history]
    assert rates[0] < rates[1] < rates[2] < rates[3] == pytest.approx(0.1, rel=0.1)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert 0 < rates[-1] < 0.002


def test_base_lr_scales_with_the_batch(backbone, loader):
    model = new_model(backbone)
    pcx.fit(model, loader, epochs=1, base_lr=6.4, **QUIET)
    assert model.trained_lr == pytest.approx(6.4 * 4 / 256)


def test_weight_decay_is_on_prompts_and_head_weight_only(backbone, loader):
    model = new_model(backbone)
    before = weights(model)

    def no_gradient(logits, labels):
        return 0 * logits.sum(-1)

    arguments = {"epochs": 1, "lr": 0.1, "weight_decay": 0.5, "warmup_epochs": 0}
    pcx.fit(model, loader, criterion=no_gradient, **arguments, **QUIET)
    after = weights(model)
    assert torch.equal(after["backbone.head.bias"], before["backbone.head.bias"])
    for name in ("prompts.0", "prompts.1", "backbone.head.weight"):
        assert after[name].norm() < before[name].norm()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_resuming_continues_to_the_same_weights(backbone, loader, tmp_path, monkeypatch, dropout):
    arguments = {"epochs": 4, "lr": 0.1, "seed": 3, **QUIET}
    whole = new_model(backbone, dropout=dropout)
    expected = pcx.fit(whole, loader, **arguments)

    class Interrupted(Exception):
        pass

    def stop_after_two(self, file):
        save(self, file)
        if len(self.history) == 2:
            raise Interrupted

    save = Run.save
    monkeypatch.setattr(Run, "save", stop_after_two)
    with pytest.raises(Interrupted):
        pcx.fit(new_model(backbone, dropout=dropout), loader, checkpoint_dir=tmp_path, **arguments)
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = new_model(backbone, dropout=dropout)
    history = pcx.fit(resumed, loader, checkpoint_dir=tmp_path, resume=True, **arguments)
    assert_equal(weights(resumed), weights(whole))
    assert without_times(history) == without_times(expected)
    files = {"last.pt", "config.json", "environment.json", "history.csv"}
    assert {p.name for p in tmp_path.iterdir()} == files


def test_resuming_another_run_is_an_error(backbone, loader, tmp_path):
    arguments = {"epochs": 1, "checkpoint_dir": tmp_path, **QUIET}
    pcx.fit(new_model(backbone), loader, lr=0.1, **arguments)
    with pytest.raises(ValueError, match=r"of another run: lr 0.1 \(now 0.2\)"):
        pcx.fit(new_model(backbone), loader, lr=0.2, resume=True, **arguments)
    with pytest.raises(
        ValueError, match=r"another run: counts \[3, 3\] \(now \[2, 2\]\), prompts.0"
    ):
        pcx.fit(pcx.VPT(backbone, 2), loader, lr=0.1, resume=True, **arguments)
    smooth = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"criterion cross-entropy \(now CrossEntropyLoss"):
        pcx.fit(new_model(backbone), loader, lr=0.1, resume=True, criterion=smooth, **arguments)
    with torch.no_grad():
        backbone.blocks[0].mlp.fc1.bias[0] += 1
    with pytest.raises(ValueError, match="of another run: frozen "):
        pcx.fit(new_model(backbone), loader, lr=0.1, resume=True, **arguments)
    (tmp_path / "last.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a checkpoint of pcx.fit"):
        pcx.fit(new_model(backbone), loader, lr=0.1, resume=True, **arguments)


def test_a_crash_while_writing_keeps_the_last_checkpoint(backbone, loader, tmp_path, monkeypatch):
    arguments = {"lr": 0.1, "checkpoint_dir": tmp_path, **QUIET}
    pcx.fit(new_model(backbone), loader, epochs=1, **arguments)
    good = (tmp_path / "last.pt").read_bytes()

    def half(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        pcx.fit(new_model(backbone), loader, epochs=1, overwrite=True, **arguments)
    assert (tmp_path / "last.pt").read_bytes() == good


def test_a_loss_that_is_not_finite_stops_and_loses_nothing(backbone, loader, tmp_path):
    model = new_model(backbone)
    seen = []

    def breaks_in_epoch_2(logits, labels):
        seen.append(1)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses * float("nan") if len(seen) == 5 else losses

    arguments = {"epochs": 4, "lr": 0.1, "checkpoint_dir": tmp_path, **QUIET}
    with pytest.raises(pcx.NonFiniteLoss, match=r"nan in epoch 2, step 2: lower lr \(now 0.1"):
        pcx.fit(model, loader, criterion=breaks_in_epoch_2, **arguments)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(saved["history"]) == 1
    assert_equal(weights(model), saved["parameters"])


def test_weights_that_overflow_are_never_saved(backbone, dataset, tmp_path):
    model = new_model(backbone).float()
    images, labels = dataset.tensors
    loader = DataLoader(TensorDataset(images.float(), labels), batch_size=10)
    before = weights(model)
    arguments = {"epochs": 3, "checkpoint_dir": tmp_path, "warmup_epochs": 0, "weight_decay": 0.0}

    def steep(logits, labels):
        return 1e6 * torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    with pytest.raises(pcx.NonFiniteLoss, match="no longer finite after epoch 1: lower lr"):
        pcx.fit(model, loader, lr=1e38, criterion=steep, **arguments, **QUIET)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "environment.json"}
    assert_equal(weights(model), before)


def test_precision_does_not_stick(backbone, dataset):
    model = new_model(backbone).float()
    images, labels = dataset.tensors
    loader = DataLoader(TensorDataset(images.float(), labels), batch_size=5)
    exact = pcx.evaluate(model, loader)
    rough = pcx.evaluate(model, loader, amp="bf16")
    assert rough["loss"] != exact["loss"]
    assert pcx.evaluate(model, loader) == exact
    assert model(images.float()).dtype == torch.float32
    assert "forward" not in vars(model)
    assert not any("accelerate" in name for name in vars(model))


def test_the_callers_own_accelerator_is_left_alone(backbone, loader):
    from accelerate import Accelerator

    mine = Accelerator(mixed_precision="bf16")
    pcx.evaluate(new_model(backbone), loader)
    assert mine.mixed_precision == "bf16"


def test_the_callers_loader_is_left_alone(backbone, dataset):
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    sampler = loader.batch_sampler.sampler
    pcx.fit(new_model(backbone), loader, epochs=1, lr=0.1, **QUIET)
    assert loader.batch_sampler.sampler is sampler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0, "lr": 0.1}, "epochs: 0"),
        ({"epochs": 1}, "lr: give lr or base_lr"),
        ({"epochs": 1, "lr": 0.1, "base_lr": 1.0}, "lr: give lr or base_lr"),
        ({"epochs": 1, "lr": -1.0}, "lr: -1.0"),
        ({"epochs": 1, "lr": 0.1, "warmup_epochs": 1}, "warmup_epochs: 1"),
        ({"epochs": 1, "lr": 0.1, "weight_decay": -1.0}, "weight_decay: -1.0"),
        ({"epochs": 1, "lr": 0.1, "clip_grad": 0.0}, "clip_grad: 0.0"),
        ({"epochs": 1, "lr": 0.1, "amp": "fp8"}, "amp: got 'fp8'"),
        ({"epochs": 1, "lr": 0.1, "resume": True}, "resume: needs checkpoint_dir"),
    ],
)
def test_bad_arguments_are_named(backbone, loader, arguments, message):
    with pytest.raises(ValueError, match=message):
        pcx.fit(new_model(backbone), loader, **arguments, **QUIET)


def test_bad_data_is_named(backbone, dataset):
    model = new_model(backbone)
    images, labels = dataset.tensors
    wrong = DataLoader(TensorDataset(images, labels + 1), batch_size=4)
    with pytest.raises(ValueError, match=r"labels 1\.\.3 for a head of 3 classes"):
        pcx.fit(model, wrong, epochs=1, lr=0.1, **QUIET)
    column = DataLoader(TensorDataset(images, labels[:, None]), batch_size=4)
    with pytest.raises(ValueError, match=r"labels of shape \(4, 1\)"):
        pcx.evaluate(model, column)
    with pytest.raises(ValueError, match=r"it yields list of 1, expected \(images, labels\)"):
        pcx.evaluate(model, DataLoader(TensorDataset(images)))
    with pytest.raises(ValueError, match="yielded no sample"):
        pcx.evaluate(model, DataLoader(TensorDataset(images[:0], labels[:0])))
    with pytest.raises(ValueError, match="criterion: gave shape"):
        pcx.evaluate(model, [(images, labels)], criterion=lambda logits, labels: logits.mean())


def test_the_output_says_what_is_trained_and_how_images_are_normalised(backbone, loader, capsys):
    pcx.fit(new_model(backbone), loader, epochs=1, lr=0.1)
    said = " ".join(capsys.readouterr().out.split())
    assert "training 219 of" in said  # 2 x 3 x 24 prompts, 24 x 3 + 3 head
    assert "normalised by mean (0.5, 0.5, 0.5)" in said


SCORES = ("taylor", "gate", "exact")


def _one_of_two(rank, folder, queue):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29577",
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    )
    model = pcx.VPT(backbone, [3, 0])
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(11, 3, 32, 32, generator=generator), torch.arange(11) % 3)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    pcx.evaluate(model, loader)  # which must not keep fit from synchronising
    history = pcx.fit(model, loader, epochs=2, lr=0.1, val_loader=loader, progress=False)
    found = pcx.evaluate(model, DataLoader(data, batch_size=4))
    scores = pcx.score(model, loader, method=SCORES, progress=False)
    first = {name: by_layer[0].tolist() for name, by_layer in scores.items()}
    exact = _without_processes(model, data)
    queue.put(
        (rank, history[-1]["samples"], found, model.prompts[0].detach().sum().item(), first, exact)
    )
    torch.distributed.destroy_process_group()


def _without_processes(model, data) -> dict:
    """The same scores by one process that reads everything."""
    with mock.patch("pcx.condensation.reading._processes", return_value=(0, 1)):
        scores = pcx.score(model, DataLoader(data, batch_size=3), method=SCORES, progress=False)
    return {name: by_layer[0].tolist() for name, by_layer in scores.items()}


def test_two_processes_count_each_sample_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_one_of_two, args=(r, tmp_path, queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    results = sorted(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    (_, samples, found, prompts, scores, alone), (_, *others) = results
    assert samples == found["samples"] == 11
    assert others == [samples, found, prompts, scores, alone]
    for name in scores:
        assert scores[name] == pytest.approx(alone[name], rel=1e-5)
