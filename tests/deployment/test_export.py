"""Exported models: every format gives the model's logits for batches of any size, without pcx."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from typer.testing import CliRunner

import pcx
from pcx import extras
from pcx.backbones import scenes_vit
from pcx.cli import app
from pcx.deployment import exporting, formats
from pcx.token_pruning import ats, tome

# torch's own, of its exporters and of torch.jit
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE, BATCHES = 32, (1, 3, 8)
SMALL = {"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
X = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def vit(**more):
    """A ViT of 17 tokens whose weights all matter."""
    model = timm.create_model("vit_tiny_patch16_224", **{"num_classes": 5, **SMALL, **more})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def vpt(depth=2, num_prompts=4, **more):
    torch.manual_seed(2)
    model = pcx.VPT(vit(depth=depth), num_prompts, **more).eval()
    with torch.no_grad():
        for prompts in model.prompts:
            prompts.mul_(5)
    return model


def condensed(**more):
    kept = [torch.tensor(places, dtype=torch.int64) for places in ([0, 3], [], [1])]
    return vpt(depth=3, **more).keep(kept).eval()


def pruned(model):
    pcx.zero_tprune(model, layers=(1,), keep=0.7, iters=3, similar=2)
    return model


def merged(model):
    tome(model, r=3)
    return model


def sampled(model):
    ats(model, layers=(1, 2), tokens=(10, 6))
    return model


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"])
    model = peft.get_peft_model(vit(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    return model


def hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=SIZE,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config).eval()


MODELS = {
    "plain": vit,
    "plain frozen": lambda: pcx.freeze(vit()),
    "folded": vpt,
    "concat": lambda: vpt(path="concat"),
    "shallow": lambda: vpt(kind="shallow"),
    "prefix": lambda: vpt(kind="prefix"),
    "frozen": lambda: pcx.freeze(vpt()),
    "prefix frozen": lambda: pcx.freeze(vpt(kind="prefix")),
    "condensed": condensed,
    "condensed concat": lambda: condensed(path="concat"),
    "condensed frozen": lambda: pcx.freeze(condensed()),
    "ensemble": lambda: pcx.ensemble([vpt(depth=3), condensed()]),
    "plain zero_tprune": lambda: pruned(vit()),
    "plain tome": lambda: merged(vit(depth=3)),
    "average tome": lambda: merged(vit(depth=3, global_pool="avg")),
    "plain ats": lambda: sampled(vit(depth=3)),
    "folded zero_tprune": lambda: pruned(vpt()),
    "folded tome": lambda: merged(vpt(depth=3)),
    "folded ats": lambda: sampled(vpt(depth=3)),
    "frozen zero_tprune": lambda: pcx.freeze(pruned(vpt())),
    "frozen tome": lambda: pcx.freeze(merged(vpt(depth=3))),
    "frozen ats": lambda: pcx.freeze(sampled(vpt(depth=3))),
}
# One model for each way in which a block computes; all are exported to programs below.
FEW = ("folded", "shallow", "plain zero_tprune", "frozen tome", "folded ats")


def exported(model, strict=False):
    shapes = ({0: torch.export.Dim("batch", min=1, max=512)},)
    with torch.no_grad():
        return torch.export.export(model, (X[:2],), dynamic_shapes=shapes, strict=strict)


@torch.no_grad()
def check(run, model, tolerance=1e-4):
    for batch in BATCHES:
        found, expected = run(X[:batch]), model(X[:batch])
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_programs_and_traces_take_batches_of_any_size(name):
    model = MODELS[name]()
    program = exported(model)
    assert not [n for n in program.graph.nodes if "pcx" in str(n.target)]
    check(program.module(), model, 1e-5)
    with torch.no_grad():
        traced = torch.jit.trace(model, (X[:2],), check_trace=False)
    assert not [n for n in traced.inlined_graph.nodes() if n.kind().startswith("pcx")]
    check(traced, model, 1e-5)


@pytest.mark.parametrize("name", ["folded", "condensed frozen", "plain zero_tprune"])
def test_a_strict_export_too(name):
    model = MODELS[name]()
    check(exported(model, strict=True).module(), model, 1e-5)


def in_onnxruntime(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


@pytest.mark.parametrize("name", FEW)
def test_onnx_gives_the_logits_of_the_model(name, tmp_path):
    pytest.importorskip("onnxruntime")
    model = MODELS[name]()
    pcx.export(model, tmp_path / "model.onnx")
    check(in_onnxruntime(tmp_path / "model.onnx"), model)


def test_onnx_has_every_partition_and_measure(tmp_path):
    pytest.importorskip("onnxruntime")
    model = vit(depth=1)
    settings = {"similar": 2, "partition": "none", "measure": 2.0, "ranking": "average"}
    pcx.zero_tprune(model, layers=(1,), keep=0.7, iters=1, **settings)
    pcx.export(model, tmp_path / "model.onnx")
    check(in_onnxruntime(tmp_path / "model.onnx"), model)


@pytest.mark.parametrize("build", [vit, adapted, hugging_face])
def test_every_kind_of_model_is_taken_and_left_as_it_is(build, tmp_path):
    model = build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pcx.export(model, tmp_path / "a" / "model.pt2")
    assert model.training
    assert all(p.requires_grad for p in model.parameters()) or build is adapted
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    run = torch.export.load(tmp_path / "a" / "model.pt2").module()
    model.eval()
    check(run, lambda x: getattr(model(x), "logits", model(x)))


def test_aotinductor_compiles_a_vpt_with_fewer_tokens(tmp_path):
    model = pcx.VPT(vit(depth=2), (2, 0)).eval()
    pcx.zero_tprune(model, layers=(1,), keep=0.7, iters=2, similar=2)
    model.record.class_names = list("abcde")
    pcx.export(model, tmp_path / "model.pt2", format="aoti")
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    check(run, model)
    assert json.loads(run.get_metadata()["class_names"]) == list("abcde")


RUN = """
import sys, torch
x, expected = torch.load("{folder}/x.pt")
for run in (torch.export.load("{folder}/m.pt2").module(), torch.jit.load("{folder}/m.ts")):
    assert (run(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
assert "pcx" not in sys.modules and not hasattr(torch.ops.pcx, "prefix_attention")
"""


@torch.no_grad()
def test_files_run_without_pcx(tmp_path):
    model = pruned(vit(depth=1))
    torch.save((X, model(X)), tmp_path / "x.pt")
    pcx.export(model, tmp_path / "m.pt2")
    pcx.export(model, tmp_path / "m.ts")
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN.format(folder=tmp_path)], check=True)


def test_files_say_what_the_model_is(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = pcx.Linear(vit(depth=1))
    model.record.class_names, model.record.task = ["a", "b", "c", "d", "\u00e9"], "letters"
    pcx.export(model, tmp_path / "m.onnx")
    said = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert (said["task"], said["method"]) == ("letters", "linear")
    assert json.loads(said["class_names"]) == model.record.class_names
    transform = json.loads(said["transform"])
    assert transform["input_size"] == [3, SIZE, SIZE]
    assert transform["mean"] == [0.5, 0.5, 0.5]
    pcx.export(model, tmp_path / "m.pt2")
    pcx.export(pcx.freeze(model), tmp_path / "m.ts")
    found = [{"pcx.json": ""}, {"pcx.json": ""}]
    torch.export.load(tmp_path / "m.pt2", extra_files=found[0])
    torch.jit.load(str(tmp_path / "m.ts"), _extra_files=found[1])
    assert json.loads(found[0]["pcx.json"]) == said
    of_frozen = json.loads(found[1]["pcx.json"])
    assert {**of_frozen, "method": "linear"} == said


def test_a_model_of_16_bits_is_checked_by_its_own_tolerance(tmp_path):
    half = vpt(depth=1).to(torch.bfloat16)
    for model, x in ((half, X.bfloat16()), (pcx.freeze(vpt(depth=1), amp="bf16"), X)):
        pcx.export(model, tmp_path / "m.pt2")
        found, expected = torch.export.load(tmp_path / "m.pt2").module()(x), model(x)
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("path", ["m.pt2", "m.ts"])
def test_a_file_that_does_not_agree_is_not_written(path, tmp_path, monkeypatch):
    target = tmp_path / path
    target.write_text("old")
    name = exporting.check_target(target, None)[1]
    held = formats.FORMATS[name]
    for spoil in (lambda y: y + 0.01 * y.abs().max(), lambda y: y[:1], lambda y: y * torch.nan):
        read = lambda p, spoil=spoil: lambda x: spoil(held.read(p)(x))  # noqa: E731
        spoilt = formats.Format(held.suffix, held.write, read)
        monkeypatch.setitem(formats.FORMATS, name, spoilt)
        with pytest.raises(ValueError, match=f"format: the file that '{name}' made"):
            pcx.export(vit(depth=1), target)
        assert target.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == [path]


def test_a_model_that_draws_at_random_is_refused(tmp_path):
    model = vit()
    pcx.zero_tprune(model, layers=(1,), keep=0.5, iters=1, ranking="random")
    with pytest.raises(ValueError, match="model: it gives other logits of the same images"):
        pcx.export(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match="'onnx' needs onnxscript, .*pip install 'pcx.export.'"):
        pcx.export(vit(depth=1), tmp_path / "m.onnx")


def test_weights_beyond_what_onnx_holds_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(formats, "MOST_OF_ONNX", 1000)
    with pytest.raises(ValueError, match="format: 'onnx' holds .* choose 'exported' or 'aoti'"):
        pcx.export(vit(depth=1), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_the_function_does(tmp_path):
    model = pcx.Linear(scenes_vit(10)).eval()
    pcx.save(model, tmp_path / "model.safetensors")
    x = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for name, load in (("a.ts", torch.jit.load), ("a.pt2", torch.export.load)):
        out = tmp_path / "new" / name
        command = ["export", str(tmp_path / "model.safetensors"), "--out", str(out)]
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
        run = load(str(out))
        run = run.module() if name == "a.pt2" else run
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    again = CliRunner().invoke(app, command)
    assert "give --overwrite to replace it" in str(again.exception)
    out.write_text("old")
    replaced = CliRunner().invoke(app, [*command, "--overwrite", "--format", "exported"])
    assert replaced.exit_code == 0, replaced.output
    assert torch.export.load(out)
