"""The CUDA kernels without a GPU: what ptxas says of them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SPILLED = 96  # bytes; what a block reads once for each head of a sample, not once for each stage


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc here")
    file = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
    flags = ["-O3", "-std=c++20", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", "-o", str(file)]
    source = ROOT / "csrc" / "cuda" / "prefix_attention_forward.cu"
    done = subprocess.run(
        [Path(nvcc).resolve(), *flags, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_products_of_warp_groups_overlap(said):
    assert "serialized" not in said


def test_registers(said):
    used = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill loads", said)]
    assert len(used) == 2  # bfloat16 and float16
    assert max(used) <= 128  # of 65536, for 16 warps
    assert max(spilled) <= SPILLED
