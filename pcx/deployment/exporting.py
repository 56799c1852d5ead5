"""Files of a model that run without pcx: ONNX, torch.export, AOTInductor and TorchScript."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcx import __version__
from pcx.backbones.inputs import data_config, input_size
from pcx.backbones.outputs import logits_of
from pcx.backbones.spec import check_values
from pcx.checkpoints.files import written_whole
from pcx.deployment.formats import FORMATS, Format, Job, quiet
from pcx.deployment.freezing import Frozen, freeze
from pcx.extras import need
from pcx.models.base import check_module, keeping_modes
from pcx.models.peft_model import known_by

EXAMPLE = 2  # images of the batch that an export records
CHECKED = (1, 3)  # sizes of the batches that the written file is checked on
# Largest difference between the file's logits and the model's, in parts of the largest logit, by
# the bits of the numbers that the model computes with.
TOLERANCE = {64: 1e-4, 32: 1e-4, 16: 5e-2}


@torch.no_grad()
def export(model: nn.Module, path: str | os.PathLike, *, format: str | None = None) -> None:
    """Writes a model to one file that maps images to logits without pcx.

    The model is frozen by `pcx.freeze` first where it is not and where its prompts fold. Every
    operation of pcx becomes torch's own ones. The file takes batches of any size, and images
    [B, C, H, W] of the size that the backbone was made for, normalised as `model.transform()` does.

    The written file is run on batches of 1 and 3 random images. Its logits may differ from the
    model's by 1e-4 of the largest logit, where the model computes in 16 bits by 5e-2 of it.

    | format        | suffix | what runs it                                         |
    | ------------- | ------ | ---------------------------------------------------- |
    | "onnx"        | .onnx  | onnxruntime, and what else reads ONNX                |
    | "exported"    | .pt2   | `torch.export.load(path).module()`                   |
    | "aoti"        | .pt2   | `torch._inductor.aoti_load_package(path)`, and C++   |
    | "torchscript" | .ts    | `torch.jit.load(path)`, and C++                      |

    The file says what `model.record` knows: method, task, class_names and transform, the last two
    as JSON. Read them from `metadata_props` of ONNX, from `get_metadata()` of an AOTInductor
    package, or from "pcx.json" among the extra files of the other two.

    Args:
        model: a tuned model, a frozen model, a model of peft, or a timm or Hugging Face model. It
            is in eval mode for the check, and not changed.
        path: the file; folders are made. A file in its place is replaced once the check has passed.
        format: "onnx", "exported", "aoti" or "torchscript"; by default the first of these with the
            suffix of the path. "aoti" compiles for the model's device, which takes a C++ compiler
            and a minute or more. "exported" and "torchscript" run on the model's device too.

    Raises:
        ValueError: the model cannot be exported, the path is a folder or has another suffix, there
            is no such format, or the check failed. Nothing was written then.
        ImportError: a package that the format needs is not installed.
        OSError: the file cannot be written; what was there is as it was.

    Example:
        >>> pcx.export(model, "cars.onnx")
        >>> session = onnxruntime.InferenceSession("cars.onnx")
        >>> logits = session.run(["logits"], {"images": images.numpy()})[0]
    """
    path, name = check_target(path, format)
    check_module("model", model)
    deployed = _deployed(model)
    job = Job(deployed, _images(deployed, EXAMPLE), _metadata(model, deployed))
    expected = _expected(model, deployed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        made = Path(folder) / f"model{FORMATS[name].suffix}"
        _write_checked(name, FORMATS[name], job, made, expected)
        with written_whole(path) as part:
            shutil.copyfile(made, part)


def check_target(
    path: Any, format: str | None, names: tuple[str, str] = ("path", "format")
) -> tuple[Path, str]:
    """The path of a file to export to, and the name of its format.

    Args:
        path: of the file.
        format: a name in FORMATS; None goes by the path's suffix.
        names: of these two arguments, for messages.

    Raises:
        ValueError: as `export` says of path and format.
        ImportError: as `export` says of missing packages.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"{names[0]}: {path!r}, expected the path of a file, such as model.onnx")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{names[0]}: {path} is a folder, expected a file, such as model.onnx")
    if format is not None and format not in FORMATS:
        raise ValueError(f"{names[1]}: got {format!r}, expected one of {tuple(FORMATS)}")
    fitting = [n for n, f in FORMATS.items() if f.suffix == path.suffix.lower()]
    if format is None and not fitting:
        suffixes = tuple(dict.fromkeys(f.suffix for f in FORMATS.values()))
        raise ValueError(
            f"{names[0]}: {path} ends in {path.suffix!r}, which names no format; let it end in one "
            f"of {suffixes}"
        )
    name = fitting[0] if format is None else format
    if name not in fitting:
        raise ValueError(
            f"{names[0]}: {path} ends in {path.suffix!r}; {names[1]} {name!r} needs a name that "
            f"ends in {FORMATS[name].suffix!r}"
        )
    for package in FORMATS[name].needs:
        need(package, f"{names[1]} {name!r}")
    return path, name


