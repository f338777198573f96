"""Tables and figures say of measurements what plain arithmetic says of them."""

import re
from statistics import mean, pstdev

import pytest
from PIL import Image

from research.study.cells import BASE, Arm, Cell, Spec, View
from research.study.estimate import estimate
from research.study.figures import against, along, beside
from research.study.markdown import arms_table, difference_table, learning_rate, number
from research.study.records import Record, Records
from research.study.results import best_of_each, quality
from research.study.sheets import sheet_of
from research.study.studies import STUDIES
from research.study.studies.stability import Stability
from research.study.study import spec_of

ONE, TWO = Arm("one", Spec("krona")), Arm("two", Spec("lora"))
DIVERGED = {"diverged": True}


@pytest.fixture
def results(settings, tmp_path):
    """Results of two subjects and two seeds from what each arm's cells found, a list for each subject."""

    def made(found, study=None):
        study = study or STUDIES["stability"](subjects=None, seeds=(0, 1))
        records = Records(tmp_path / "records.jsonl", {})
        for arm, by_subject in found:
            for subject, by_seed in zip(("bear", "car"), by_subject, strict=True):
                for seed, value in enumerate(by_seed):
                    if value is not None:
                        records.add(Record(Cell(arm.spec, arm.view, subject, seed), value))
        return study.results(settings, records)

    return made


def scores(*dinos, **more):
    return [[{"dino": value, **more} for value in dinos]] * 2


def test_cells_are_every_arm_on_as_many_subjects_as_asked_with_every_seed(settings, tmp_path):
    study = Stability(1, (3, 5), (1e-3, 1e-2), {"A": {"method": "krona"}})
    cells = study.cells(settings, Records(tmp_path / "none", {}))
    expected = {("bear", seed, rate) for seed in (3, 5) for rate in (1e-3, 1e-2)}
    assert {(cell.subject, cell.seed, cell.spec.training["learning_rate"]) for cell in cells} == expected
    assert len(cells) == 4
    assert study.with_values({"seeds": [1, 2]}).seeds == (1, 2)


def test_differences_are_of_the_same_subject_and_seed_also_where_models_diverged(results):
    one = [[{"dino": 0.5}, {"dino": 0.75}], [DIVERGED, DIVERGED]]
    two = [[DIVERGED, {"dino": 0.25}], [{"dino": 0.125}, DIVERGED]]
    both = results([(ONE, one), (TWO, two)])
    assert both.difference(ONE, TWO, "dino").mean == pytest.approx(0.5)
    assert both.difference(ONE, TWO, "dino").count == 1
    assert (both.diverged(ONE), both.diverged(TWO)) == (2, 2)
    assert "| two | -0.500 |" in difference_table([TWO], ONE, both)


def test_what_diverged_is_counted_and_has_no_part_in_the_mean(results):
    found = results([(ONE, [[{"dino": 0.5}, {"dino": 0.7}], [DIVERGED, {"dino": 0.2}]]), (TWO, [[DIVERGED] * 2] * 2)])
    assert found.found(ONE, "dino") == [[0.5, 0.7], [0.2]]
    assert found.found(TWO, "dino") == []
    table = arms_table([ONE, TWO], found)
    assert f"| one (1 diverged) | {estimate([[0.5, 0.7], [0.2]])} |" in table
    assert "| two (4 diverged) |" in table
    assert "CLIP" not in table


def test_costs_stand_beside_the_scores_and_the_base_has_none(results):
    base = Arm("base", Spec(BASE))
    adapted = Arm("adapted", Spec("krona", {}, {"learning_rate": 2e-3}))
    costs = {"bytes": 2500, "deep": {"er": 3}}
    found = results([(adapted, scores(0.5, 0.6, obeyed=0.9, **costs)), (base, scores(0.1, 0.1, obeyed=0.9))])
    more = {"kB": number(found, "bytes", ".1f", 1e3), "deeper": number(found, "deep.er", ".0f"), "rate": learning_rate}
    rows = arms_table([adapted, base], found, more).splitlines()
    assert rows[0].endswith("| as asked | quality | kB | deeper | rate |")
    assert rows[2].endswith(f"| {quality(found, adapted)} | 2.5 | 3 | 0.002 |")
    assert rows[3].endswith(f"| {quality(found, base)} | – | – | – |")
    assert number(found, "deep.er.still", ".0f")(adapted) == "–"


def test_quality_is_the_harmonic_mean_of_fidelity_and_obedience(results):
    one = [[{"dino": 0.4, "obeyed": 0.8, "clip_t": 0.1}, {"dino": 0.6, "obeyed": 0.6, "clip_t": 0.1}]] * 2
    found = results([(ONE, one), (TWO, scores(0.5, 0.5, clip_t=0.25))])
    for group in found.qualities(ONE):
        assert group == pytest.approx([2 * 0.4 * 0.8 / 1.2, 0.6])
    assert str(quality(found, ONE)) == str(estimate(found.qualities(ONE)))
    assert quality(found, TWO).mean == pytest.approx(2 * 0.5 * 0.25 / 0.75)


