"""The Triton kernel of prompt_score without a GPU: interpreted, and compiled for one."""

import pytest
import torch
from without_gpu import Recorder, compiled, interpret, spills

pytest.importorskip("triton")


def test_in_the_interpreter():
    assert interpret("interpreted_prompt_score.py") >= 19


@pytest.mark.parametrize("dim", [192, 768, 1024, 1536])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_compiles_without_spilling(monkeypatch, dim, layer_norm):
    from pcx.kernels import prompt_score as kernel

    recorder = Recorder(kernel._score)
    monkeypatch.setattr(kernel, "_score", recorder)
    gradient = torch.empty(8, 10, dim, dtype=torch.bfloat16)
    prompts, weight = torch.empty(10, dim), torch.empty(dim)
    kernel.prompt_score(gradient, prompts, layer_norm, weight if layer_norm else None, 1e-6)
    ((args, options),) = recorder.launches
    assert not spills(compiled(recorder.kernel, args, options, 90))
