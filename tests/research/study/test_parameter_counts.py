"""Every row of the paper's tables of parameter counts."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from diffusekrona.errors import KronAError
from diffusekrona.tuner.config import KronAConfig
from diffusekrona.tuner.targets import target_layers
from research.methods import KronA
from research.study.__main__ import app
from research.study.paper_tables import Row, components_of, rows_of
from research.study.parameter_counts import CountedRow, counted, is_printed, rich_table, write_markdown

PAGE = Path(__file__).parents[3] / "docs" / "tables.md"
SIDES = (2, 4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def rows():
    return counted(rows_of())


@pytest.fixture(scope="module")
def sizes():
    """(d, h) of the layers that SDXL's adapters are in."""
    unet = components_of("sdxl")["unet"]
    return [(layer.out_features, layer.in_features) for layer in target_layers(unet, KronAConfig()).values()]


def found(rows, table):
    return {(one.row.model, one.row.label): one for one in rows if one.row.table == table}


def test_table_6_is_whole_and_exact(rows, sizes):
    grid = found(rows, 6)
    assert len(sizes) == 560
    assert len(grid) == 8 * 7
    for a1 in (1, *SIDES):
        for a2 in SIDES:
            one = grid["sdxl", f"a1 = {a1}, a2 = {a2}"]
            assert one.count == sum(a1 * a2 + (d // a1) * (h // a2) for d, h in sizes)
            if a1 > 1:
                assert one.row.printed == str(one.count)
            else:
                assert one.row.printed == str(sum(a2 + (d // 4) * (h // a2) for d, h in sizes)) == str(one.recount)


def test_the_grid_is_symmetric_in_what_is_printed():
    # For a1 ≥ 2 the count depends on a1 · a2 alone, which a slip of the pen in one of the numbers would break.
    printed = {}
    for row in rows_of(6):
        if row.method.a1 > 1:
            printed.setdefault(row.method.a1 * row.method.a2, set()).add(row.printed)
    assert all(len(numbers) == 1 for numbers in printed.values())


def test_counts(rows):
    expected = {
        2: [5_806_080, 3_874_560, 1_092_096, 520_928],
        4: [19_169_280, 982_581_444, 1_092_096, 278_971, 328_048],
        7: [7_534_080, 3_874_560, 2_152_320, 1_506_240, 5_806_080, 904_640, 14_960_640, 11_612_160],
        8: [238_799_040, 59_708_160, 14_960_640, 3_874_560, 2_152_320],
    }
    for table, counts in expected.items():
        assert [one.count for one in rows if one.row.table == table] == counts


def test_what_differs_and_why(rows):
    differ = {(one.row.table, one.row.label): one.recount for one in rows if not one.agrees and one.row.table != 6}
    assert differ == {
        (4, "Custom Diffusion"): 19_169_280 + 49_408 * 768,
        (4, "SVDiff"): None,
        (7, "DiffuseKronA, a1 = 2"): 3_874_560,
        (7, "DiffuseKronA, a1 = 4"): 7_534_080,
        (7, "LoKr, f = −1, rank = 8"): 1_356_800,
        (7, "LoHA, rank = 4"): 20_930_560,
    }
    assert [one.row.label for one in rows if not one.explained] == ["SVDiff"]
    assert all(one.row.note or one.row.recount for one in rows if not one.agrees)


def test_an_agreeing_row_has_no_other_way_to_count(rows):
    assert not [one.row for one in rows if one.agrees and one.row.recount]


@pytest.mark.parametrize(
    ("count", "printed", "same"),
    [
        (3_874_560, "3.8 M", True),  # cut off
        (3_874_560, "3.9 M", True),  # rounded
        (3_874_560, "3.7 M", False),
        (3_874_560, "4.0 M", False),
        (3_850_000, "3.9 M", True),
        (3_849_999, "3.9 M", False),
        (3_874_560, "3874560", True),
        (3_874_561, "3874560", False),
        (1_356_800, "1.36 M", True),
        (57_000_000, "57 M", True),
    ],
)
def test_as_printed(count, printed, same):
    assert is_printed(count, printed) == same


def test_what_is_no_count_is_said():
    with pytest.raises(ValueError, match="neither"):
        is_printed(1, "1,000")
    with pytest.raises(KronAError, match="Table 3 counts no parameters; there are 2, 4, 6, 7, 8"):
        rows_of(3)


def test_verdicts():
    row = Row(2, "row", "sdxl", KronA(), "3.8 M", note="Note.")
    assert CountedRow(row, 3_874_560, None).verdict == "as printed. Note."
    assert CountedRow(row, 1, None).verdict == "not reproduced. Note."


def test_the_page_in_the_repository_is_what_is_computed(rows, tmp_path):
    write_markdown(rows, tmp_path / "tables.md")
    assert PAGE.read_text(encoding="utf-8") == (tmp_path / "tables.md").read_text(encoding="utf-8")


def test_the_terminal_shows_every_row(rows):
    console = Console(width=200, file=io.StringIO())
    console.print(rich_table(rows))
    text = console.file.getvalue()
    assert all(f"{one.count:,}" in text and one.row.printed in text for one in rows)


def test_the_command(tmp_path):
    page = tmp_path / "t.md"
    result = CliRunner().invoke(app, ["tables", "--table", "2", "--output", str(page)])
    assert result.exit_code == 0, result.output
    assert "520,928" in result.output
    assert re.findall(r"^## .*", page.read_text(encoding="utf-8"), re.MULTILINE) == ["## Table 2"]
    wrong = CliRunner().invoke(app, ["tables", "--table", "5"])
    assert wrong.exit_code == 1
    assert "there are 2, 4, 6, 7, 8" in wrong.output
