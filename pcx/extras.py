"""Packages that only some functions need, and the extra of pcx that installs each."""

from __future__ import annotations

from importlib.util import find_spec

# By the name that is imported: the package's own name, and the extra in pyproject.toml.
EXTRAS = {
    "matplotlib": ("matplotlib", "study"),
    "optuna": ("optuna", "study"),
    "scipy": ("scipy", "study"),
    "sklearn": ("scikit-learn", "study"),
    "torchmetrics": ("torchmetrics", "study"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
    "onnxruntime": ("onnxruntime", "export"),
}


def need(module: str, what: str) -> None:
    """Checks that an optional package is there, before it is imported.

    Args:
        module: its name in `EXTRAS`.
        what: what it is needed for, as the subject of a sentence.

    Raises:
        ImportError: it is not installed; the message says which extra installs it.
    """
    if find_spec(module) is None:
        package, extra = EXTRAS[module]
        raise ImportError(
            f"{what} needs {package}, which is not installed; run: pip install 'pcx[{extra}]'",
            name=module,
        )
