"""Studies from name to page, killed and gone on with, in one process and in two."""

import json
import multiprocessing
import shutil
from dataclasses import replace

import pytest

from diffusekrona.errors import KronAError
from research.study.measuring import Measurer
from research.study.records import Records
from research.study.run import chosen_study, quick, run_study
from research.study.studies import STUDIES

SMALLER = {
    "stability": {
        "learning_rates": [1e-3, 1e-1],
        "subjects": 1,
        "seeds": [0],
        "methods": {
            "KronA": {"method": "krona", "a1": 2, "a2": 4},
            "LoRA": {"method": "lora", "rank": 2},
        },
    },
    "methods": {
        "methods": {
            "KronA": {"method": "krona", "a1": 2, "a2": 4, "rates": [1e-3, 1e-1]},
            "LoRA": {"method": "lora", "rank": 2, "rates": [1e-3, 1e-1]},
        },
        "subjects": 2,
        "seeds": [0],
        "search_subjects": 1,
    },
    "factors": {"a1": [1, 4], "a2": [4], "subjects": 1, "learning_rates": [1e-3]},
    "steps": {"steps": [1, 2], "subjects": 1},
    "images": {"images": [1, 2], "subjects": 1},
    "guidance": {"scales": [1.0, 2.0], "subjects": 1},
    "inference-steps": {"steps": [1, 2], "subjects": 1},
    "init": {"subjects": 1, "pairs": [["normal", "zeros"], ["kaiming_uniform", "kaiming_uniform"]]},
    "modules": {"subjects": 1, "learning_rates": [1e-3]},
    "rank": {"subjects": 1},
    "beyond": {
        "methods": {
            "ours": {"method": "krona", "a1": 4, "a2": 4, "rates": [1e-3]},
            "LoRA": {"method": "lora", "rank": 1, "rates": [1e-3]},
            "smaller": {"method": "krona", "a1": 8, "a2": 8, "rates": [1e-3, 1e-1]},
            "as many": {"method": "krona", "a1": 4, "a2": 4, "alpha": 2.0, "rates": [1e-3]},
            "more": {"method": "krona", "a1": 1, "a2": 1, "rates": [1e-3]},
        },
        "rivals": ["ours", "LoRA"],
        "seeds": [0],
        "search_subjects": 1,
    },
}


@pytest.fixture
def smaller(settings):
    return replace(settings, studies=SMALLER)


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_study_ends_in_a_page_with_a_row_for_each_arm(smaller, tmp_path, name):
    study = chosen_study(name, quick(smaller))
    text = run_study(study, quick(smaller), tmp_path).read_text(encoding="utf-8")
    assert study.question in text
    for arm in study.arms():
        assert f"| {arm.label} " in text
    for figure in tmp_path.glob("*.png"):
        assert f"({figure.name})" in text
    assert "nan" not in text


def test_a_gallery_stays_on_the_page_where_its_pictures_are_gone(smaller, tmp_path):
    study = chosen_study("init", quick(smaller))
    whole = run_study(study, quick(smaller), tmp_path)
    before, drawn = whole.read_text(encoding="utf-8"), (tmp_path / "init-pictures.png").read_bytes()
    assert run_study(study, quick(smaller), tmp_path).read_text(encoding="utf-8") == before
    shutil.rmtree(tmp_path / "pictures")
    assert run_study(study, quick(smaller), tmp_path).read_text(encoding="utf-8") == before
    assert "(init-pictures.png)" in before
    assert (tmp_path / "init-pictures.png").read_bytes() == drawn


def test_a_study_goes_on_where_it_was_killed(smaller, tmp_path, monkeypatch):
    study = chosen_study("factors", smaller)
    whole = run_study(study, smaller, tmp_path / "whole")

    def killed(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, smaller, tmp_path / "part", on_record=killed)
    assert len(Records(tmp_path / "part" / "records.jsonl", smaller.shared())) == 1
    asked = []
    plain = Measurer.measure
    monkeypatch.setattr(Measurer, "measure", lambda self, cells: asked.extend(cells) or plain(self, cells))
    part = run_study(study, smaller, tmp_path / "part")
    assert len(asked) == 1
    assert without_times(part) == without_times(whole)


def test_a_process_that_is_killed_is_told_of_and_what_was_measured_is_kept(smaller, tmp_path):
    values = {"a1": [1, 2, 4, 8], "a2": [4], "subjects": 1, "learning_rates": [1e-3]}
    study = chosen_study("factors", replace(smaller, studies={"factors": values}))

    def kill_one(done, total):
        multiprocessing.active_children()[0].kill()

    with pytest.raises(KronAError, match="was killed"):
        run_study(study, smaller, tmp_path, workers=2, on_record=kill_one)
    assert 1 <= len(Records(tmp_path / "records.jsonl", smaller.shared())) < 4


def test_two_processes_find_what_one_finds(smaller, tmp_path):
    study = chosen_study("factors", smaller)
    one, two = (run_study(study, smaller, tmp_path / str(n), workers=n) for n in (1, 2))
    assert without_times(one) == without_times(two)


def test_cells_that_another_study_measured_are_not_measured_again(smaller, tmp_path):
    run_study(chosen_study("steps", smaller), smaller, tmp_path)
    count = len(Records(tmp_path / "records.jsonl", smaller.shared()))
    again = []
    run_study(chosen_study("steps", smaller), smaller, tmp_path, on_record=lambda *counts: again.append(counts))
    assert not again
    assert len(Records(tmp_path / "records.jsonl", smaller.shared())) == count


