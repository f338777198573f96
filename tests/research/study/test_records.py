"""What is measured is kept, whatever becomes of the process."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusekrona.errors import KronAError
from research.study.cells import Cell, Spec, View
from research.study.records import Record, Records
from research.study.sheets import pictures_on, sheet_of

ABOUT = {"base": "a base", "prompts": ("a {}",)}


def cell(**options):
    return Cell(Spec("krona", options, {"learning_rate": 1e-3}), View(step=3), "otter", 1)


def test_records_are_there_again(tmp_path):
    first = Records(tmp_path / "sub" / "records.jsonl", ABOUT)
    assert len(first) == 0
    assert cell(a1=4) not in first
    first.add(Record(cell(a1=4), {"dino": 0.5, "by": [1, 2]}))
    first.add(Record(cell(a1=8), {"dino": 0.25}))
    again = Records(tmp_path / "sub" / "records.jsonl", ABOUT)
    assert len(again) == 2
    assert again[cell(a1=4)].found == {"dino": 0.5, "by": [1, 2]}
    assert again[cell(a1=8)].cell == cell(a1=8)
    assert cell(a1=2) not in again


@given(st.integers(1, 200))
def test_a_line_that_was_cut_off_is_measured_again(tmp_path_factory, lost):
    file = tmp_path_factory.mktemp("records") / "records.jsonl"
    records = Records(file, ABOUT)
    for a1 in (2, 4, 8):
        records.add(Record(cell(a1=a1), {"dino": a1 / 10}))
    whole = file.read_bytes()
    last = len(whole) - 1 - whole[:-1].rindex(b"\n") - 1
    file.write_bytes(whole[: -1 - min(lost, last)])
    again = Records(file, ABOUT)
    assert [cell(a1=a1) in again for a1 in (2, 4, 8)] == [True, True, False]
    again.add(Record(cell(a1=8), {"dino": 0.8}))
    again.add(Record(cell(a1=16), {"dino": 1.6}))
    once_more = Records(file, ABOUT)
    assert [once_more[cell(a1=a1)].found["dino"] for a1 in (2, 4, 8, 16)] == [0.2, 0.4, 0.8, 1.6]


def test_pictures_are_kept_apart_under_their_cells_key(tmp_path):
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    records = Records(tmp_path / "records.jsonl", ABOUT)
    records.add(Record(cell(), {"dino": 0.5}, sheet_of(pictures)))
    again = Records(tmp_path / "records.jsonl", ABOUT)
    assert again[cell()].found == {"dino": 0.5}
    for picture, kept in zip(pictures, pictures_on(again.sheet_of(cell()), 3), strict=True):
        assert kept.size == picture.size
        assert np.abs(np.asarray(kept, float) - np.asarray(picture, float)).max() < 8
    assert not again.sheet_of(cell(a1=8)).exists()


def test_large_pictures_are_kept_small(tmp_path):
    (tmp_path / "sheet.jpg").write_bytes(sheet_of([Image.new("RGB", (1024, 768))] * 2))
    assert [picture.size for picture in pictures_on(tmp_path / "sheet.jpg", 2)] == [(256, 192)] * 2


def test_records_of_other_settings_are_refused_by_name(tmp_path):
    Records(tmp_path / "records.jsonl", ABOUT).add(Record(cell(), {}))
    with pytest.raises(KronAError, match=r"other settings \(base\)"):
        Records(tmp_path / "records.jsonl", {**ABOUT, "base": "another"})


@pytest.mark.parametrize("text", ["", "no json\n", "[]\n", '{"else": 1}\n'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(KronAError, match="no file of measurements"):
        Records(tmp_path / "records.jsonl", ABOUT)


def test_equal_cells_have_equal_keys_whatever_the_order_of_options():
    one = Cell(Spec("krona", {"a1": 4, "a2": 64}), View(), "otter", 0)
    two = Cell(Spec("krona", {"a2": 64, "a1": 4}), View(), "otter", 0)
    assert one.key == two.key
    assert json.loads(json.dumps(one.as_dict())) == one.as_dict()
    assert Cell.from_dict(one.as_dict()).key == one.key


def test_views_are_of_one_model_and_all_else_is_of_another():
    base = cell(a1=4)
    seen = Cell(base.spec, View(step=7, guidance_scale=2.0), base.subject, base.seed)
    assert seen.key != base.key
    assert seen.model_key == base.model_key
    for other in (
        cell(a1=8),
        Cell(base.spec, base.view, "goose", 1),
        Cell(base.spec, base.view, "otter", 2),
        Cell(Spec("krona", {"a1": 4}, {"learning_rate": 2e-3}), base.view, "otter", 1),
        Cell(Spec("krona", {"a1": 4}, {"learning_rate": 1e-3}, images=1), base.view, "otter", 1),
    ):
        assert other.model_key != base.model_key
