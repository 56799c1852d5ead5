"""Bad inputs of the command line, one line each: one line of error, exit code 2, nothing written.

A line is what follows `pcx`, and what the error holds.
"""

from __future__ import annotations

import re
import shlex
import sys
from functools import cache

import pytest

from pcx.cli import main
from pcx.tasks.digits import read_digits

DIGITS = cache(read_digits)  # read once for all lines
T = "train --task digits --out new --lr 0.1"
C = "condense m.safetensors --task digits --out new --lr 0.1"
E = "eval m.safetensors --task digits"
P = "prune m.safetensors --task digits --layers 1 --keep 0.5"
S = "search m.safetensors --task digits --budget 0.7"
M = "compare --task digits --methods linear --out new"

TABLE = f"""
trian                                        | No such command 'trian'. Did you mean 'train'
--bogus                                      | No such option
train                                        | PHOTOS: got none; give a folder of photos, or --task
train --task digits --method full --out new  | --lr: give --lr or --base-lr
train --out new --lr 1                       | PHOTOS: got none
train digits --task digits --out new         | PHOTOS: got both, digits and --task digits
train ./nowhere --out new                    | nowhere: no such folder
{T} --bogus 1                                | No such option: --bogus
{T} extra                                    | PHOTOS: got both, extra and --task digits
{T} --task2 x                                | No such option
{T} --epochs                                 | --epochs
{T} --epochs x                               | --epochs
{T} --epochs 1.5                             | --epochs
{T} --epochs 0                               | --epochs: 0
{T} --epochs -1                              | --epochs: -1
{T} --prompts x                              | --prompts: 'x'
{T} --prompts -1                             | --prompts: -1
{T} --prompts 1.5                            | --prompts: '1.5'
{T} --prompts 1,2                            | --prompts: 2 counts
{T} --prompts 1,,2                           | --prompts: '1,,2'
{T} --prompts ""                             | --prompts: ''
{T} --prompts 9999999999                     | --prompts: 9999999999
{T} --kind wide                              | --kind: got 'wide'
{T} --kind shallow --prompts 1,1,1,1,1,1     | --prompts: [1, 1, 1, 1, 1, 1]; --kind shallow
{T} --dropout x                              | --dropout
{T} --dropout 1                              | --dropout: 1.0
{T} --dropout -0.5                           | --dropout: -0.5
{T} --dropout nan                            | --dropout: nan
{T} --method liner                           | --method: got 'liner'
{T} --method peft                            | --method: peft: peft_type: None, expected one of
{T} --method vpt:prompts=2                   | --method: vpt has no argument 'prompts'. Did you mean 'num_prompts'
{T} --method vpt:num_prompts=2 --prompts 3   | --prompts: --method vpt:num_prompts=2 gives it too
{T} --method vpt:kind=wide                   | --method: vpt: kind: got 'wide'
{T} --method partial:num_layers=x            | --method: partial: num_layers: 'x', expected a whole number
{T} --method partial:num_layers=9            | --method: partial: num_layers: 9, and
{T} --method sct:k=200                       | --method: sct: k: 200 channels of layer 0
{T} --method linear --prompts 2              | --prompts: --method linear has no such option
{T} --method full --kind deep                | --kind: --method full has no such option
{T} --head-init zero                         | --head-init: got 'zero'
{T} --patience 0                             | --patience: 0
{T} --track x                                | --track: got 'x', expected one or several of
{T} --patience x                             | --patience
{T} --patience 2 --split trainval            | --patience: it goes by val
{T} --class-weights even                     | --class-weights: 'even', expected balanced, or
{T} --class-weights 1,2                      | --class-weights: 2 weights for 10 classes
{T} --class-weights 1,1,1,1,1,1,1,1,1,-1     | --class-weights[9]: got -1.0, expected a number
{T} --class-weights 0,0,0,0,0,0,0,0,0,0      | --class-weights: got [0.0, 0.0
{T} --base-lr 0.1                            | --lr: give --lr or --base-lr, one of them
train --task digits --out new --lr x         | --lr
train --task digits --out new --lr 0         | --lr: 0.0
train --task digits --out new --lr -1        | --lr: -1.0
train --task digits --out new --lr nan       | --lr: nan
train --task digits --out new --lr inf       | --lr: inf
train --task digits --out new --base-lr 0    | --base-lr: 0.0
{T} --weight-decay -1                        | --weight-decay: -1.0
{T} --weight-decay x                         | --weight-decay
{T} --weight-decay nan                       | --weight-decay: nan
{T} --clip-grad 0                            | --clip-grad: 0.0
{T} --clip-grad -2                           | --clip-grad: -2.0
{T} --clip-grad x                            | --clip-grad
{T} --batch-size 0                           | --batch-size: 0
{T} --batch-size -4                          | --batch-size: -4
{T} --batch-size x                           | --batch-size
{T} --workers -1                             | --workers: -1
{T} --workers x                              | --workers
{T} --seed x                                 | --seed
{T} --seed -1                                | --seed: -1
{T} --amp fp8                                | --amp: got 'fp8'
{T} --amp fp16                               | --amp: 'fp16' needs a GPU
{T} --execution fast                         | --execution: got 'fast'
{T} --execution cuda-graph                   | --execution: 'cuda-graph'
{T} --split test                             | --split: got 'test'
{T} --split val                              | --split: got 'val'
{T} --backbone vit_huge_x                    | --backbone: timm knows no 'vit_huge_x'
{T} --weights w.pth                          | --weights: pcx_scenes_vit has its own weights
{T} --backbone vit_tiny_patch16_224 --weights no.pth   | --weights: no file no.pth
{T} --backbone vit_tiny_patch16_224 --weights text.txt | --weights: text.txt is not what torch.save
{T} --backbone vit_tiny_patch16_224 --weights few.safetensors | --weights: few.safetensors has no values
{T} --cache text.txt                         | --cache:
{T} --cache-tokens --epochs 0                | --epochs: 0
{T} --config none.toml                       | --config: no file none.toml
{T} --config text.txt                        | --config: text.txt is not TOML
{T} --config typo.toml                       | --config: typo.toml: pcx train has no option 'epoch'
{T} --config kind.toml                       | --config: kind.toml: epochs
{T} --config latin.toml                      | --config: latin.toml, line 1: it is not UTF-8
train --task letters --out new --lr 1        | --task: 'letters'
train --task "" --out new --lr 1             | data: no such folder
train --task sprites:x --out new --lr 1      | --task: 'sprites:x'
train --task sprites: --out new --lr 1       | --task: 'sprites:'
train --task vtab:x --out new --lr 1         | --task: 'vtab:x'
train --task vtab:dtd --out new --lr 1       | not found, expected a folder of VTAB
train --task fgvc:cub --out new --lr 1       | not found, expected a folder with train.json
train --task folder --out new --lr 1         | data: no such folder
train --task folder --root no --out new --lr 1 | no: no such folder
train --task torch/nothing --out new --lr 1  | --task: 'torch/nothing'
train --task fgvc:broken --root . --out new --lr 1 | train.json, line 1: not JSON
train --task fgvc:out --root . --out new --lr 1    | leads out of
train --task digits --out . --lr 1           | --out: . is a folder
train --task digits --out text.txt/new --lr 1 | --out: text.txt is a file
train --task digits --out m.safetensors --lr 1 | --out: m.safetensors exists; give --overwrite
train --task digits --out half --lr 1        | --out: half.ckpt holds the checkpoint
{T} --resume --out half --epochs 9           | --resume: .* is of another run
condense                                     | Missing argument 'model'
condense m.safetensors                       | PHOTOS: got none
condense m.safetensors digits --task digits  | PHOTOS: got both
condense none --task digits --out new        | MODEL: no file none
condense text.txt --task digits --out new    | MODEL: text.txt is not a whole safetensors file
condense flipped --task digits --out new     | MODEL: flipped is damaged
condense linear.safetensors --task digits --out new --lr 1 | MODEL: a Linear
{C} --keep 0                                 | --keep: 0
{C} --keep 2.5                               | --keep: 2.5
{C} --keep -1                                | --keep: -1
{C} --keep x                                 | --keep: 'x'
{C} --keep nan                               | --keep: nan
{C} --keep 999                               | --keep: 999
{C} --keep auto --split trainval             | --split: 'trainval' holds the images of val
{C} --split dev                              | --split: got 'dev'
{C} --method x                               | --method: got 'x'
{C} --scope x                                | --scope: got 'x'
{C} --epochs -1                              | --epochs: -1
{C} --clip-grad -1                           | --clip-grad: -1.0
{C} --batch-size 0                           | --batch-size: 0
{C} --amp x                                  | --amp: got 'x'
{C} --out m.safetensors                      | --out: m.safetensors exists
{C} --out .                                  | --out: . is a folder
{C} --backbone x                             | --backbone: timm knows no 'x'
{C} --backbone vit_tiny_patch16_224 --weights no.pth | --weights: no file no.pth
{C} --task sprites:count                     | --task: sprites:count has 8 classes
eval                                         | Missing argument 'model'
eval m.safetensors                           | PHOTOS: got none
predict                                      | Missing argument 'images'
predict a.jpg                                | Missing option '--model'
predict --model m.safetensors                | Missing argument 'images'
predict none.jpg --model m.safetensors       | IMAGES: none.jpg: no such file
predict no*.jpg --model m.safetensors        | IMAGES: no*.jpg: no such file
predict m.safetensors --model m.safetensors  | IMAGES: none of 1 is an image; the first is m.saf
predict m.safetensors --model none.safetensors | none.safetensors
predict m.safetensors --model m.safetensors --top 0 | --top: 0
predict m.safetensors --model m.safetensors --top x | --top
predict m.safetensors --model m.safetensors --out p.txt | --out: p.txt, expected a name that ends
predict m.safetensors --model m.safetensors --amp int8 | --amp: got 'int8'
predict m.safetensors --model m.safetensors --batch-size 0 | --batch-size: 0
eval none --task digits                      | MODEL: no file none
eval . --task digits                         | MODEL: no file .
eval text.txt --task digits                  | MODEL: text.txt is not a whole safetensors file
{E} --split dev                              | --split: got 'dev'
{E} --batch-size 0                           | --batch-size: 0
{E} --amp x                                  | --amp: got 'x'
{E} --amp fp16                               | --amp: 'fp16' needs a GPU
{E} --workers -2                             | --workers: -2
{E} --task sprites:count                     | --task: sprites:count has 8 classes
prune m.safetensors --task digits            | Missing option '--layers'
prune m.safetensors --task digits --layers 1 | Missing option '--keep'
{P} --layers x                               | --layers: 'x'
{P} --layers 0                               | --layers: 0
{P} --layers 99                              | --layers: [99]
{P} --layers 2,1                             | --layers: [2, 1]
{P} --keep x                                 | --keep: 'x'
{P} --keep 0                                 | --keep: 0.0
{P} --keep 0.5,0.5                           | --keep: 2 values for 1 layers
{P} --iters 0                                | --iters: 0
{P} --iters x                                | --iters: 'x'
{P} --similar -1                             | --similar: -1
{P} --similar 99                             | --similar: 99
{P} --ranking x                              | --ranking: got 'x'
{P} --images 0                               | --images: 0
{P} --split dev                              | --split: got 'dev'
{P} --out .                                  | --out: . is a folder
search m.safetensors --task digits           | Missing option '--budget'
{S} --budget x                               | --budget
{S} --budget 0                               | --budget: 0.0
{S} --budget nan                             | --budget: nan
{S} --trials 0                               | --trials: 0
{S} --images 0                               | --images: 0
{S} --seed -1                                | --seed: -1
{S} --amp x                                  | --amp: got 'x'
{S} --execution compile                      | --execution: 'compile'
{S} --storage study.db                       | --storage: 'study.db' cannot be used
{S} --storage sqlite:////no/such/s.db        | --storage: .* cannot be used
{S} --storage foo://x                        | --storage: .* cannot be used
export                                       | Missing argument 'model'
export m.safetensors                         | Missing option '--out'
export m.safetensors --out new               | --out: new ends in '', which names no format
export m.safetensors --out new.pt2 --format x | --format: got 'x'
export m.safetensors --out new.pt2 --format onnx | --out: new.pt2 ends in '.pt2'; --format 'onnx'
export m.safetensors --out .                 | --out: . is a folder
export m.safetensors --out text.ts           | --out: text.ts exists; give --overwrite
export m.safetensors --out text.txt/new.ts   | --out: text.txt is a file
export none --out new.ts                     | MODEL: no file none
export text.txt --out new.ts                 | MODEL: text.txt is not a whole safetensors file
export m.safetensors --out new.ts --backbone x | --backbone: timm knows no 'x'
compare                                      | Missing option '--task'
compare --task digits --out new              | --methods: got none; give --methods linear,vpt
compare --task letters --methods linear --out new | --task: 'letters'
compare --task digits --methods liner --out new | --method: got 'liner'
compare --task digits --methods vpt:kind=deep --out new | --methods: 'vpt:kind=deep' has arguments
{M} --method linear                          | --methods: 'linear' is given twice
{M} --method vpt:kind=wide                   | --method: vpt: kind: got 'wide'
{M} --method vpt:wide=1                      | --method: vpt has no argument 'wide'
{M} --method partial:num_layers=9            | --method: partial: num_layers: 9, and
{M} --task digits                            | --task: digits is given twice
{M} --seeds 0                                | --seeds: 0
{M} --seeds x                                | --seeds
{M} --epochs 0                               | --epochs: 0
{M} --batch-size 0                           | --batch-size: 0
{M} --workers -1                             | --workers: -1
{M} --processes 0                            | --processes: 0
{M} --grid-lr x                              | --grid-lr: 'x', expected numbers as 0.01,0.1
{M} --grid-lr 0.1,0                          | --grid-lr: 0.0, expected a positive number
{M} --grid-lr 1,1                            | --grid-lr: [1.0, 1.0], expected some values, and none twice
{M} --grid-weight-decay -1                   | --grid-weight-decay: -1.0
{M} --grid-clip-grad none,0                  | --grid-clip-grad: 0.0
{M} --grid-clip-grad no                      | --grid-clip-grad: 'no', expected numbers as none,1
{M} --grid-opt adamm                         | --grid-opt: 'adamm'
{M} --head-init zero                         | --head-init: got 'zero'
{M} --amp fp16                               | --amp: 'fp16' needs a GPU
{M} --execution cuda-graph                   | --execution: 'cuda-graph'
{M} --backbone x                             | --backbone: timm knows no 'x'
{M} --out text.txt                           | --out: text.txt is a file
{M} --out .                                  | --out: . has files and no config.json
env extra                                    | unexpected extra argument
demo --bogus                                 | No such option: --bogus
"""
LINES = [
    pytest.param(*(part.strip() for part in line.rsplit("|", 1)), id=str(number))
    for number, line in enumerate(TABLE.strip().splitlines())
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models, a run that was stopped, and files of other kinds."""
    import pcx
    from pcx.backbones import scenes_vit

    here = tmp_path_factory.mktemp("cli")
    pcx.save(pcx.VPT(scenes_vit(10), 2), here / "m.safetensors")
    pcx.save(pcx.Linear(scenes_vit(10)), here / "linear.safetensors")
    whole = (here / "m.safetensors").read_bytes()
    (here / "flipped").write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    (here / "few.safetensors").write_bytes((here / "linear.safetensors").read_bytes())
    (here / "text.txt").write_text("hello")
    (here / "text.ts").write_text("hello")
    (here / "typo.toml").write_text("epoch = 3\n")
    (here / "kind.toml").write_text('epochs = "three"\n')
    (here / "latin.toml").write_bytes('a = "ü"\n'.encode("latin-1"))
    for name, content in (("broken", "{"), ("out", '{"../0.jpg": 1}')):
        (here / name).mkdir()
        for split in ("train", "val", "test"):
            (here / name / f"{split}.json").write_text(content)
    from pcx.tasks import load_task

    data = load_task("digits", pcx.backbones.inputs.data_config(scenes_vit(10)))
    pcx.fit(
        pcx.VPT(scenes_vit(10), 20),
        data.loader("val"),
        epochs=1,
        lr=0.1,
        checkpoint_dir=here / "half.ckpt",
        progress=False,
    )
    return here


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_there_are_as_many_as_there_should_be():
    assert len(LINES) >= 125


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a line; gives the exit code, and what stands on the standard error."""
    monkeypatch.setattr("pcx.tasks.read_digits", DIGITS)
    monkeypatch.setattr("signal.signal", lambda *given: None)  # of this process

    def run(line):
        monkeypatch.setattr(sys, "argv", ["pcx", *shlex.split(line)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(("line", "message"), LINES)
def test_bad_input_is_one_line_and_exit_code_2(folder, monkeypatch, ended, line, message):
    monkeypatch.chdir(folder)
    before = listing(folder)
    code, said = ended(line)
    assert code == 2, said
    assert said.startswith("pcx: ")
    assert said.count("\n") == 1, said
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.search(pattern, said), said
    assert listing(folder) == before


def test_a_training_that_diverges_has_its_own_exit_code_and_keeps_the_file(folder, ended, tmp_path):
    file = tmp_path / "m.safetensors"
    file.write_bytes((folder / "m.safetensors").read_bytes())
    before = file.read_bytes()
    code, said = ended(
        f"train --task digits --out {file} --lr 100000 --epochs 1 --prompts 1 --overwrite"
    )
    assert code == 3
    assert "training diverged" in said
    assert "try 10000)" in said
    assert file.read_bytes() == before