def test_what_two_arms_have_in_common_is_measured_once(smaller, tmp_path):
    values = {"a1": [4, 4, 2], "a2": [4], "subjects": 1, "learning_rates": [1e-3]}
    study, told = chosen_study("factors", replace(smaller, studies={"factors": values})), []
    run_study(study, smaller, tmp_path, on_record=lambda *counts: told.append(counts))
    assert told == [(1, 2), (2, 2)]


def test_more_seeds_are_one_number(smaller):
    assert chosen_study("stability", smaller, seeds=5).seeds == (0, 1, 2, 3, 4)


def test_methods_are_compared_at_the_learning_rate_that_the_search_found_best(smaller, tmp_path):
    study = chosen_study("methods", smaller)
    run_study(study, smaller, tmp_path)
    records = Records(tmp_path / "records.jsonl", smaller.shared())
    for label in study.methods:
        line = [arm for arm in study.arms() if arm.label == label]
        of_search = study._search().results(smaller, records)
        best = max(line, key=lambda arm: quality_of(of_search, arm))
        final = study.results(smaller, records)
        measured = [arm for arm in line if final.estimate(arm, "dino").count == 2]
        assert measured == [best]


def quality_of(results, arm):
    groups = zip(results.found(arm, "dino"), results.found(arm, "obeyed"), strict=True)
    cells = [[2 * d * o / (d + o) if d > 0 and o > 0 else 0.0 for d, o in zip(*group, strict=True)] for group in groups]
    return sum(sum(group) / len(group) for group in cells) / len(cells) if cells else 0.0


def test_best_at_their_learning_rates_are_shown_and_no_others(smaller, tmp_path):
    values = {"a1": [1, 4], "a2": [4], "subjects": 2, "learning_rates": [1e-3, 1e-1, 1.0]}
    study = chosen_study("factors", replace(smaller, studies={"factors": values}))
    table, differences = run_study(study, smaller, tmp_path).read_text(encoding="utf-8").split("| minus ")
    results = study.results(smaller, Records(tmp_path / "records.jsonl", smaller.shared()))
    for label in ("(1, 4)", "(4, 4)"):
        best = max((arm for arm in study.arms() if arm.label == label), key=lambda arm: quality_of(results, arm))
        rows = [line for line in table.splitlines() if line.startswith(f"| {label} ")]
        assert len(rows) == 1
        assert f"| {best.spec.training['learning_rate']:g} |" in rows[0]
        assert f"| {results.estimate(best, 'dino')} |" in rows[0]
    assert differences.count("\n| (") == 1


def test_beyond_compares_the_best_that_is_no_larger_on_subjects_that_it_was_not_chosen_on(smaller, tmp_path):
    study = chosen_study("beyond", smaller)
    run_study(study, smaller, tmp_path)
    records = Records(tmp_path / "records.jsonl", smaller.shared())
    of_search, final = study._search().results(smaller, records), study.results(smaller, records)
    assert study.subjects_in(smaller) == ("cup",)
    assert study._search().subjects_in(smaller) == ("bear",)
    fitting = [arm for arm in study.arms() if arm.label in ("smaller", "as many")]
    best = max(fitting, key=lambda arm: quality_of(of_search, arm))
    compared = [arm for arm in study.arms() if final.estimate(arm, "dino").count]
    assert sorted(arm.label for arm in compared) == sorted(["ours", "LoRA", best.label])
    assert best in compared


def test_beyond_without_subjects_to_compare_on_or_without_configurations_says_so(smaller, tmp_path):
    with pytest.raises(KronAError, match="held_back"):
        run_study(chosen_study("beyond", smaller), replace(smaller, held_back=()), tmp_path)
    values = {**SMALLER["beyond"], "methods": {k: SMALLER["beyond"]["methods"][k] for k in ("ours", "LoRA", "more")}}
    study = chosen_study("beyond", replace(smaller, studies={"beyond": values}))
    with pytest.raises(KronAError, match="No configuration has at most the parameters of ours"):
        run_study(study, smaller, tmp_path)


def test_what_cannot_be_measured_is_named_and_all_else_is(smaller, tmp_path):
    values = {"a1": [4, 7], "a2": [4], "subjects": 1, "learning_rates": [1e-3]}
    study = chosen_study("factors", replace(smaller, studies={"factors": values}))
    with pytest.raises(KronAError, match=r"1 of 2 .*a1"):
        run_study(study, smaller, tmp_path)
    assert len(Records(tmp_path / "records.jsonl", smaller.shared())) == 1


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("stabilty", {}, "There is no study"),
        ("factors", {"a_1": [1]}, "did you mean 'a1'"),
        ("factors", {"xyz": 1}, "It has"),
    ],
)
def test_wrong_names_are_told(settings, name, values, said):
    with pytest.raises(KronAError, match=said):
        chosen_study(name, replace(settings, studies={name: values}))


def test_no_choice_is_made_on_a_subject_that_is_held_back(smaller):
    for name in STUDIES:
        if name != "beyond":
            assert "cup" not in chosen_study(name, replace(smaller, studies={})).subjects_in(smaller)


def without_times(page):
    """A page without the column of times."""
    records = (page.parent / "records.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    found = [json.loads(line) for line in records]
    for one in found:
        one["found"].pop("seconds_per_step", None)
    return sorted(json.dumps(one, sort_keys=True) for one in found)
