"""Benchmark of prefix_attention against concatenation before each SDPA backend.

`pytest benchmarks/bench_prefix_attention.py` checks and times a few shapes, on the GPU if there is
one. On a GPU, `python benchmarks/bench_prefix_attention.py` writes
`results/prefix_attention_<gpu>.csv`. Rows that are already there are not measured again. All GPU
times are of CUDA graphs over three sets of inputs, in turn. `--draw <csv>` draws the figure of a
table.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import pcx

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import graphed, rows_of, table

RESULTS = Path(__file__).parent / "results"
HEADS = 12
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEADLINE = {"batch": 64, "n": 197, "dim": 64}
BOUND = 3e-2  # largest error allowed, relative to the largest element
FIELDS = (
    "pass form batch n m dim heads dtype us_median us_q1 us_q3 max_error gpu torch triton driver"
)


def inputs(batch, n, m, dim, dtype, device, seed=0) -> list[Tensor]:
    """q, k, v in the layout of timm's projection, prefix keys and values, output gradient."""
    generator = torch.Generator(device).manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    q, k, v = rand(batch, n, 3, HEADS, dim).permute(2, 0, 3, 1, 4).unbind(0)
    gradient = rand(batch, n, HEADS, dim).transpose(1, 2)
    return [q, k, v, rand(HEADS, m, dim), rand(HEADS, m, dim), gradient]


def concatenate(k, v, prefix_k, prefix_v) -> tuple[Tensor, Tensor]:
    shape = (len(k), *prefix_k.shape)
    return torch.cat([prefix_k.expand(shape), k], 2), torch.cat([prefix_v.expand(shape), v], 2)


def concatenating(q, k, v, prefix_k, prefix_v) -> Tensor:
    if not prefix_k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, *concatenate(k, v, prefix_k, prefix_v))


def gradients(attend, tensors, gradient) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    used = leaves if leaves[3].shape[1] else leaves[:3]
    return torch.autograd.grad(attend(*leaves), used, gradient)


