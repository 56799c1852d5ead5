"""The protocol: grids, seeds, choosing on val, divergence, and going on after an end."""

import dataclasses
import itertools
import random

import pytest
import timm
import torch
from tiny_tasks import Unread, tiny_backbone, tiny_task

import pcx
from pcx.experiments.grids import GRIDS, Cell, Changes, Grid, grid_of
from pcx.experiments.ledger import Ledger
from pcx.experiments.protocol import Protocol, Rung, choose
from pcx.experiments.study import Study
from pcx.experiments.trials import Recipe, Setup, StepTimes, Trial, counted
from pcx.models import METHODS
from pcx.training.losses import NonFiniteInput, NonFiniteLoss

CELLS = Grid((0.01, 0.1), (0.0,), (None, 1.0)).cells(6)
SETTINGS = {"epochs": 1}


def protocol(setup, folder, **more):
    study = Study(setup, Ledger(folder, SETTINGS, "cpu"), say=lambda line: None, **more)
    return Protocol(study)


class TestGrids:
    def test_cells_are_all_combinations_in_a_fixed_order(self):
        cells = Grid((1.0, 2.0), (0.0, 0.1), (None, 1.0), "adamw").cells(64)
        expected = itertools.product((1.0, 2.0), (0.0, 0.1), (None, 1.0))
        assert cells == tuple(Cell(*each, "adamw") for each in expected)

    def test_published_rates_are_scaled_by_the_batch(self):
        rates = {cell.lr for cell in grid_of("vpt").cells(64)}
        assert (min(rates), max(rates)) == (0.005 / 4, 500 / 4)
        assert {cell.lr for cell in grid_of("sct").cells(64)} == {1e-4, 1e-3, 3e-3, 1e-2, 3e-2}
        assert {cell.opt for cell in grid_of("full").cells(64)} == {"adamw"}

    def test_every_method_has_a_grid_and_others_get_that_of_small_modules(self):
        assert set(GRIDS) == {name for name in METHODS if not name.startswith("test-")}
        assert grid_of("mine") == GRIDS["adapter"]

    def test_rates_of_a_user_are_rates_themselves(self):
        grid = grid_of("vpt", Changes(lr=[0.5], clip_grad=[None]))
        assert grid.cells(64) == tuple(Cell(0.5, w, None, "momentum") for w in (1e-4, 1e-2))
        assert grid_of("sct", Changes(opt="sgd")).cells(8)[0].opt == "sgd"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (Changes(lr=[]), r"lr: \[\], expected some values"),
            (Changes(lr=[1, 1]), "none twice"),
            (Changes(lr=[-1]), "lr: -1, expected a positive number"),
            (Changes(weight_decay=[-1]), "weight_decay: -1"),
            (Changes(clip_grad=[0]), "clip_grad: 0"),
            (Changes(opt="adamm"), "opt: 'adamm'.* Did you mean"),
        ],
    )
    def test_values_out_of_range_are_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            grid_of("vpt", changes)


class TestSeeds:
    def test_each_trial_has_its_own_which_never_changes(self):
        cell = Cell(0.1, 0.0, None, "momentum")
        trial = Trial("digits", "vpt", cell, "train", 0)
        others = [
            trial._replace(task="sprites:ori"),
            trial._replace(method="linear"),
            trial._replace(cell=cell._replace(lr=0.2)),
            trial._replace(split="trainval"),
            trial._replace(seed=1),
        ]
        assert len({t.own_seed for t in [trial, *others]}) == 6
        assert trial.own_seed == 31223872

    def test_the_order_of_the_cells_changes_nothing(self, setup):
        trials = [Trial("tiny:a", m, c, "train", 0) for m in ("vpt", "sct:k=3") for c in CELLS]
        first = {trial: setup.run(trial) for trial in trials}
        random.Random(1).shuffle(trials)
        again = {trial: setup.run(trial) for trial in trials}
        for trial, result in first.items():
            assert again[trial]["loss"] == result["loss"]
            assert again[trial]["accuracy"] == result["accuracy"]
        assert len({result["loss"] for result in first.values()}) > 4

    def test_the_heads_of_keep_do_not_depend_on_the_order(self, setup):
        setup.recipe = dataclasses.replace(setup.recipe, head_init="keep")
        setup.new_backbone = lambda classes: torch.nn.ParameterDict({"head": torch.randn(classes)})
        torch.manual_seed(4)
        before = setup.backbone(3)["head"]
        setup._built.clear()
        torch.manual_seed(5)
        assert torch.equal(setup.backbone(3)["head"], before)


