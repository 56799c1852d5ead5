"""The build: the compiled part, life without it, and an import that compiles nothing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = (
    "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py',"
    " '__name__': '__main__'})\n"
)
# What setup() would be called with, in `got`.
RECORDED = f"import setuptools; got = {{}}\nsetuptools.setup = lambda **k: got.update(k)\n{SETUP}"


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_extension_says_how_it_was_built():
    if importlib.util.find_spec("pcx._C") is None:
        pytest.skip("pcx._C was not built here")
    import torch

    from pcx import _C

    assert torch.__version__.startswith(_C.build_info()["torch"])


def test_an_extension_of_another_version_is_left_out_and_said():
    said = python(
        "import sys, types, warnings\n"
        "stale = types.ModuleType('pcx._C'); stale.__file__ = '_C.so'\n"
        "stale.build_info = lambda: {'cuda': False, 'schemas': 0}\n"
        "sys.modules['pcx._C'] = stale\n"
        "import pcx; from pcx.ops.library import EXTENSION\n"
        "assert not EXTENSION"
    )
    assert "_C.so is of another version of pcx and is left out: build it again" in said


def test_without_the_extension_nothing_is_said_and_all_is_there():
    said = python(
        "import sys, warnings; warnings.simplefilter('error')\n"
        "sys.modules['pcx._C'] = None\n"
        "import pcx, torch; from pcx.ops.library import EXTENSION\n"
        "assert not EXTENSION\n"
        "q, k, v = torch.randn(3, 2, 4, 5, 8, requires_grad=True).unbind()\n"
        "pcx.prefix_attention(q, k, v, *torch.randn(2, 4, 3, 8)).sum().backward()\n"
    )
    assert not said


def test_without_torch_pure_python_is_installed():
    """setup.py where torch cannot be imported: no extension, said aloud."""
    said = python(
        f"import sys; sys.modules['torch'] = None\n{RECORDED}"
        "assert 'ext_modules' not in got, got\n"
        "assert 'pcx' in got['packages'] and 'pcx.tasks' in got['packages']\n"
        "assert 'pcx.kernels' in got['packages']\n"
        "assert 'pcx.kernels.prefix_attention' in got['packages']\n"
        "assert 'pcx.ops.reference' in got['packages']\n"
    )
    assert "installing without the compiled extension" in said


def test_all_sources_and_headers_are_the_extension_s():
    said = python(
        f"{RECORDED}(part,) = got['ext_modules']\nprint('FILES', *part.sources, *part.depends)\n"
    )
    named = set(said.split("FILES")[1].splitlines()[0].split())
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    if "building without the CUDA kernels" in said:
        there = {name for name in there if not name.endswith(".cu") and "cuda/" not in name}
    assert there <= named


def test_without_nvcc_the_rest_is_built():
    """setup.py where no toolkit fits torch: C++ alone, said aloud where torch has CUDA."""
    said = python(
        f"import torch; torch.version.cuda = '1.0'\n{RECORDED}"
        "(part,) = got['ext_modules']\n"
        "assert not [f for f in part.sources if 'cuda' in f], part.sources\n"
        "assert 'csrc/cpu/prefix_attention.cpp' in part.sources\n"
    )
    assert "no nvcc of CUDA 1.0 was found: building without the CUDA kernels" in said


def test_a_failing_compiler_is_said_and_survived(tmp_path):
    code = (
        "import sys; sys.argv = ['setup.py', 'build_ext', '--build-lib', sys.argv[1], "
        f"'--build-temp', sys.argv[1]]\n{SETUP}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CXX": "/nonexistent/g++", "CC": "/nonexistent/gcc"},
    )
    assert done.returncode == 0, done.stderr
    assert "the extension was not built" in done.stderr
    assert not list(tmp_path.rglob("_C*"))


def test_where_nvcc_fails_the_rest_is_built(tmp_path):
    """A toolkit whose nvcc does nothing but tell its version; a C++ compiler that lists."""
    import torch

    if not torch.version.cuda:
        pytest.skip("torch was built without CUDA")
    log = tmp_path / "log"
    scripts = {
        "toolkit/bin/nvcc": f'[ "$1" = --version ] && echo "release {torch.version.cuda}"',
        "cxx": f'echo "$@" >> {log}\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done; true',
    }
    for name, body in scripts.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    (tmp_path / "toolkit/include").mkdir()
    (tmp_path / "toolkit/include/cuda_runtime.h").touch()
    environment = {
        "CUDA_HOME": str(tmp_path / "toolkit"),
        "CXX": str(tmp_path / "cxx"),
        "CC": str(tmp_path / "cxx"),
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
    }
    said = python(
        f"import sys; sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r},"
        f" '--build-temp', {str(tmp_path)!r}]\n{SETUP}",
        **environment,
    )
    assert "building without the CUDA kernels" in said
    assert "installing without the extension" not in said
    assert list(tmp_path.rglob("_C*.so"))
    link = log.read_text().splitlines()[-1]
    assert "-shared" in link
    assert not [word for word in link.split() if word.startswith("-l") and "cu" in word]


def test_everything_works_without_the_extension():
    python(
        "import sys; sys.modules['pcx._C'] = None\n"
        "import torch, pcx\n"
        "from pcx.backbones import scenes_vit\n"
        "model = pcx.VPT(scenes_vit(3), 2)\n"
        "model(torch.randn(1, 3, 64, 64)).sum().backward()\n"
    )


def test_importing_compiles_nothing():
    python(
        "import sys, pcx\n"
        "assert not {'torch.utils.cpp_extension', 'torch._inductor.codecache'} & set(sys.modules)"
    )


def test_no_root_package_shadows_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "pcx" / "kernels").resolve() == ROOT / "kernels"
    assert os.readlink(ROOT / "pcx" / "kernels") == "../kernels"
