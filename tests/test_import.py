"""What `import pcx` loads, and that every name is where it was."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pcx

HEAVY = ("torch", "timm", "accelerate", "optuna", "matplotlib", "typer", "torchmetrics", "sklearn")


def printed(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded(code):
    heads = f"print(*(name for name in {HEAVY} if name in sys.modules))"
    return set(printed(f"import sys; {code}; {heads}").split())


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import pcx; pcx.__version__; dir(pcx)") == set()


def test_using_it_loads_no_command_line_search_or_figures():
    found = loaded("import pcx; pcx.VPT; pcx.fit; pcx.condense; pcx.token_pruning.search")
    assert found == {"torch", "timm", "accelerate"}


def test_subpackages_are_there_whatever_was_used_before():
    said = printed(
        "import pcx; pcx.prefix_attention;"
        "print(pcx.backbones.inputs.data_config.__name__, pcx.token_pruning.tome.__name__,"
        "pcx.training.fitting.fit is pcx.fit, pcx.tasks.load_task.__name__)"
    )
    assert said == "data_config tome True load_task"
    assert printed("import pcx; print(pcx.training.recipe.Recipe.__name__)") == "Recipe"


def test_operations_are_registered_in_a_program_that_has_torch():
    assert "prefix_attention" in printed(
        "import torch; import pcx; print(torch.ops.pcx.prefix_attention)"
    )


def test_type_checkers_see_what_runs():
    """The block under TYPE_CHECKING names each public name's module, as the table at run time."""
    tree = ast.parse(Path(pcx.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: statement.module
        for statement in blocks[0].body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert set(seen) == set(pcx.__all__)
    for name, module in seen.items():
        assert getattr(pcx, name) is getattr(importlib.import_module(module), name)
    assert seen == pcx._MODULES


def test_other_names_are_errors():
    with pytest.raises(AttributeError, match="module 'pcx' has no attribute 'vpt'"):
        pcx.vpt  # noqa: B018
    assert {"VPT", "token_pruning", "__version__"} <= set(dir(pcx))


def test_no_name_hides_a_module():
    """A function of a module's name in its package would hide it: `import pcx.x.y as y` fails."""
    names = [m.name for m in pkgutil.walk_packages(pcx.__path__, "pcx.") if "._" not in m.name]
    for name in names:
        importlib.import_module(name)
    packages = [(importlib.import_module(n.rpartition(".")[0]), n) for n in names]
    hidden = [n for p, n in packages if vars(p)[n.rpartition(".")[2]] is not sys.modules[n]]
    assert hidden == []