class TestChoosing:
    def test_by_accuracy_then_loss_then_order(self):
        def chosen(*found):
            results = [
                {"diverged": found is None, **(dict(zip(("accuracy", "loss"), found, strict=True))
                                               if found else {})}
                for found in found
            ]  # fmt: skip
            return choose("t", "m", CELLS[: len(found)], results)

        assert chosen((50.0, 1.0), (60.0, 2.0), (40.0, 0.1)).cell == CELLS[1]
        assert chosen((50.0, 1.0), (50.0, 0.9), (50.0, 1.1)).cell == CELLS[1]
        assert chosen((50.0, 1.0), (50.0, 1.0)).cell == CELLS[0]
        found = chosen(None, (0.0, 9.0), None)
        assert found[:4] == (CELLS[1], 0.0, 2, 3)
        with pytest.raises(NonFiniteLoss, match=r"m on t: all 2 cells .* rates 0.01 to 0.01; give"):
            chosen(None, None)

    def test_a_rate_at_the_edge_of_the_grid_is_named(self):
        cells = Grid((1.0, 3.0, 2.0), (0.0,)).cells(1)
        edges = []
        for best in range(3):
            accuracies = [50.0 + (i == best) for i in range(3)]
            results = [{"diverged": False, "accuracy": a, "loss": 1.0} for a in accuracies]
            edges.append(choose("t", "m", cells, results).edge)
        assert edges == ["lowest", "highest", ""]
        assert choose("t", "m", cells[:1], results[:1]).edge == ""

    def test_test_is_not_touched_before_val_has_chosen(self, setup, tmp_path):
        setup.tasks = {"tiny:a": tiny_task(test=Unread())}
        ran = protocol(setup, tmp_path)
        (chosen,) = ran.search([("tiny:a", "linear", CELLS)])
        assert chosen.cell in CELLS
        with pytest.raises(AssertionError, match="the test split was touched"):
            ran.test([("tiny:a", "linear", chosen.cell)], [0])

    def test_what_is_tested_is_trained_on_trainval_with_each_seed(self, setup, tmp_path, trained):
        (results,) = protocol(setup, tmp_path).test([("tiny:a", "linear", CELLS[2])], [0, 1])
        assert [(t.split, t.seed, t.cell) for t in trained] == [
            ("trainval", 0, CELLS[2]),
            ("trainval", 1, CELLS[2]),
        ]
        assert results[0]["loss"] != results[1]["loss"]
        model = setup.build(trained[1])
        pcx.fit(
            model,
            setup.tasks["tiny:a"].loader("trainval", 6),
            epochs=1,
            **CELLS[2]._asdict(),
            seed=trained[1].own_seed,
            progress=False,
        )
        found = pcx.evaluate(model, setup.tasks["tiny:a"].loader("test", 6))
        assert results[1]["loss"] == found["loss"]

    def test_a_task_without_a_split_is_refused(self, setup, tmp_path):
        task = tiny_task()
        del task.splits["test"]
        setup.tasks = {"tiny:a": task}
        with pytest.raises(ValueError, match="task: tiny:a has no split 'test'"):
            protocol(setup, tmp_path)


class TestRungs:
    def test_the_best_of_a_rung_are_trained_anew_for_longer(self, setup, tmp_path, trained):
        setup.recipe = dataclasses.replace(setup.recipe, epochs=4)
        rungs = (Rung(0.25, 1.0), Rung(0.5, 0.5), Rung(1.0, 0.5))
        ran = protocol(setup, tmp_path)
        ran.rungs = rungs
        searches = [("tiny:a", "linear", CELLS), ("tiny:b", "linear", CELLS)]
        found = ran.search(searches)
        assert [t.epochs for t in trained].count(1) == 8
        assert [t.epochs for t in trained].count(2) == 4
        assert [t.epochs for t in trained].count(None) == 2
        for (task, _, cells), chosen in zip(searches, found, strict=True):
            of_task = [t for t in trained if t.task == task]
            first = {t.cell: ran.study.result_of(t) for t in of_task if t.epochs == 1}
            best = sorted(first, key=lambda c: (-first[c]["accuracy"], first[c]["loss"]))[:2]
            assert {t.cell for t in of_task if t.epochs == 2} == set(best)
            (last,) = (t for t in of_task if t.epochs is None)
            assert (chosen.cell, chosen.cells) == (last.cell, len(cells))
            assert chosen.accuracy == ran.study.result_of(last)["accuracy"]


class TestDivergence:
    def test_a_diverged_cell_is_recorded_and_counts_as_worst(self, setup, tmp_path):
        cells = Grid((1e30, 0.01), (0.0,)).cells(6)
        ran = protocol(setup, tmp_path)
        (chosen,) = ran.search([("tiny:a", "full", cells)])
        assert chosen[0] == cells[1]
        assert chosen.diverged == 1
        trials = [Trial("tiny:a", "full", cell, "train", 0) for cell in cells]
        assert [ran.study.result_of(trial)["diverged"] for trial in trials] == [True, False]

    def test_where_all_diverge_or_the_chosen_one_does_they_are_named(self, setup, tmp_path):
        cells = Grid((1e30,), (0.0,)).cells(6)
        ran = protocol(setup, tmp_path)
        with pytest.raises(NonFiniteLoss, match="full on tiny:a: all 1 cells .* diverged"):
            ran.search([("tiny:a", "full", cells)])
        with pytest.raises(NonFiniteLoss, match=r"full on tiny:a, lr 1e\+30.* on trainval"):
            ran.test([("tiny:a", "full", cells[0])], [0])

    def test_a_broken_image_is_no_divergence(self, setup, tmp_path):
        setup.tasks["tiny:a"].splits["train"].tensors[0][3] = float("nan")
        with pytest.raises(NonFiniteInput):
            protocol(setup, tmp_path).search([("tiny:a", "linear", CELLS)])


