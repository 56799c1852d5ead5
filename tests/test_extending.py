"""The worked examples of docs/extending.md run as they stand there."""

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from typer.testing import CliRunner

import pcx
from pcx import cli
from pcx.backbones import scenes_vit
from pcx.backbones.spec import FINDERS
from pcx.models import REDUCTIONS
from pcx.ops.dispatch import OPS
from pcx.registry import Registry

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def block_of(section: str) -> str:
    """The one block of Python of a section of the page."""
    parts = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
    (block,) = re.findall(r"^```python\n(.*?)^```", parts[section], re.M | re.S)
    return block


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    """Writes a section's block to a module and imports it; what it registers is taken back."""
    for table in (pcx.METHODS, pcx.SCORES, REDUCTIONS, OPS, FINDERS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))

    def imported(section: str, name: str):
        file = tmp_path / f"{name}.py"
        file.write_text(block_of(section))
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return imported


def test_a_method_is_under_60_lines():
    assert len(block_of("Add a method").splitlines()) < 60


def test_a_method_trains_saves_loads_and_evaluates(module_of, backbone, loader, tmp_path):
    module_of("Add a method", "norm_tuning")
    torch.manual_seed(0)
    before = copy.deepcopy(backbone.state_dict())
    model = pcx.METHODS["norm"](backbone)
    trained = set(model.trainable())
    assert {n.removeprefix("backbone.") for n in trained} == {
        n for n in before if "norm" in n or n.startswith("head.")
    }
    history = pcx.fit(model, loader, epochs=4, lr=0.05, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(before[n], t) for n, t in backbone.state_dict().items())

    pcx.save(model, tmp_path / "norm.safetensors")
    again = pcx.load(tmp_path / "norm.safetensors", backbone)
    assert type(again) is type(model)
    images = loader.dataset.tensors[0]
    with torch.no_grad():
        logits = model.eval()(images)
        assert torch.equal(again(images), logits)
        assert not torch.equal(backbone(images), logits)
        torch.testing.assert_close(pcx.freeze(again)(images), logits)
    # The loader shuffles, so that sums are rounded in another order.
    assert pcx.evaluate(again, loader) == pytest.approx(pcx.evaluate(model, loader))


def test_a_method_appears_in_the_help_of_train(tmp_path):
    (tmp_path / "norm_tuning.py").write_text(block_of("Add a method"))
    run = "import norm_tuning; from pcx.cli import main; main()"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {run}"]
    done = subprocess.run([*command, "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--method.*\bnorm\b", " ".join(done.stdout.split()))


def test_a_score_is_used_by_name(module_of, backbone, loader):
    module_of("Add a score", "helpful")
    model = pcx.VPT(backbone, 3)
    found = pcx.score(model, loader, method=["helpful", "gate"], progress=False)
    for helpful, gate in zip(found["helpful"], found["gate"], strict=True):
        assert (helpful >= 0).all()
        assert (helpful <= gate).all()
        assert helpful.sum() < gate.sum()
    small = pcx.condense(model, loader, 0.5, method="helpful", epochs=0, progress=False)
    assert sum(small.counts) == 3


@pytest.fixture
def rows_of_prompt_score(monkeypatch):
    """The op's table of backends; rows that a test adds are taken back."""
    from pcx.ops.prompt_score import DISPATCH

    monkeypatch.setattr(DISPATCH, "rows", dict(DISPATCH.rows))
    monkeypatch.setattr(DISPATCH, "_added", [])
    return DISPATCH


def test_a_backend_runs_by_name_and_says_why_it_cannot(module_of, rows_of_prompt_score):
    from pcx.ops.prompt_score import prompt_score

    given = torch.randn(2, 3, 4), torch.randn(3, 4)
    expected = prompt_score(*given, backend="reference")
    with pytest.raises(ValueError, match="backend: got 'mine', expected one of"):
        prompt_score(*given, backend="mine")
    module = module_of("Add a backend of an op", "backends")
    assert torch.equal(prompt_score(*given, backend="mine"), expected)
    with pytest.raises(ValueError, match="'mine' cannot run: it computes float32, gradient has"):
        prompt_score(*(x.double() for x in given), backend="mine")
    lines = [line for line in pcx.ops.dispatch.report() if line.op == "prompt_score"]
    assert [line.backend for line in lines][-1] == "mine"
    with pytest.raises(ValueError, match="row: the name 'mine' is taken"):
        module.DISPATCH.add(module.Backend("mine", run=module.run))
    with pytest.raises(ValueError, match="row: 'other' has no function to run"):
        module.DISPATCH.add(module.Backend("other"))


def test_an_added_backend_is_what_auto_takes_where_it_can_run(rows_of_prompt_score):
    from pcx.ops.dispatch import Backend
    from pcx.ops.prompt_score import prompt_score

    calls = []
    row = Backend(
        "counted",
        can_run=lambda gradient: None if gradient.shape[1] > 1 else "it needs two prompts",
        run=lambda gradient, *_: calls.append(1) or gradient.new_zeros(2, *gradient.shape[:2]),
    )
    rows_of_prompt_score.add(row)
    assert not prompt_score(torch.ones(1, 2, 4), torch.ones(2, 4)).any()
    assert prompt_score(torch.ones(1, 1, 4), torch.ones(1, 4)).all()
    assert len(calls) == 1


def test_an_op_is_registered_and_reported(module_of):
    op = module_of("Add an op", "likeness").token_likeness
    tokens = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    torch.testing.assert_close(op(tokens, backend="reference"), expected)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pcx.token_likeness.default, (tokens,), test_utils=checks)
    assert any(line.op == "token_likeness" for line in pcx.ops.dispatch.report())