def largest_error(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """The largest error, relative to the largest element."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True)
    )


def errors_of(attend, tensors, gradient) -> tuple[float, float]:
    """The errors of the output and of the gradients, against float32."""
    small = [t[:2].float() if i < 3 else t.float() for i, t in enumerate(tensors)]
    part = [t[:2] if i < 3 else t for i, t in enumerate(tensors)]
    found = gradients(attend, part, gradient[:2])
    with torch.no_grad():
        out = attend(*part)
    with sdpa_kernel(SDPBackend.MATH):
        right = gradients(concatenating, small, gradient[:2].float())
        with torch.no_grad():
            expected = concatenating(*small)
    return (
        largest_error((out.float(),), (expected,)),
        largest_error(tuple(g.float() for g in found), right),
    )


@pytest.mark.parametrize("m", [0, 50, 200])
@pytest.mark.parametrize("form", ["pcx", "concatenating"])
@pytest.mark.parametrize("which", ["forward", "forward+backward"])
def test_prefix_attention(benchmark, which, form, m):
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    *tensors, gradient = inputs(64 if on_gpu else 4, 197, m, 64, dtype, device)
    attend = pcx.prefix_attention if form == "pcx" else concatenating
    assert max(errors_of(attend, tensors, gradient)) < BOUND

    def run():
        if which == "forward":
            with torch.no_grad():
                attend(*tensors)
        else:
            gradients(attend, tensors, gradient)
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=3)


def forms_at(shape: dict) -> dict[str, tuple[Callable, SDPBackend | None]]:
    """Name -> (attention over (q, k, v, prefix_k, prefix_v), the SDPA backend it is to use)."""
    forms: dict[str, tuple[Callable, SDPBackend | None]] = {"pcx": (pcx.prefix_attention, None)}
    headline = all(shape[key] == value for key, value in HEADLINE.items())
    for name, backend in BACKENDS.items():
        if name != "efficient" or headline:
            forms[f"cat + {name}"] = (concatenating, backend)
    if headline:
        torch._dynamo.reset()
        compiled = torch.compile(concatenating, fullgraph=True, dynamic=False)
        forms["compiled cat + cudnn"] = (compiled, BACKENDS["cudnn"])
    return forms


def _three_sets(shape: dict, m: int) -> list[list[Tensor]]:
    return [inputs(**shape, m=m, dtype=torch.bfloat16, device="cuda", seed=i) for i in range(3)]


def _row(which: str, form: str, shape: dict, m: int, quartiles, error: float) -> dict:
    first, median, third = quartiles
    row = {
        "pass": which,
        "form": form,
        **shape,
        "m": m,
        "heads": HEADS,
        "dtype": "bfloat16",
        "us_median": round(median, 2),
        "us_q1": round(first, 2),
        "us_q3": round(third, 2),
        "max_error": f"{error:.1e}",
    }
    print(*row.values(), flush=True)
    return row


def measure(shape: dict, m: int, done: set[tuple]) -> list[dict]:
    """Measures the rows of one shape that are missing; backward times are without the forward."""
    rows: list[dict] = []

    def missing(which: str, form: str) -> bool:
        return (which, form, shape["batch"], shape["n"], m, shape["dim"]) not in done

    def add(which: str, form: str, quartiles, error: float) -> None:
        rows.append(_row(which, form, shape, m, quartiles, error))

    sets = _three_sets(shape, m)
    for form, (attend, backend) in forms_at(shape).items():
        if not (missing("forward", form) or missing("backward", form)):
            continue
        with sdpa_kernel(backend or list(BACKENDS.values())):
            out_error, error = errors_of(attend, sets[0][:5], sets[0][5])
            if form == "pcx":
                assert max(out_error, error) < BOUND, (shape, m, out_error, error)
            if not out_error < BOUND:
                print(form, shape, m, f"is wrong by {out_error:.1e}: not timed", flush=True)
                continue
            add("forward", form, graphed([_forward(attend, s) for s in sets]), out_error)
            if not error < BOUND:
                print(form, shape, m, f"backward is wrong by {error:.1e}: not timed", flush=True)
                continue
            whole = graphed([_both(attend, s) for s in sets])
            # The forward here saves tensors for the backward, and is timed with that.
            alone = graphed([_saving_forward(attend, s) for s in sets])
            back = tuple(w - alone[1] for w in whole)
            add("backward", form, back, error)
    for name in ("cudnn", "flash"):
        if missing("forward", f"concatenated before + {name}"):
            joined = [(s[0], *concatenate(*s[1:5])) for s in sets]
            with sdpa_kernel(BACKENDS[name]):
                calls = [_forward(F.scaled_dot_product_attention, j) for j in joined]
                add("forward", f"concatenated before + {name}", graphed(calls), 0.0)
    return rows


def _forward(attend, tensors):
    def run():
        with torch.no_grad():
            return attend(*tensors[:5])

    return run


def _saving_forward(attend, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors[:5]]
    return lambda: attend(*leaves)


def _both(attend, tensors):
    return lambda: gradients(attend, tensors[:5], tensors[5])


def _flash(q, k, v) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flex(q, k, v) -> tuple[Tensor, Tensor]:
    return flex_attention(q, k, v, return_lse=True)


def merging(attend: Callable) -> Callable:
    """Attention without concatenation, from parts of torch.

    It merges two results (output, LSE) by their LSEs. The first is of all samples' queries, folded
    into one axis, over the prefix. The second is of each sample's queries over its own keys.
    """

    def run(q, k, v, prefix_k, prefix_v) -> Tensor:
        batch, heads, n, dim = q.shape
        folded = q.transpose(0, 1).reshape(1, heads, batch * n, dim)
        shared, shared_lse = attend(folded, prefix_k[None], prefix_v[None])
        own, own_lse = attend(q, k, v)
        shared = shared.reshape(heads, batch, n, dim).transpose(0, 1)
        weight = (shared_lse.reshape(heads, batch, n).transpose(0, 1) - own_lse).sigmoid()
        return torch.lerp(own.float(), shared.float(), weight[..., None]).to(q.dtype)

    return run


def measure_merging(m: int, done: set[tuple]) -> list[dict]:
    """Forward rows of the two forms that merge by LSEs, at the headline shape."""
    rows = []
    for form, attend in {"folded flash, merged": _flash, "folded flex, merged": _flex}.items():
        if ("forward", form, HEADLINE["batch"], HEADLINE["n"], m, HEADLINE["dim"]) in done:
            continue
        sets = _three_sets(HEADLINE, m)
        torch._dynamo.reset()
        compiled = torch.compile(merging(attend), fullgraph=True, dynamic=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            right = concatenating(*(t.float() for t in sets[0][:5]))
        with torch.no_grad():
            error = largest_error((compiled(*sets[0][:5]).float(),), (right,))
        assert error < BOUND, (form, m, error)
        quartiles = graphed([_forward(compiled, s) for s in sets])
        rows.append(_row("forward", form, HEADLINE, m, quartiles, error))
    return rows


def shapes():
    """All shapes, the headline shape first."""
    yield dict(HEADLINE)
    for dim, n, batch in itertools.product((64, 80), (197, 49, 577), (64, 1, 256)):
        shape = {"batch": batch, "n": n, "dim": dim}
        if shape != HEADLINE:
            yield shape


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def draw(file: Path) -> None:
    """Draws times against the number of prompts at the headline shape, beside the table."""
    from matplotlib.figure import Figure

    rows = rows_of(file)
    rows = [r for r in rows if all(int(r[key]) == value for key, value in HEADLINE.items())]
    figure = Figure(figsize=(8, 3), layout="constrained")
    labels = {
        "cat + cudnn": "concatenation + cuDNN, eager",
        "compiled cat + cudnn": "concatenation + cuDNN, compiled",
        "concatenated before + cudnn": "cuDNN, already concatenated",
        "pcx": "pcx.prefix_attention",
    }
    for axes, which in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
        for form, label in labels.items():
            found = [
                (int(r["m"]), float(r["us_median"]))
                for r in rows
                if (r["pass"], r["form"]) == (which, form)
            ]
            if found:
                colour = f"C{list(labels).index(form)}"
                axes.plot(*zip(*sorted(found), strict=True), "o-", color=colour, label=label)
        axes.set(title=which, xlabel="prompts", ylabel="microseconds", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7)
    figure.suptitle(f"{rows[0]['gpu']}, bfloat16, B=64, H=12, N=197, d=64", fontsize=9)
    figure.savefig(file.with_suffix(".png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", type=Path)
    arguments = parser.parse_args()
    if arguments.draw:
        return draw(arguments.draw)
    import triton

    file, before = table(arguments.out, "prefix_attention")
    done = {
        (r["pass"], r["form"], *(int(r[k]) for k in ("batch", "n", "m", "dim"))) for r in before
    }
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _driver(),
    }
    with open(file, "a", newline="") as output:
        writer = csv.DictWriter(output, FIELDS.split())
        if not before:
            writer.writeheader()
        for shape in shapes():
            for m in (0, 10, 50, 100, 200):
                for row in measure(shape, m, done):
                    writer.writerow({**row, **machine})
                output.flush()
            if shape == HEADLINE:
                for m in (50, 100, 200):
                    for row in measure_merging(m, done):
                        writer.writerow({**row, **machine})
                    output.flush()


if __name__ == "__main__":
    main()
