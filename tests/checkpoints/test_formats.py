"""Files of format 2 keep the record; files of format 1 and last.pt of version 1 still load."""

import json
from pathlib import Path

import pytest
import torch
from families import build, images
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.models.block_forward import found_on, reduction_of

DATA = Path(__file__).parent.parent / "data"


def described(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    return metadata["pcx"], json.loads(metadata["config"])


def rewrite(file, change, version="2"):
    _, config = described(file)
    change(config)
    tensors = load_file(file)
    save_file(tensors, file, metadata={"pcx": version, "config": json.dumps(config)})


def test_a_file_of_format_1_loads(backbone, dataset):
    model = pcx.load(DATA / "format1.safetensors", backbone)
    assert model.counts == (2, 1)
    assert model.dropout == 0.1
    assert model.trained_lr == 0.25
    assert model.num_classes == 5
    expected = torch.load(DATA / "format1_logits.pt")["logits"]
    torch.testing.assert_close(model(dataset.tensors[0]), expected, rtol=1e-9, atol=1e-12)


def test_a_checkpoint_of_version_1_continues(backbone, dataset, tmp_path):
    states = torch.load(DATA / "last_version1_states.pt")
    (tmp_path / "last.pt").write_bytes((DATA / "last_version1.pt").read_bytes())
    model = pcx.VPT(backbone, 2)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            parameter.copy_(states["start"][name])
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    history = pcx.fit(
        model, loader, epochs=2, lr=0.05, checkpoint_dir=tmp_path, resume=True, progress=False
    )
    assert [row["epoch"] for row in history] == [1, 2]
    for name, parameter in model.trainable().items():
        torch.testing.assert_close(parameter.data, states["end"][name], rtol=1e-9, atol=1e-12)


def test_the_record_travels(backbone, loader, tmp_path):
    model = pcx.VPT(backbone, 3)
    pcx.fit(model, loader, epochs=1, lr=0.05, warmup_epochs=0, progress=False)
    small = pcx.condense(model, loader, 0.5, epochs=1, progress=False)
    small.record.class_names, small.record.task = ["cat", "dog", "owl"], "pets"
    pcx.save(small, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", backbone)
    assert loaded.class_names == ["cat", "dog", "owl"]
    assert loaded.record.task == "pets"
    assert loaded.record.recipe == small.record.recipe
    assert loaded.record.recipe["opt"] == "momentum"
    assert loaded.trained_lr == 0.05
    assert loaded.record.transform["mean"] == list(data_config(small)["mean"])
    assert small.record.transform is None  # saving leaves the model as it was
    kept, before = loaded.condensation, small.condensation
    assert all(map(torch.equal, kept.scores, before.scores))
    assert all(map(torch.equal, kept.kept, before.kept))
    assert (kept.method, kept.scope, kept.keep) == ("taylor", "global", 0.5)
    assert kept.history == before.history


def test_entries_of_a_newer_pcx_are_kept(backbone, tmp_path):
    pcx.save(pcx.VPT(backbone, 2), tmp_path / "m")
    rewrite(tmp_path / "m", lambda config: config.update(calibration={"temperature": 1.5}))
    loaded = pcx.load(tmp_path / "m", backbone)
    pcx.save(loaded, tmp_path / "again")
    assert described(tmp_path / "again")[1]["calibration"] == {"temperature": 1.5}


def test_alike_models_give_the_same_bytes(backbone, tmp_path):
    model = pcx.VPT(backbone, 2)
    found = set()
    for i in range(8):
        pcx.save(model, tmp_path / f"{i}")
        found.add((tmp_path / f"{i}").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("zero_tprune", {"layers": (1,), "keep": 0.5, "iters": 2, "similar": 2}),
        ("tome", {"r": 2}),
        ("ats", {"layers": (1, 2), "tokens": 8}),
        ("soft_prune", {"layers": (1,), "keep": 0.5, "iters": 2}),
    ],
)
def test_token_reduction_is_set_up_again(tmp_path, name, arguments):
    model = pcx.VPT(build("vit"), 2).eval()
    whole = model(images("vit"))
    pcx.models.REDUCTIONS[name](model, **arguments)
    expected = model(images("vit"))
    assert not torch.equal(whole, expected)
    pcx.save(model, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m", build("vit"))
    assert reduction_of(loaded) == reduction_of(model)
    assert reduction_of(loaded)["name"] == name
    assert torch.equal(loaded(images("vit")), expected)
    for stand_in in found_on(loaded):
        stand_in.remove()
    assert torch.equal(loaded(images("vit")), whole)


def test_the_backbone_that_the_file_names_is_built(tmp_path):
    model = pcx.VPT(scenes_vit(7), 2)
    pcx.save(model, tmp_path / "m")
    loaded = pcx.load(tmp_path / "m")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), model.eval()(x))
    assert not loaded.training
    rewrite(tmp_path / "m", lambda config: config["backbone"].update(name="no_such_model"))
    with pytest.raises(ValueError, match=r"no_such_model, which could not be built .*backbone"):
        pcx.load(tmp_path / "m")


def test_what_does_not_fit_is_named(backbone, tmp_path):
    file = tmp_path / "m"

    def broken(change, version="2"):
        pcx.save(pcx.VPT(backbone, 2), file)
        rewrite(file, change, version)

    broken(lambda config: config.update(method="vtp"))
    with pytest.raises(ValueError, match=r"method: got 'vtp', .*Did you mean 'vpt'\?"):
        pcx.load(file, backbone)
    broken(lambda config: None, version="3")
    with pytest.raises(ValueError, match=r"\(format 3, expected 1 or 2\); install a newer pcx"):
        pcx.load(file, backbone)
    broken(lambda config: config["backbone"]["architecture"].update(heads=[4, 4]))
    with pytest.raises(ValueError, match=r"trained on .* with heads \[4, 4\] \(now \[2, 2\]\)"):
        pcx.load(file, backbone)
    broken(lambda config: config["checksums"].update({"prompts.1": "0" * 16}))
    with pytest.raises(ValueError, match=r"is damaged: its tensor 'prompts\.1'"):
        pcx.load(file, backbone)
    broken(lambda config: config.pop("settings"))
    with pytest.raises(ValueError, match="has no whole configuration"):
        pcx.load(file, backbone)
    with pytest.raises(ValueError, match="model: a Linear, expected a tuned model"):
        pcx.save(torch.nn.Linear(2, 2), file)
