"""The table of families is what its cells give; CI runs some cells of most families.

`make families` runs all of it.
"""

import pytest
import timm
from matrix import CELLS, NAMES, STAGED, TABLE, TOWERS, mark, marks_in, table_of

# The page is of one version of timm; with others the folding alone is compared with it.
OF_PAGE = f"timm {timm.__version__}," in TABLE.read_text()
QUICK = ["deep", "condense", "SCT", "features", "SETR", "sizes"] if OF_PAGE else ["deep"]
# One family of each form of attention call and of each way of prompts to their keys.
FORMS = ("vit", "swin", "nest", "samvit", "visformer", "hiera", "cait")


@pytest.fixture(scope="module")
def page():
    return marks_in(TABLE.read_text())


def test_the_page_has_every_family_and_cell(page):
    assert set(page) == {(name, cell) for name in NAMES for cell in CELLS}
    assert marks_in(table_of(page)) == page
    green = sum(not reason for reason in page.values())
    assert f"{green} of {len(page)} cells hold" in TABLE.read_text()


@pytest.mark.parametrize("cell", QUICK)
@pytest.mark.parametrize("name", ["vit", "naflexvit", *STAGED, "hf-swin", *TOWERS])
def test_a_cell_is_as_the_page_says(cell, name, page):
    assert bool(mark(cell, name)) == bool(page[name, cell])


@pytest.mark.skipif(not OF_PAGE, reason="the page is of another timm")
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in QUICK])
@pytest.mark.parametrize("name", FORMS)
def test_the_other_cells_of_one_family_of_each_form(cell, name, page):
    assert mark(cell, name) == page[name, cell]
