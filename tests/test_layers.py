"""What a reader of the code can rely on: layers, sizes, and no hidden switches."""

import ast
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = [p for p in (ROOT / "pcx").rglob("*.py") if "kernels" not in p.parts]
KERNELS = list((ROOT / "kernels").rglob("*.py"))


def lengths(files):
    """Lines of every function from its def to its end, by name."""
    return {
        f"{file.relative_to(ROOT)}:{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.skipif(shutil.which("lint-imports", path=str(Path(sys.executable).parent)) is None,
                    reason="import-linter is not installed")  # fmt: skip
def test_imports_go_one_way():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout
    assert "5 kept, 0 broken" in done.stdout


def test_no_file_is_long():
    longest = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in PACKAGE + KERNELS}
    assert not {name: lines for name, lines in longest.items() if lines > 400}


def test_functions_fit_a_screen():
    found = lengths(PACKAGE)
    assert not {name: lines for name, lines in found.items() if lines > 80}
    assert statistics.median(found.values()) <= 8
    assert statistics.quantiles(found.values(), n=10)[-1] <= 30
    assert not {name: lines for name, lines in lengths(KERNELS).items() if lines > 120}


def test_there_is_one_environment_variable_at_most():
    read = {
        line.strip()
        for file in PACKAGE + KERNELS
        for line in file.read_text().splitlines()
        if "os.environ" in line or "getenv" in line or "parse_flag_from_env(" in line
    }
    assert len(read) <= 1, read
