"""Several processes train the model that one process trains with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("train_together.py")
ROOT = SCRIPT.parents[2]


def trained(folder, processes, batch, device, *more):
    """What each process wrote."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if device == "cpu":
            own["ACCELERATE_USE_CPU"] = "true"
        if processes > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(SCRIPT), str(folder), str(batch), device, *more]
        running.append(subprocess.Popen(command, env={**os.environ, **own}))
    assert [process.wait(300) for process in running] == [0] * processes
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(processes)]


def check(tmp_path, device, tolerance, *more, method="vpt"):
    (alone,) = trained(tmp_path / "alone", 1, 8, device, method)
    first, second = trained(tmp_path / "together", 2, 4, device, method, *more)
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        torch.testing.assert_close(tensor, alone["state"][name], rtol=tolerance, atol=tolerance)
    for a, b in zip(first["history"], alone["history"], strict=True):
        for key in ("loss", "accuracy", "val_loss", "val_accuracy", "samples"):
            assert a[key] == pytest.approx(b[key], rel=max(tolerance, 1e-9)), key


def test_two_processes_train_as_one(tmp_path):
    check(tmp_path, "cpu", 1e-10)


@pytest.mark.parametrize("method", ["sct", "adapter"])
def test_two_processes_train_other_methods_as_one(tmp_path, method):
    check(tmp_path, "cpu", 1e-10, method=method)


def test_a_loader_that_is_divided_already_is_not_divided_again(tmp_path):
    check(tmp_path, "cpu", 1e-10, "divided")


@pytest.mark.gpu
def test_two_gpus_train_as_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(tmp_path, "cuda", 1e-4)