def test_a_token_reduction_is_set_up_saved_and_removed(module_of, backbone, loader, tmp_path):
    longest = module_of("Add a token reduction", "longest").longest
    model = pcx.VPT(backbone, 2).eval()
    images = loader.dataset.tensors[0]
    seen = []
    backbone_block = model.layers[1]
    hook = backbone_block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    with torch.no_grad():
        model(images)
        handle = longest(model, layer=1, patches=2)
        model(images)
        hook.remove()  # under which the last block computes all tokens
        pruned = model(images)
    assert seen == [5, 3]
    pcx.save(model, tmp_path / "pruned.safetensors")
    again = pcx.load(tmp_path / "pruned.safetensors", backbone)
    with torch.no_grad():
        assert torch.equal(again(images), pruned)
        handle.remove()
        assert torch.equal(model(images), pcx.VPT.copy(model)(images))
        assert not torch.equal(pruned, model(images))


def test_a_command_runs(module_of, monkeypatch, tmp_path):
    module_of("Add a command", "describe")
    listed = cli.Listed("describe:describe", "Method and parameters of a saved model.")
    monkeypatch.setitem(cli.COMMANDS, "describe", listed)
    targets = {name: each.target for name, each in cli.COMMANDS.items()}
    monkeypatch.setattr(cli, "_FUNCTIONS", Registry("command", targets))
    pcx.save(pcx.Linear(scenes_vit(10)), tmp_path / "probe.safetensors")
    found = CliRunner().invoke(cli.app, ["describe", str(tmp_path / "probe.safetensors")])
    assert found.exit_code == 0, found.output
    assert "linear: 970 numbers on VisionTransformer" in found.output
    assert listed.help in CliRunner().invoke(cli.app, ["--help"]).output


def test_a_library_of_backbones_is_found(module_of):
    module_of("Add a family or a library of backbones", "of_torchvision")
    vit = torchvision.models.VisionTransformer(
        image_size=224, patch_size=56, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48
    )
    model = pcx.Linear(vit)
    assert set(model.trainable()) == {"backbone.heads.head.weight", "backbone.heads.head.bias"}
    prompted = pcx.VPT(vit, 3, num_classes=5).eval()
    images = torch.randn(2, 3, 224, 224)
    folded = prompted(images)
    prompted.path = "concat"
    torch.testing.assert_close(prompted(images), folded, rtol=1e-4, atol=1e-5)
    assert folded.shape == (2, 5)
