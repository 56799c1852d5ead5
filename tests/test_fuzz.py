"""Made-up calls of ops and made-up batches: they are computed right, or refused by name."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pcx
from pcx.ops.dispatch import report

FUZZ = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BACKENDS = ["reference"]
if any(line.backend == "cpu" and line.reason is None for line in report()):
    BACKENDS.append("cpu")


@st.composite
def attention(draw):
    """Arguments of prefix_attention that fit together, in float64."""
    batch, heads, n, own = (draw(st.integers(1, 4)) for _ in range(4))
    dim, value_dim = (draw(st.sampled_from([1, 3, 8])) for _ in range(2))
    m, sets = draw(st.integers(0, 5)), draw(st.one_of(st.none(), st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    size = draw(st.sampled_from([0.0, 1.0, 30.0]))

    def rand(*shape):
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [rand(batch, heads, n, dim), rand(batch, heads, own, dim)]
    tensors.append(rand(batch, heads, own, value_dim))
    front = () if sets is None else (sets,)
    tensors += [rand(*front, heads, m, dim), rand(*front, heads, m, value_dim)]
    more = {}
    if sets is not None:
        more["prefix_index"] = torch.randint(sets, (batch,), generator=generator)
        if draw(st.booleans()):
            more["prefix_lengths"] = torch.randint(m + 1, (sets,), generator=generator)
    form = draw(st.sampled_from(["none", "additive", "boolean", "row", "least"]))
    if form == "additive":
        more["bias"] = rand(batch, 1, n, own)
    elif form == "boolean":
        more["bias"] = torch.rand(n, own, generator=generator) > 0.5
    elif form == "row":
        more["bias"] = torch.zeros(n, own, dtype=torch.float64)
        more["bias"][0] = -torch.inf
    elif form == "least":
        more["bias"] = torch.zeros(n, own, dtype=torch.float64)
        more["bias"][0] = torch.finfo(torch.float64).min
    return tensors, more


def expected(q, k, v, prefix_k, prefix_v, prefix_index=None, prefix_lengths=None, bias=None):
    """One query after the other, in loops."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(len(q)):
        place = None if prefix_index is None else int(prefix_index[b])
        keys, values = (p if place is None else p[place] for p in (prefix_k, prefix_v))
        if prefix_lengths is not None:
            length = int(prefix_lengths[place])
            keys, values = keys[:, :length], values[:, :length]
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                own = k[b, h] @ q[b, h, i] / q.shape[-1] ** 0.5
                if bias is not None:
                    row = bias.expand(len(q), q.shape[1], *bias.shape[-2:])[b, h, i]
                    own = (
                        own.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else own + row
                    )
                logits = torch.cat([keys[h] @ q[b, h, i] / q.shape[-1] ** 0.5, own])
                if (logits > -torch.inf).any():
                    out[b, h, i] = logits.softmax(0) @ torch.cat([values[h], v[b, h]])
    return out


@FUZZ
@given(arguments=attention())
def test_attention_is_that_of_a_loop(arguments):
    tensors, more = arguments
    right = expected(*tensors, **more)
    for backend in BACKENDS:
        for lse in (False, True):
            found = pcx.prefix_attention(*tensors, **more, backend=backend, return_lse=lse)
            found = found[0] if lse else found
            torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-8)


LABELS = st.sampled_from(
    [
        torch.arange(4) % 3,
        torch.arange(4),
        -torch.arange(4),
        torch.arange(3) % 3,
        torch.rand(4, 3),
        torch.zeros(4, dtype=torch.bool),
        [0, 1, 2, 0],
        ["a", "b", "c", "a"],
        None,
        3,
        torch.tensor(1),
        torch.full((4,), torch.nan),
    ]
)
IMAGES = st.sampled_from(
    [
        torch.randn(4, 3, 32, 32, dtype=torch.float64),
        torch.randn(4, 3, 32, 32),
        torch.randn(4, 3, 16, 32, dtype=torch.float64),
        torch.randn(4, 1, 32, 32, dtype=torch.float64),
        torch.randn(3, 32, 32, dtype=torch.float64),
        torch.full((4, 3, 32, 32), torch.inf, dtype=torch.float64),
        torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(0, 3, 32, 32, dtype=torch.float64),
        {"a": torch.ones(4)},
        [None] * 4,
        "images",
        None,
    ]
)
FORMS = [
    lambda images, labels: (images, labels),
    lambda images, labels: [images, labels],
    lambda images, labels: {"pixel_values": images, "labels": labels},
    lambda images, labels: {"image": images, "label": labels},
    lambda images, labels: (images, labels, None),
    lambda images, labels: images,
]


@FUZZ
@given(
    images=IMAGES,
    labels=LABELS,
    form=st.sampled_from(FORMS),
    objective=st.sampled_from(["single-label", "multi-label", "soft", "regression"]),
)
def test_a_batch_is_computed_or_refused_by_name(backbone, images, labels, form, objective):
    model = pcx.VPT(backbone, 2)
    loader = [form(images, labels)]
    refused = []
    try:
        found = pcx.evaluate(model, loader, objective=objective)
    except (ValueError, pcx.NonFiniteLoss) as error:
        refused.append(str(error))
    if not refused:
        assert found["samples"] == 4
        assert torch.tensor(found["loss"]).isfinite()
        return
    assert refused[0].startswith("loader: ")
    with pytest.raises((ValueError, pcx.NonFiniteLoss)):
        pcx.fit(model, loader, epochs=1, lr=0.1, objective=objective, progress=False)
