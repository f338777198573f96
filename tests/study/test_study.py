"""Differences are of the same subject and seed, also where models diverged."""

import pytest

from diffusekrona.study.cells import Arm, Cell, Spec
from diffusekrona.study.records import Record, Records
from diffusekrona.study.studies import STUDIES
from diffusekrona.study.study import Results

ONE, TWO = Arm("one", Spec("krona")), Arm("two", Spec("lora"))


def test_differences_are_of_pairs(settings, tmp_path):
    study = STUDIES["stability"](subjects=None, seeds=(0, 1))
    records = Records(tmp_path / "records.jsonl", {})
    for arm, scores in ((ONE, {("bear", 0): 0.5, ("bear", 1): 0.75}), (TWO, {("bear", 1): 0.25, ("car", 0): 0.125})):
        for subject in ("bear", "car"):
            for seed in (0, 1):
                score = scores.get((subject, seed))
                found = {"diverged": True} if score is None else {"dino": score}
                records.add(Record(Cell(arm.spec, arm.view, subject, seed), found))
    results = Results(study, settings, records)
    assert results.difference(ONE, TWO, "dino").mean == pytest.approx(0.5)
    assert results.difference(ONE, TWO, "dino").count == 1
    assert (results.diverged(ONE), results.diverged(TWO)) == (2, 2)