def test_what_diverged_or_shows_nothing_has_no_quality_and_what_is_not_measured_is_left_out(results):
    bad = [DIVERGED, {"dino": -0.9, "obeyed": 0.5}], [{"dino": 0.5, "obeyed": 0.0}, None]
    assert results([(ONE, bad)]).qualities(ONE) == [[0, 0], [0]]


def test_of_equal_labels_the_best_is_kept_in_the_order_of_the_labels(results):
    arms = [Arm(name, Spec(name, {}, {"learning_rate": x})) for name in ("krona", "lora") for x in (1e-3, 1e-2, 1e-1)]
    dinos = (0.2, 0.8, 0.3, 0.5, 0.1, 0.9)
    found = results([(arm, scores(dino, dino, obeyed=1.0)) for arm, dino in zip(arms, dinos, strict=True)])
    assert best_of_each(arms, found) == [arms[1], arms[5]]
    assert best_of_each(arms[:1], results([])) == arms[:1]


def test_a_method_as_settings_give_it():
    method = {"method": "krona", "a1": 4, "training": {"ema_decay": 0.9, "learning_rate": 1}}
    spec = spec_of(method, learning_rate=0.5)
    assert spec == Spec("krona", {"a1": 4}, {"ema_decay": 0.9, "learning_rate": 0.5})


@pytest.fixture
def stability(results):
    """A sweep over three learning rates, of two methods."""
    study = Stability(None, (0, 1), (1e-3, 1e-2, 1e-1), {"A": {"method": "krona"}, "B": {"method": "lora"}})
    values = iter([0.3, 0.32, 0.1, 0.5, 0.4, 0.48])
    found = []
    for arm in study.arms():
        value = next(values)
        by_subject = [
            [{"dino": value, "clip_t": value / 2, "obeyed": 1.0}, {"dino": 2 * value, "clip_t": 0.1, "obeyed": 1.0}],
            [{"dino": value / 2, "clip_t": value, "obeyed": 1.0}, {"dino": value, "clip_t": 0.1, "obeyed": 1.0}],
        ]
        found.append((arm, by_subject))
    return study, found


def test_the_spread_over_learning_rates_is_within_a_subject_and_a_seed(stability, results):
    study, found = stability
    text = study.page(results(found, study)).text
    spread = pstdev([0.3, 0.32, 0.1])
    expected = estimate([[spread, 2 * spread], [spread / 2, spread]])
    row = next(line for line in text.splitlines() if line.startswith("| A | "))
    assert f"| {expected} |" in row
    assert expected.mean == pytest.approx(mean([1.5 * spread, 0.75 * spread]))
    best = quality(results(found, study), study.arms()[1])
    assert row.startswith(f"| A | {best}, 0.01 |")


def test_learning_rates_of_use_are_counted_in_powers_of_ten(results):
    study = Stability(None, (0,), (1e-3, 1e-2, 1e-1), {"A": {"method": "krona"}})
    rows = [(0.5, 1.0, 0.9), (1.0, 0.0, 0.0)]
    found = [
        (arm, [[{"dino": row[number], "obeyed": row[number], "clip_t": 0.5}] for row in rows])
        for number, arm in enumerate(study.arms())
    ]
    of_use = [[0.2 + 1.0], [0.1]]  # from 0.9 of the best to where the line falls to it again
    text = study.page(results(found, study)).text
    shown = re.search(r"\| A \| [^|]*\| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \|", text)
    expected = estimate(of_use)
    assert [float(value) for value in shown.groups()] == pytest.approx(
        [expected.mean, expected.low, expected.high], abs=0.005
    )


def test_a_shorter_sweep_and_the_differences_at_the_best_learning_rates_stand_beside(stability, results):
    study, found = stability
    made = results(found, study)
    text = study.page(made).text
    shorter = text[text.index("Up to 0.01:") : text.index("At the best learning rates:")]
    spread = pstdev([0.3, 0.32])
    row = next(line for line in shorter.splitlines() if line.startswith("| A | "))
    assert f"| {estimate([[spread, 2 * spread], [spread / 2, spread]])} |" in row
    best_of_a, best_of_b = study.arms()[1], study.arms()[3]
    assert difference_table([best_of_b], best_of_a, made) in text


def test_there_is_no_spread_where_something_diverged(stability, results):
    study, found = stability
    found[2][1][1][0] = DIVERGED
    text = study.page(results(found, study)).text
    assert text.count("– (some diverged)") == 2
    assert "A, 0.1 (1 diverged)" in text


