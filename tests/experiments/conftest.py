"""A tiny comparison."""

import pytest
from tiny_tasks import tiny_backbone, tiny_task

from pcx.experiments.trials import Recipe, Setup


@pytest.fixture
def setup():
    tasks = {name: tiny_task(name, seed=seed) for name, seed in (("tiny:a", 0), ("tiny:b", 5))}
    return Setup(tasks, tiny_backbone, Recipe(epochs=1, batch_size=6))


@pytest.fixture
def trained(monkeypatch):
    """The trials that were really trained, in their order."""
    found, run = [], Setup.run

    def counted(self, trial, file=None):
        found.append(trial)
        return run(self, trial, file)

    monkeypatch.setattr(Setup, "run", counted)
    return found
