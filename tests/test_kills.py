"""Kills lose nothing: a short run of soak.py, in a process that has no threads to fork."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ("train", "condense", "score", "search", "save", "study")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_kills_lose_nothing():
    soak = Path(__file__).with_name("soak.py")
    done = subprocess.run(
        [sys.executable, soak, "--kills", "18", "--kind", *KINDS],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 of 3 kills, nothing lost") == 6