def _deployed(model: nn.Module) -> nn.Module:
    """The model for inference alone."""
    check_values(model, "model")
    if isinstance(model, Frozen):
        return model
    return freeze(model, execution="eager")


def _images(model: nn.Module, batch: int) -> Tensor:
    """Random images [batch, C, H, W] as a model takes them."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, *input_size(model), generator=generator)
    return images.to(weight.device, torch.float32 if _amp(model) else weight.dtype)


def _amp(model: nn.Module) -> bool:
    return isinstance(model, Frozen) and model.amp is not None


def _expected(model: nn.Module, deployed: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Batches of random images, and the model's logits of each."""
    found = []
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(cudnn.enabled, cudnn.benchmark, allow_tf32=False)
    with keeping_modes(model), exact:
        model.eval()
        for images in (_images(deployed, batch) for batch in CHECKED):
            logits, again = logits_of(model(images)), logits_of(model(images))
            if not torch.allclose(logits, again, equal_nan=True):
                raise ValueError(
                    "model: it gives other logits of the same images on a second call, such as by "
                    "ranking='random'; export one that does not draw at random"
                )
            found.append((images, logits))
    return found


def _write_checked(
    name: str, format: Format, job: Job, path: Path, expected: list[tuple[Tensor, Tensor]]
) -> None:
    others = tuple(other for other in FORMATS if other != name)
    try:
        format.write(job, path)
        run = format.read(path)
        found = [run(images) for images, _ in expected]
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # of exporters, compilers and runtimes, which have no common class
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = next((line for line in str(cause).splitlines() if line.strip()), "")
        raise ValueError(
            f"format: {name!r} cannot hold this model ({type(cause).__name__}: {said[:200]}); try "
            f"one of {others}"
        ) from error
    bits = 16 if _amp(job.model) else torch.finfo(job.images.dtype).bits
    for logits, (images, right) in zip(found, expected, strict=True):
        limit = TOLERANCE[bits] * float(right.abs().max())
        if logits.shape != right.shape or not (logits - right).abs().max() <= limit:
            raise ValueError(
                f"format: the file that {name!r} made of this model gives other logits than the "
                f"model for {len(images)} images, and was not written; try one of {others}"
            )


def _metadata(model: Any, deployed: nn.Module) -> dict[str, str]:
    """What a file says of the model, as text by names."""
    tuned = known_by(model)
    record = getattr(model, "record", None) if tuned is None else tuned.record
    transform = None if record is None else record.transform
    found = {
        "pcx": __version__,
        "transform": json.dumps(data_config(deployed) if transform is None else transform),
    }
    if tuned is not None:
        found["method"] = tuned.method
    if record is not None and record.task is not None:
        found["task"] = record.task
    if record is not None and record.class_names is not None:
        found["class_names"] = json.dumps(record.class_names)
    return found
