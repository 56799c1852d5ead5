"""The file formats of `pcx.export`: how each is written, and how a written file is run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MOST_OF_ONNX = 2**31 - 1  # bytes of a protobuf message, which an ONNX file is
INPUT, OUTPUT, BATCH = "images", "logits", "batch"  # names in an ONNX file
EXTRA = "pcx.json"  # the file within a .pt2 or .ts file that has the metadata

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """What a format writes.

    Args:
        model: in eval mode, without parameters that require gradients; maps images to logits.
        images: an example of two images, [2, C, H, W].
        metadata: what the file says of the model, as text by names.
    """

    model: nn.Module
    images: Tensor
    metadata: dict[str, str]

    def program(self) -> torch.export.ExportedProgram:
        """The model as a program of torch's own operations, for batches of any size."""
        shapes = ({0: torch.export.Dim(BATCH, min=1)},)
        return torch.export.export(self.model, (self.images,), dynamic_shapes=shapes, strict=False)


@dataclass(frozen=True)
class Format:
    """One file format.

    Args:
        suffix: how its files' names end.
        write: writes a job to a path, and takes a path whose name ends so.
        read: reads such a file as a function that maps images to logits, on the images' device.
        needs: packages of `pcx.extras` that writing and reading import.
    """

    suffix: str
    write: Callable[[Job, Path], None]
    read: Callable[[Path], Run]
    needs: tuple[str, ...] = ()


def _write_onnx(job: Job, path: Path) -> None:
    weights = [*job.model.parameters(), *job.model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    if size > MOST_OF_ONNX:
        raise ValueError(
            f"format: 'onnx' holds {MOST_OF_ONNX / 1e9:.2f} GB in a file, and the weights are "
            f"{size / 1e9:.2f} GB; choose 'exported' or 'aoti'"
        )
    program: Any = job.program()
    written: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
    )
    proto = written.model_proto
    symbol = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = dim.dim_param.replace(symbol, BATCH)
    for name, text in job.metadata.items():
        proto.metadata_props.add(key=name, value=text)
    path.write_bytes(proto.SerializeToString())


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    return run


def _write_exported(job: Job, path: Path) -> None:
    torch.export.save(job.program(), path, extra_files={EXTRA: _as_json(job)})


def _read_exported(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_aoti(job: Job, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    said: Any = {"aot_inductor.metadata": job.metadata}
    aoti_compile_and_package(job.program(), package_path=str(path), inductor_configs=said)


def _read_aoti(path: Path) -> Run:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def _write_torchscript(job: Job, path: Path) -> None:
    # pcx.export checks more than torch's own check, which runs the example again
    traced = torch.jit.trace(job.model, (job.images,), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={EXTRA: _as_json(job)})


def _read_torchscript(path: Path) -> Run:
    return torch.jit.load(str(path))


def _as_json(job: Job) -> str:
    return json.dumps(job.metadata, sort_keys=True)


# Of formats that share a suffix the first is the one that the suffix stands for.
FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "exported": Format(".pt2", _write_exported, _read_exported),
    "aoti": Format(".pt2", _write_aoti, _read_aoti),
    "torchscript": Format(".ts", _write_torchscript, _read_torchscript),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what exporters warn of: their own deprecated calls, and sizes that a trace fixes.

    `pcx.export` runs the written file on other sizes of batches instead.
    """
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
