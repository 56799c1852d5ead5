"""The Triton kernels without a GPU: interpreted, and compiled for one that is not there."""

import re

import pytest
import torch
from without_gpu import Recorder, compiled, interpret, source_of, spills

pytest.importorskip("triton")


def test_in_the_interpreter():
    assert interpret("interpreted_prefix_attention.py") >= 30


@pytest.fixture
def recorded(monkeypatch):
    from pcx.kernels.prefix_attention import forward, key_gradients, query_gradient, windows

    recorders = {}
    for file in (forward, query_gradient, key_gradients, windows):
        name = "_" + file.__name__.rpartition(".")[2]
        recorders[name] = Recorder(getattr(file, name))
        monkeypatch.setattr(file, name, recorders[name])
    return recorders


def launch(m, dim, dtype, n=197):
    from pcx.kernels.prefix_attention.backward import backward
    from pcx.kernels.prefix_attention.forward import forward

    q, k, v = torch.empty(4, n, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    pk, pv = torch.empty(2, 12, m, dim, dtype=dtype).unbind(0)
    out, lse = forward(q, k, v, pk, pv, None, None, None, 0.125)
    needs = (True, True, True, False)
    backward(out, None, q, k, v, pk, pv, None, None, None, out, lse, 0.125, needs)


@pytest.mark.parametrize(
    ("capability", "m", "dim", "dtype"),
    [
        (90, 200, 64, torch.bfloat16),
        (90, 50, 80, torch.float16),
        (80, 200, 64, torch.bfloat16),
    ],
)
def test_compiles_without_spilling(recorded, capability, m, dim, dtype, monkeypatch):
    from pcx.kernels.prefix_attention import launch as configurations

    monkeypatch.setattr(configurations, "products_of_warps", lambda q: capability != 90)
    launch(m, dim, dtype)
    for name, recorder in recorded.items():
        for args, options in recorder.launches:
            found = compiled(recorder.kernel, args, options, capability)
            assert not spills(found), f"{name} at {options} spills registers"
            if capability == 90 and name == "_forward":
                assert "wgmma" in found.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("n", "m", "dim"), [(49, 50, 32), (64, 50, 32), (49, 100, 32), (64, 50, 64), (49, 128, 16)]
)
def test_packed_windows_compile_without_spilling(recorded, capability, n, m, dim):
    launch(m, dim, torch.bfloat16, n)
    assert not recorded["_forward"].launches
    ((args, options),) = recorded["_windows"].launches
    assert not spills(compiled(recorded["_windows"].kernel, args, options, capability))


@pytest.mark.parametrize("dim", [72, 88])
def test_loads_are_wide_where_the_head_dim_is_a_multiple_of_8_alone(recorded, dim):
    launch(100, dim, torch.bfloat16)
    del recorded["_windows"]
    assert all(recorder.launches for recorder in recorded.values())
    for name, recorder in recorded.items():
        for args, options in recorder.launches:
            found = compiled(recorder.kernel, args, options, 90)
            assert not spills(found), f"{name} spills registers"
            assert not re.search(r"\.global\S*\.[bu]16\b", found.asm["ptx"]), (
                f"{name} moves 2 bytes"
            )


def test_at_most_five_forms_of_the_forward_up_to_200_prompts(recorded):
    """Every layer of a condensed model has its own number of prompts."""
    forms = set()
    for m in range(201):
        recorded["_forward"].launches.clear()
        launch(m, 64, torch.bfloat16)
        ((args, options),) = recorded["_forward"].launches
        source, options = source_of(recorded["_forward"].kernel, args, options)
        forms.add(
            (
                str(sorted(source.signature.items())),
                str(sorted(source.constants.items())),
                str(sorted(source.attrs.items())),
                str(sorted(options.items())),
            )
        )
    assert len(forms) <= 5
