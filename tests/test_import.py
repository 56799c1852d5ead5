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


LIGHT = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("matplotlib", "optuna", "sklearn", "torchmetrics"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
found = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n in ("matplotlib", "optuna", "sklearn",
                                                       "torchmetrics") else found(n, *a)
"""


@pytest.mark.parametrize(
    ("line", "needs"),
    [
        ("train --task digits --out m.safetensors", "the task 'digits' needs scikit-learn"),
        ("search m.safetensors --task digits --budget 0.5", "pcx search needs optuna"),
    ],
)
def test_commands_say_which_extra_they_need(tmp_path, line, needs):
    code = LIGHT + f"sys.argv = ['pcx', *{line.split()!r}]; from pcx.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert f"pcx: {needs}, which is not installed; run: pip install 'pcx[study]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_everything_else_works_without_extras():
    said = printed(
        LIGHT + "import pkgutil, pcx, importlib\n"
        "for m in pkgutil.walk_packages(pcx.__path__, 'pcx.'):\n"
        "    if not any(p in m.name for p in ('._C', 'kernels', 'hugging_face')):\n"
        "        importlib.import_module(m.name)\n"
        "from pcx.backbones import scenes_vit\nimport torch\n"
        "model = pcx.VPT(scenes_vit(), 2, num_classes=3)\n"
        "data = torch.utils.data.TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6) % 3)\n"
        "loader = torch.utils.data.DataLoader(data, 3)\n"
        "pcx.fit(model, loader, epochs=1, lr=0.1, progress=False)\n"
        "pcx.condense(model, loader, 0.5, epochs=0, progress=False)\n"
        "pcx.zero_tprune(model, layers=(2,), keep=0.5, iters=3)\n"
        "print(len(pcx.predict(model, torch.randn(2, 3, 64, 64))))"
    )
    assert said == "2"
