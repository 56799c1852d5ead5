"""The CUDA kernels without a GPU: what ptxas says of them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Registers that a thread may use, of 65536 for all, and bytes that it may spill: what it reads once
# for each head of a sample or, in one iteration of PageRank, each 64 queries; not for each stage.
# PageRank's 10 and 13 tiles without wgmma, and its 17, read some again in every iteration. Of
# salient_linear only rows of 2048 numbers spill that much, those of 768 at most 32 bytes.
LIMITS = {
    "prefix_attention_forward": (128, 68),
    "prefix_attention_queries": (128, 72),
    "prefix_attention_keys": (128, 24),
    "weighted_pagerank": (168, 244),
    "weighted_pagerank_once": (253, 160),
    "token_choice": (64, 0),
    "salient_linear": (128, 516),
}
HOPPER_ONLY = ("prefix_attention_forward", "prefix_attention_queries", "prefix_attention_keys")
CASES = [("sm_90a", name) for name in LIMITS] + [
    ("sm_80", name) for name in LIMITS if name not in HOPPER_ONLY
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def said(request, tmp_path_factory):
    architecture, name = request.param
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc here")
    file = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
    flags = [
        "-O3",
        "-std=c++20",
        f"-arch={architecture}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        str(file),
    ]
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    done = subprocess.run(
        [Path(nvcc).resolve(), *flags, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return name, done.stderr


def test_products_of_warp_groups_overlap(said):
    _, messages = said
    assert "serialized" not in messages


def test_registers(said):
    source, messages = said
    used = [int(n) for n in re.findall(r"Used (\d+) registers", messages)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill loads", messages)]
    assert len(used) >= 2  # kernels for every type of number
    registers, bytes_spilled = LIMITS[source]
    assert max(used) <= registers
    assert max(spilled) <= bytes_spilled
