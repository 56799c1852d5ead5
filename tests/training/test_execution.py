"""How batches are run, without a GPU: names, losses, optimisers, and a compiled model."""

import pytest
import torch
from torch import nn

import pcx
from pcx.training.execution import EXECUTIONS, prepared
from pcx.training.losses import LOOK_EVERY, Losses
from pcx.training.optimizers import Rates, load_plain, make_recordable, plain_state

CPU = torch.device("cpu")


def test_executions_that_are_not_possible_are_named(backbone, loader):
    model = pcx.Linear(backbone)
    for call in (
        lambda e: pcx.fit(model, loader, epochs=1, lr=0.1, execution=e, progress=False),
        lambda e: pcx.evaluate(model, loader, execution=e),
        lambda e: prepared(lambda: None, CPU, e),
    ):
        with pytest.raises(ValueError, match="execution: got 'fast', expected one of"):
            call("fast")
        with pytest.raises(ValueError, match="execution: 'cuda-graph' needs CUDA, the device is"):
            call("cuda-graph")
    with pytest.raises(ValueError, match="execution: got 'fast', expected one of"):
        pcx.freeze(model, execution="fast")


@pytest.mark.parametrize("execution", [e for e in EXECUTIONS if e != "cuda-graph"])
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_all_executions_train_alike(backbone, loader, dataset, execution):
    def trained(execution):
        torch.manual_seed(0)
        model = pcx.VPT(backbone, 2, head_init="keep")
        rows = pcx.fit(model, loader, epochs=2, lr=0.05, execution=execution, progress=False)
        return rows, model.eval()

    (rows, found), (expected_rows, expected) = trained(execution), trained("eager")
    x = dataset.tensors[0]
    torch.testing.assert_close(found(x), expected(x), rtol=1e-9, atol=1e-9)
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in expected_rows])
    frozen = pcx.freeze(found, execution=execution)
    torch.testing.assert_close(frozen(x), expected(x), rtol=1e-9, atol=1e-9)


def test_losses_are_added_up_and_looked_at():
    losses = Losses("epoch 3")
    for step in range(25):
        losses.add(torch.full((4,), float(step)))
    assert losses.mean() == 12.0
    assert losses.samples == 100
    losses = Losses("epoch 3")

    def add_many():
        for step in range(3 * LOOK_EVERY):
            losses.add(torch.tensor([1.0, torch.inf if step == 3 else 1.0]))

    with pytest.raises(pcx.NonFiniteLoss, match="inf in epoch 3, step 4"):
        add_many()
    assert losses.samples <= 2 * 2 * LOOK_EVERY
    with pytest.raises(ValueError, match="loader: it yielded no sample"):
        Losses("epoch 1").mean()


@pytest.mark.parametrize(
    ("make", "recordable"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), True),
        (lambda p: torch.optim.AdamW(p, lr=0.1), True),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), False),
        (lambda p: __import__("timm").optim.Lion(p, lr=0.1), False),
    ],
)
def test_optimisers_that_a_graph_can_hold(make, recordable):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make([parameter])
    assert make_recordable(optimizer) == recordable
    rates = Rates(optimizer, CPU, recordable)
    group = optimizer.param_groups[0]
    for rate in (0.5, 0.25):
        group["lr"] = rate  # as a schedule does
        assert rates.hand_over() == rate
        assert float(group["lr"]) == rate
        assert isinstance(group["lr"], torch.Tensor) == recordable
    state = plain_state(optimizer)
    assert state["param_groups"][0]["lr"] == 0.25
    assert type(state["param_groups"][0]["lr"]) is float
    other = make([parameter])
    load_plain(other, state)  # its own form of the step stays
    assert other.param_groups[0].get("fused") == make([parameter]).param_groups[0].get("fused")
