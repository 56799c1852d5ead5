"""Tables load what they name when it is asked for, and say what they hold."""

import sys

import pytest

from pcx.registry import Registry


def test_an_entry_is_imported_when_asked_for():
    sys.modules.pop("colorsys", None)
    table = Registry("colour", {"hsv": "colorsys:rgb_to_hsv"})
    assert list(table) == ["hsv"]
    assert "hsv" in table
    assert "colorsys" not in sys.modules
    assert table["hsv"](0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)
    assert "colorsys" in sys.modules


def test_an_unknown_name_is_told_with_near_matches():
    table = Registry("method", {"taylor": "math:sin", "gate": "math:cos"})
    with pytest.raises(ValueError, match=r"method: got 'tailor'.*'gate'.*Did you mean 'taylor'\?"):
        table.get_checked("tailor")


def test_own_entries_are_added_and_do_not_replace_others():
    table = Registry("method", {"taylor": "math:sin"})
    table.add("mine", len)
    assert table["mine"]([1, 2]) == 2
    table.add("mine", len)
    with pytest.raises(ValueError, match="method: 'taylor' is taken"):
        table.add("taylor", len)
