"""Benchmark of weighted PageRank against forms that store the attention matrix.

`pytest benchmarks/bench_weighted_pagerank.py` checks and times. Run as a program on a GPU it writes
`results/weighted_pagerank_<gpu>.csv`: microseconds of a call in a CUDA graph, q and k in bfloat16.

- pcx: `pcx.weighted_pagerank`;
- written out: the matrix is computed once, all in bfloat16, then each iteration is a batched
  matrix-vector product;
- squared: the matrix is raised to the power of all iterations by repeated squaring, in bfloat16.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path

import pytest
import torch

import pcx

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import graphed, table

RESULTS = Path(__file__).parent / "results"
ON_GPU = torch.cuda.is_available()
BATCH, HEADS, DIM = (64, 6, 64) if ON_GPU else (4, 3, 64)
TOKENS, ITERATIONS = (197, 50, 145, 257, 577) if ON_GPU else (197, 50, 145), (30, 5, 1)
FIELDS = "form tokens iters batch heads dim dtype us_median us_q1 us_q3 gpu torch"


def inputs(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in the layout of timm's projection, with peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(BATCH, tokens, 3, HEADS, DIM, generator=generator)
    qkv[:, :, 0] *= 3
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    q, k, _ = qkv.to("cuda" if ON_GPU else "cpu", dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k


def ours(q: torch.Tensor, k: torch.Tensor, iters: int) -> torch.Tensor:
    return pcx.weighted_pagerank(q, k, iters=iters)


def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The attention matrix [B H, N, N]; the smaller factor, the queries, is scaled."""
    return (q / math.sqrt(DIM) @ k.transpose(-2, -1)).softmax(-1).flatten(0, 1)


def written_out(q: torch.Tensor, k: torch.Tensor, iters: int) -> torch.Tensor:
    matrix = attention(q, k)
    scores = matrix.new_full((len(matrix), 1, q.shape[2]), 1 / q.shape[2])
    for _ in range(iters):
        scores = torch.bmm(scores, matrix)
    return scores.reshape(*q.shape[:3]).float()


def squared(q: torch.Tensor, k: torch.Tensor, iters: int) -> torch.Tensor:
    matrix = attention(q, k)
    scores = matrix.new_full((len(matrix), 1, q.shape[2]), 1 / q.shape[2])
    while True:
        if iters % 2:
            scores = torch.bmm(scores, matrix)
        iters //= 2
        if not iters:
            return scores.reshape(*q.shape[:3]).float()
        matrix = torch.bmm(matrix, matrix)


FORMS = {"pcx": ours, "written out": written_out, "squared": squared}


def check(tokens: int, iters: int) -> None:
    """Checks pcx to 1e-4 of float64, and the other forms, which round the matrix, to less."""
    q, k = inputs(tokens)
    exact = (q.double() @ k.double().transpose(-2, -1) / math.sqrt(DIM)).softmax(-1)
    scores = exact.new_full((*q.shape[:2], 1, tokens), 1 / tokens)
    for _ in range(iters):
        scores = scores @ exact
    expected = scores[:, :, 0]
    for form, call in FORMS.items():
        found = call(q, k, iters).double()
        found = found / found.sum(-1, keepdim=True)
        allowed = 1e-4 if form == "pcx" else 0.3
        assert ((found - expected).abs() / expected).max() < allowed, form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_thirty_iterations(benchmark, form, tokens):
    check(tokens, 30)
    q, k = inputs(tokens)

    def run():
        FORMS[form](q, k, 30)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def measure(form: str, tokens: int, iters: int) -> dict:
    batches = [inputs(tokens, seed) for seed in range(4)]  # together larger than the L2
    calls = [lambda q=q, k=k: FORMS[form](q, k, iters) for q, k in batches]
    first, median, third = graphed(calls)
    return {
        "form": form,
        "tokens": tokens,
        "iters": iters,
        "batch": BATCH,
        "heads": HEADS,
        "dim": DIM,
        "dtype": "bfloat16",
        "us_median": round(median, 1),
        "us_q1": round(first, 1),
        "us_q3": round(third, 1),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    file, before = table(parser.parse_args().out, "weighted_pagerank")
    done = {(r["form"], r["tokens"], r["iters"]) for r in before}
    with open(file, "a", newline="") as output:
        writer = csv.DictWriter(output, FIELDS.split())
        if not before:
            writer.writeheader()
        for tokens in TOKENS:
            for iters in ITERATIONS:
                wanted = [f for f in FORMS if (f, str(tokens), str(iters)) not in done]
                if wanted:
                    check(tokens, iters)
                for form in wanted:
                    row = measure(form, tokens, iters)
                    print(*row.values(), flush=True)
                    writer.writerow(row)
                    output.flush()


if __name__ == "__main__":
    main()
