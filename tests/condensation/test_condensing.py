"""Prompt Condensation end to end."""

import pytest
import torch

import pcx
from pcx.condensation.condensing import GRID
from pcx.training.evaluation import standard_error

QUIET = {"progress": False}


def _memory(model):
    return model.layers[0].block.attn.qkv.weight.data_ptr()


@pytest.fixture
def trained(backbone, loader):
    torch.manual_seed(0)
    model = pcx.VPT(backbone, 5, head_init="keep", dropout=0.2)
    pcx.fit(model, loader, epochs=5, lr=0.1, **QUIET)
    return model


@pytest.mark.parametrize("kind", ["deep", "shallow", "prefix"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_it_keeps_the_best_and_leaves_the_model_alone(backbone, loader, kind, scope):
    model = pcx.VPT(backbone, 5, kind=kind, head_init="keep", dropout=0.2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = pcx.condense(model, loader, 0.4, scope=scope, epochs=0, **QUIET)
    scores = pcx.score(model, loader, **QUIET)
    kept = pcx.select(scores, 0.4, scope=scope)
    for layer, index in enumerate(kept):
        assert torch.equal(small.condensation.kept[layer], index)
        assert torch.equal(small.condensation.scores[layer], scores[layer])
        assert torch.equal(small.prompts[layer], model.prompts[layer][..., index, :])
    assert sum(small.counts) == round(0.4 * sum(model.counts))
    assert small.condensation.history == []
    assert model.dropout == 0.2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fine_tuning_follows_the_paper(trained, loader):
    small = pcx.condense(trained, loader, 0.3, epochs=3, **QUIET)
    history = small.condensation.history
    assert len(history) == 3
    assert small.dropout == 0.0
    assert all(row["lr"] <= 0.1 * trained.trained_lr for row in history)
    assert history[0]["lr"] > 0.08 * trained.trained_lr  # no warm-up
    assert small.trained_lr == trained.trained_lr
    rough = trained.keep(small.condensation.kept)
    assert not torch.equal(small.prompts[0], rough.prompts[0])
    assert _memory(small) == _memory(trained)


def test_a_layer_may_lose_all_its_prompts(trained, loader):
    scores = [torch.zeros(5), torch.ones(5)]
    small = pcx.condense(trained, loader, 5, scores=scores, epochs=1, **QUIET)
    assert small.counts == (0, 5)


def test_auto_takes_the_smallest_keep_that_holds(trained, loader, capsys):
    small = pcx.condense(
        trained, loader, "auto", epochs=1, val_loader=loader, max_drop=100, progress=False
    )
    assert small.condensation.keep == GRID[0]
    curve = small.condensation.curve
    assert [row["keep"] for row in curve] == [*GRID, 1.0]
    whole = pcx.evaluate(trained, loader)
    assert curve[-1]["accuracy"] == whole["accuracy"]
    assert curve[-1]["standard_error"] == pytest.approx(standard_error(whole))
    assert [row["prompts"] for row in curve] == [
        *(sum(map(len, pcx.select(small.condensation.scores, k))) for k in GRID),
        10,
    ]
    found = pcx.evaluate(small, loader)["accuracy"]
    assert found == curve[0]["accuracy"]


def test_auto_keeps_all_where_nothing_holds(trained, loader, capsys):
    small = pcx.condense(trained, loader, "auto", epochs=0, val_loader=loader, max_drop=-1.0)
    assert small.condensation.keep == 1.0
    assert small.counts == trained.counts
    said = " ".join(capsys.readouterr().out.split())
    assert "10 validation images, where one image is 10.00 points and the standard error" in said


def test_bad_arguments_are_named(trained, backbone, loader):
    with pytest.raises(ValueError, match="lr: the model records no learning rate"):
        pcx.condense(pcx.VPT(backbone, 2), loader, **QUIET)
    with pytest.raises(ValueError, match="epochs: -1"):
        pcx.condense(trained, loader, epochs=-1, **QUIET)
    with pytest.raises(ValueError, match="val_loader: keep='auto'"):
        pcx.condense(trained, loader, "auto", **QUIET)
    with pytest.raises(ValueError, match="keep: 'half'"):
        pcx.condense(trained, loader, "half", **QUIET)
    with pytest.raises(ValueError, match="keep: 1.5"):
        pcx.condense(trained, None, 1.5, **QUIET)  # before anything is read
    with pytest.raises(ValueError, match=r"scores: \[1, 1\] per layer, expected \(5, 5\)"):
        pcx.condense(trained, loader, scores=[torch.ones(1)] * 2, **QUIET)


def test_auto_on_few_prompts(backbone, loader):
    model = pcx.VPT(backbone, 1)
    small = pcx.condense(
        model, loader, "auto", epochs=0, val_loader=loader, max_drop=100, progress=False
    )
    assert small.condensation.keep == 0.5
    assert sum(small.counts) == 1