class TestResuming:
    def test_no_cell_is_trained_twice(self, setup, tmp_path, trained, monkeypatch):
        run, searches = Setup.run, [("tiny:a", "linear", CELLS), ("tiny:b", "linear", CELLS)]

        def killed(self, trial, file=None):
            if len(trained) == 3:
                raise KeyboardInterrupt
            return run(self, trial)

        with monkeypatch.context() as patch:
            patch.setattr(Setup, "run", killed)
            with pytest.raises(KeyboardInterrupt):
                protocol(setup, tmp_path).search(searches)
        with open(tmp_path / "work.log", "a") as file:
            file.write('{"op_code": 4, "wor')  # what a kill leaves of a line
        found = protocol(setup, tmp_path).search(searches)
        assert len(trained) == len(set(trained)) == 8
        assert protocol(setup, tmp_path).search(searches) == found
        assert len(trained) == 8


def test_processes_find_the_same(setup, tmp_path):
    searches = [("tiny:a", "linear", CELLS)]
    runs = {n: protocol(setup, tmp_path / str(n), processes=n) for n in (1, 2)}
    chosen = {n: run.search(searches)[0] for n, run in runs.items()}
    assert chosen[1] == chosen[2]
    choices = [("tiny:a", "linear", chosen[1].cell)]
    one, two = (run.test(choices, [0, 1, 2])[0] for run in runs.values())
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)


# What a method adds, and the head, over the tiny backbone: width 24, 2 blocks, 3 classes.
BIASES = 24 + 2 * (24 + 72 + 24 + 24 + 96 + 24) + 24
COUNTS = {
    "linear": 0,
    "vpt:num_prompts=5": 2 * 5 * 24,
    "vpt:num_prompts=5,kind=shallow": 5 * 24,
    "mlp:num_layers=2": 24 * 24 + 3 * 24,  # a hidden layer, and BatchNorm's weight and bias
    "bias": BIASES,
    "adapter:reduction=8": 2 * (2 * 24 * 3 + 3 + 24),
    "sct:k=4": 2 * (4 * 4 + 4),
}


@pytest.mark.parametrize("text", COUNTS)
def test_parameters_are_counted_without_the_head(setup, text):
    model = setup.build(Trial("tiny:a", text, CELLS[0], "train", 0))
    assert counted(model) == {"parameters": COUNTS[text], "head_parameters": 24 * 3 + 3}


def test_parameters_of_all_weights_and_of_published_size(setup):
    whole = sum(p.numel() for p in tiny_backbone(3).parameters())
    full = setup.build(Trial("tiny:a", "full", CELLS[0], "train", 0))
    assert counted(full) == {"parameters": whole - 75, "head_parameters": 75}
    published = timm.create_model("vit_base_patch16_224", num_classes=100)
    found = counted(pcx.Adapter(published, 64))  # VPT paper, Table 12, as the share it gives
    assert found == {"parameters": 230_544, "head_parameters": 76_900}


def test_parameters_of_peft_are_its_adapters_and_the_head():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    model = pcx.PeftModel(peft.get_peft_model(tiny_backbone(3), config))
    assert counted(model) == {"parameters": 2 * 2 * (24 + 72), "head_parameters": 75}


def test_the_median_step_leaves_out_what_lies_between_epochs(monkeypatch):
    times, marks = StepTimes(), iter((0.0, 0.010, 0.030, 9.0, 9.020))
    monkeypatch.setattr("pcx.experiments.trials.time.perf_counter", lambda: next(marks))
    for epoch, step in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2)):
        times.on_step(epoch, step, torch.zeros(1))
    assert times.median() == pytest.approx(20)
    assert StepTimes().median() is None


def test_recipes_are_those_of_fit(setup, tmp_path, monkeypatch):
    given = {}

    def fit(model, loader, **arguments):
        given.update(arguments, batch_size=loader.batch_size)

    monkeypatch.setattr("pcx.experiments.trials.fit", fit)
    setup.recipe = Recipe(epochs=7, batch_size=3, amp="bf16", execution="eager")
    setup.run(Trial("tiny:a", "linear", CELLS[1], "train", 0))
    assert (given["epochs"], given["batch_size"], given["amp"]) == (7, 3, "bf16")
    assert (given["lr"], given["clip_grad"], given["opt"]) == (0.01, 1.0, "momentum")
    assert given["execution"] == "eager"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_times_and_a_peak(setup):
    linear, full = (
        setup.run(Trial("tiny:a", text, CELLS[0], "train", 0)) for text in ("linear", "full")
    )
    assert full["peak_mib"] > linear["peak_mib"] > 0
    assert 0 < linear["ms_per_step"] < 1e4