def test_lines_run_along_the_axis_with_their_intervals(results):
    places = (30.0, 10.0, 20.0)
    arms = [Arm(str(x), Spec("krona", {"a1": int(x)}), View(), "line", x) for x in places]
    found = [(arm, [[{"dino": arm.x / 100}, {"dino": arm.x / 50}]] * 2) for arm in arms]
    gone = Arm("gone", Spec("lora"), View(), "line", 40.0)
    figure = along([*arms, gone], results([*found, (gone, [[DIVERGED] * 2] * 2)]), "an axis")
    (panel,) = figure.axes
    assert panel.get_xscale() == "log"
    assert (panel.get_title(), panel.get_xlabel()) == ("DINO", "an axis")
    assert list(panel.lines[0].get_xdata()) == [10, 20, 30]
    assert panel.lines[0].get_ydata() == pytest.approx([0.15, 0.3, 0.45])
    assert panel.get_legend().get_texts()[0].get_text() == "line"
    low, high = (reach(panel.collections[0].get_paths()[0].vertices[:, 1]) for reach in (min, max))
    assert low == pytest.approx(estimate([[0.1, 0.2]] * 2).low)
    assert high == pytest.approx(estimate([[0.3, 0.6]] * 2).high)
    assert along(arms, results(found), "x", log=False).axes[0].get_xscale() == "linear"


def test_pictures_are_of_the_first_subject_and_seed_that_all_arms_have(settings, tmp_path):
    study = Stability(None, (0, 1), (1e-3, 1e-2), {"A": {"method": "krona"}, "B": {"method": "lora"}})
    records, arms = Records(tmp_path / "records.jsonl", {}), study.arms()
    results = study.results(settings, records)
    for index, arm in enumerate(arms):
        for subject, seed in (("bear", 1), ("car", 0))[index == 2 :]:
            pictures = [Image.new("RGB", (8, 8), (60 * index, 200 * seed, 0)), Image.new("RGB", (8, 8), "white")]
            records.add(Record(Cell(arm.spec, arm.view, subject, seed), {"dino": 0.5}, sheet_of(pictures)))
    assert results.pictures(arms[:2])[1][settings.prompts[0]].getpixel((4, 4)) == pytest.approx((60, 200, 0), abs=3)
    found = results.pictures(arms)
    assert [row[settings.prompts[0]].getpixel((4, 4))[0] for row in found] == pytest.approx([0, 60, 120, 180], abs=3)
    assert {row[settings.prompts[0]].getpixel((4, 4))[1] < 4 for row in found} == {True}
    figure = study.page(results).figures["stability-pictures"]
    assert [panel.get_ylabel().replace("\n", " ") for panel in figure.axes[::2]] == [
        f"{label}: {prompt.format('…')}" for prompt in settings.prompts for label in "AB"
    ]
    assert [panel.images[0].get_array()[4, 4, 0] for panel in figure.axes[:4]] == pytest.approx(
        [0, 60, 120, 180], abs=3
    )
    records.sheet_of(Cell(arms[3].spec, arms[3].view, "car", 0)).unlink()
    assert results.pictures(arms) is None
    assert beside("name", arms, results) == {}
    panels = beside("name", arms[:2], results, most=1)["name-pictures"].axes
    assert [panel.get_title() for panel in panels] == ["a … on a red\nbackground", ""]
    assert [panel.get_ylabel() for panel in panels] == ["A, 0.001", "A, 0.01"]
    shown = [panel.images[0].get_array()[4, 4] for panel in panels]
    assert [tuple(pixel) for pixel in shown] == [pytest.approx((60 * index, 200, 0), abs=3) for index in (0, 1)]


def test_points_stand_where_fidelity_and_obedience_are_with_their_intervals(results):
    found = [[(0.2, 0.9), (0.6, 0.5)], [(0.2, 0.9), (0.2, 0.9)]]
    by_subject = [[{"dino": dino, "obeyed": obeyed, "clip_t": 0.3} for dino, obeyed in group] for group in found]
    (panel,) = against([ONE], results([(ONE, by_subject)])).axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("as asked", "DINO")
    assert [float(*values) for values in panel.lines[0].get_data()] == pytest.approx([0.8, 0.3])
    across, up = (collection.get_segments()[0] for collection in panel.collections)
    obeyed, dino = estimate([[0.9, 0.5], [0.9, 0.9]]), estimate([[0.2, 0.6], [0.2, 0.2]])
    assert obeyed.high - obeyed.mean < obeyed.mean - obeyed.low
    assert sorted(across[:, 0]) == pytest.approx([obeyed.low, obeyed.high])
    assert sorted(up[:, 1]) == pytest.approx([dino.low, dino.high])
    (panel,) = against([TWO], results([(TWO, scores(0.5, 0.5, clip_t=0.25))])).axes
    assert panel.get_xlabel() == "CLIP-T"
