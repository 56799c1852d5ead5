"""The folder of a condensation: scores, kept prompts, and the fine-tuning that resumes."""

import json

import pytest
import torch

import pcx
from pcx.training.run import Run

QUIET = {"progress": False}
FIT = {"last.pt", "config.json", "environment.json", "history.csv"}


@pytest.fixture
def trained(backbone, loader):
    torch.manual_seed(0)
    model = pcx.VPT(backbone, 5, head_init="keep")
    pcx.fit(model, loader, epochs=2, lr=0.1, **QUIET)
    return model


def names(folder):
    return {p.name for p in folder.iterdir()}


def scores_of(folder):
    return json.loads((folder / "scores.json").read_text())


def test_it_holds_what_the_model_tells(trained, loader, tmp_path):
    small = pcx.condense(trained, loader, 0.4, epochs=1, checkpoint_dir=tmp_path, **QUIET)
    found = scores_of(tmp_path)
    assert (found["method"], found["scope"], found["keep"]) == ("taylor", "global", 0.4)
    for row, kept, scores in zip(
        found["layers"], small.condensation.kept, small.condensation.scores, strict=True
    ):
        assert row["kept"] == kept.tolist()
        assert row["scores"] == scores.tolist()
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    assert names(tmp_path) == FIT | {"scores.json"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["trained"]["prompts.0"] == f"{small.counts[0]}x24"


def test_without_fine_tuning_it_holds_the_scores_alone(trained, loader, tmp_path):
    pcx.condense(trained, loader, 0.4, epochs=0, checkpoint_dir=tmp_path / "a", **QUIET)
    assert names(tmp_path / "a") == {"scores.json"}


def test_the_fine_tuning_resumes_to_the_same_weights(trained, loader, tmp_path, monkeypatch):
    options = {"epochs": 3, **QUIET}
    whole = pcx.condense(trained, loader, 0.4, **options)

    class Interrupted(Exception):
        pass

    def stop(self, file):
        save(self, file)
        raise Interrupted

    save = Run.save
    monkeypatch.setattr(Run, "save", stop)
    with pytest.raises(Interrupted):
        pcx.condense(trained, loader, 0.4, checkpoint_dir=tmp_path, **options)
    monkeypatch.undo()
    epochs = []
    epoch = Run.epoch
    monkeypatch.setattr(Run, "epoch", lambda self: epochs.append(1) or epoch(self))
    resumed = pcx.condense(trained, loader, 0.4, checkpoint_dir=tmp_path, resume=True, **options)
    assert len(epochs) == 2
    assert all(torch.equal(v, resumed.trainable()[k]) for k, v in whole.trainable().items())
    with pytest.raises(ValueError, match="of another condensation: .*method taylor \\(now gate\\)"):
        pcx.condense(
            trained, loader, 0.4, method="gate", checkpoint_dir=tmp_path, resume=True, **options
        )


def test_other_kept_prompts_of_the_same_counts_are_another_condensation(trained, loader, tmp_path):
    options = {"epochs": 1, "checkpoint_dir": tmp_path, "scope": "local", **QUIET}
    first = [torch.arange(5.0), torch.arange(5.0)]
    pcx.condense(trained, loader, 2, scores=first, **options)
    other = [scores.flip(0) for scores in first]
    with pytest.raises(ValueError, match=r"another condensation: kept \[\[3, 4\], \[3, 4\]\]"):
        pcx.condense(trained, loader, 2, scores=other, resume=True, **options)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match="is no file of pcx.condense"):
        pcx.condense(trained, loader, 2, scores=first, resume=True, **options)


def test_auto_has_a_folder_for_each_keep(trained, loader, tmp_path):
    small = pcx.condense(
        trained, loader, "auto", epochs=1, val_loader=loader, checkpoint_dir=tmp_path, **QUIET
    )
    curve = small.condensation.curve
    folders = {f"keep_{row['keep']}" for row in curve if row["keep"] < 1}
    assert folders
    assert names(tmp_path) >= folders | {"scores.json"}
    assert all(names(tmp_path / folder) == FIT | {"scores.json"} for folder in folders)
    found = scores_of(tmp_path)
    assert found["keep"] == small.condensation.keep
    assert found["curve"] == curve
    assert [row["kept"] for row in found["layers"]] == [
        kept.tolist() for kept in small.condensation.kept
    ]


def test_the_folder_is_checked_before_anything_is_computed(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoint_dir: .*file is a file"):
        pcx.condense(trained, [], 0.4, checkpoint_dir=tmp_path / "file", **QUIET)
    with pytest.raises(ValueError, match="resume: needs checkpoint_dir"):
        pcx.condense(trained, [], 0.4, resume=True, **QUIET)
