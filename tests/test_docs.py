"""Every public name says what it does."""

import inspect
import re

import pytest

import pcx

WITHOUT_SIGNATURE = ("NonFiniteLoss", "METHODS", "SCORES")  # an exception, and tables


@pytest.mark.parametrize("name", pcx.__all__)
def test_public_names_have_docstrings(name):
    documented = getattr(pcx, name)
    text = inspect.getdoc(documented)
    assert text
    assert text.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(documented):
        assert "Args:" in text
        for argument in inspect.signature(documented).parameters:
            described = re.search(rf"^\s*(\w+, )*{argument}(, \w+)*:", text, re.MULTILINE)
            assert described, f"{name}: {argument} is not described"


@pytest.mark.parametrize("name", [n for n in pcx.__all__ if n not in WITHOUT_SIGNATURE])
def test_public_names_take_no_loose_keywords(name):
    signature = inspect.signature(getattr(pcx, name))
    assert not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
