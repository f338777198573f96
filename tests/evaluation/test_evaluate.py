"""Whole evaluations against the formulas written out, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusekrona.errors import DatasetError
from diffusekrona.evaluation import (
    Encoders,
    Evaluation,
    EvaluationError,
    Score,
    SubjectScores,
    evaluate_folders,
    evaluate_subject,
    find_images,
    measure_drift,
)
from tests.evaluation.pictures import noise, save

PROMPTS = ["a dog", "a dog on the moon", "a dog in a hat"]


def by_hand(rows: Tensor, columns: Tensor) -> np.ndarray:
    """Cosine similarities, in plain loops."""
    table = np.zeros((len(rows), len(columns)))
    for i, x in enumerate(rows.tolist()):
        for j, y in enumerate(columns.tolist()):
            table[i, j] = np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y))
    return table


def features(encode: object, items: Iterable[object]) -> Tensor:
    return torch.cat([encode([item]) for item in items])  # type: ignore[operator]


def test_a_subject_scores_what_the_equations_say(encoders: Encoders) -> None:
    real, generated = [noise(1), noise(2)], [noise(3), noise(4), noise(5)]
    found = evaluate_subject(encoders, real, generated, PROMPTS, name="dog")
    clip, dino = encoders.clip, encoders.dino
    images = features(clip.images, generated)
    clip_i = by_hand(images, features(clip.images, real))
    clip_t = np.diag(by_hand(images, features(clip.texts, PROMPTS)))
    dino_i = by_hand(features(dino.images, generated), features(dino.images, real))
    for score, table in ((found.clip_i, clip_i), (found.clip_t, clip_t[:, None]), (found.dino, dino_i)):
        assert score.values == pytest.approx(table.mean(axis=1), abs=1e-5)
        assert score.mean == pytest.approx(table.mean(), abs=1e-5)
        assert score.spread == pytest.approx(table.mean(axis=1).std(), abs=1e-5)
        assert score.spread > 1e-3
    assert (found.name, found.real, found.files, found.prompts) == ("dog", 2, ("1", "2", "3"), tuple(PROMPTS))


def test_the_order_of_the_images_does_not_matter(encoders: Encoders) -> None:
    real, generated = [noise(1), noise(2), noise(6)], [noise(3), noise(4), noise(5)]
    before = evaluate_subject(encoders, real, generated, PROMPTS)
    after = evaluate_subject(encoders, real[::-1], generated[::-1], PROMPTS[::-1])
    for name in ("clip_i", "clip_t", "dino"):
        assert after.score(name).values[::-1] == pytest.approx(before.score(name).values, abs=1e-6)


def test_one_image_of_each_kind_is_enough(encoders: Encoders) -> None:
    found = evaluate_subject(encoders, [noise(1)], [noise(1)], ["a dog"])
    assert found.dino.mean == pytest.approx(1, abs=1e-6)
    assert found.clip_i.mean == pytest.approx(1, abs=1e-6)
    assert found.clip_t.spread == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_images_of_any_mode_are_scored_as_they_look(encoders: Encoders, mode: str) -> None:
    grey = noise(1).convert("L")
    shown = grey.convert("RGB")
    given = {
        "L": grey,
        "RGBA": shown.convert("RGBA"),
        "P": grey.convert("P"),
        "I;16": Image.fromarray(np.asarray(grey, dtype=np.uint16) * 256),
    }[mode]
    assert evaluate_subject(encoders, [shown], [given], ["a dog"]).dino.mean == pytest.approx(1, abs=1e-6)


def test_transparent_images_lie_on_white(encoders: Encoders) -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    found = evaluate_subject(encoders, [Image.new("RGB", (40, 40), "white")], [clear], ["a dog"])
    assert found.dino.mean == pytest.approx(1, abs=1e-6)


def test_transparent_files_lie_on_white(encoders: Encoders, tmp_path: Path) -> None:
    for side, image in (("real", Image.new("RGB", (40, 40), "white")), ("out", Image.new("RGBA", (40, 40), "#f000"))):
        (tmp_path / side).mkdir()
        image.save(tmp_path / side / "a.png")
    (tmp_path / "out" / "a.txt").write_text("a dog")
    found = evaluate_folders(encoders, find_images(tmp_path / "real", tmp_path / "out"))
    assert found.subjects[0].dino.mean == pytest.approx(1, abs=1e-6)


def test_photographs_are_turned_upright_once(encoders: Encoders, tmp_path: Path) -> None:
    sideways, out = tmp_path / "real", tmp_path / "out"
    sideways.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: rotate by 90° clockwise to view.
    noise(1).save(sideways / "a.png", exif=exif)
    save(out)
    noise(1).transpose(Image.Transpose.ROTATE_270).save(out / "a.png")
    (out / "a.txt").write_text("a dog")
    assert evaluate_folders(encoders, find_images(sideways, out)).subjects[0].dino.mean == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "files", "said"), [(1, None, "2 generated images but 1 prompts"), (2, 3, "3 names")]
)
def test_numbers_that_differ_are_refused(encoders: Encoders, prompts: int, files: int | None, said: str) -> None:
    names = None if files is None else [str(n) for n in range(files)]
    with pytest.raises(EvaluationError, match=said):
        evaluate_subject(encoders, [noise(1)], [noise(2), noise(3)], PROMPTS[:prompts], files=names)


def test_no_images_are_refused(encoders: Encoders) -> None:
    with pytest.raises(EvaluationError, match="no images"):
        evaluate_subject(encoders, [], [noise(1)], ["a dog"])


def test_drift_is_pefts(encoders: Encoders) -> None:
    """In the words of its benchmark: unit class tokens, their products' mean off 1, halved; in fp32."""
    adapted, base = [noise(1), noise(2), noise(3)], [noise(1), noise(5), noise(6)]
    unit = [torch.nn.functional.normalize(features(encoders.dino.images, side), dim=-1) for side in (adapted, base)]
    peft = (1 - (unit[0] * unit[1]).sum(dim=-1).mean().item()) / 2
    found = measure_drift(encoders, adapted, base)
    assert found.mean == pytest.approx(peft, abs=1e-6)
    assert found.mean > 0.01
    assert found.values[0] == pytest.approx(0, abs=1e-6)


# Folders


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two subjects of 2 and 1 real and 3 and 1 generated images, and two pairs for drift."""
    save(tmp_path / "real" / "cat", a=1)
    save(tmp_path / "real" / "dog", a=2, b=3)
    save(tmp_path / "out" / "cat", x=4)
    save(tmp_path / "out" / "dog", x=5, y=6, z=7)
    (tmp_path / "out" / "cat" / "prompts.txt").write_text("a sks cat\n")
    (tmp_path / "out" / "dog" / "prompts.txt").write_text("\n".join(PROMPTS))
    save(tmp_path / "base", m=8, n=9)
    save(tmp_path / "adapted", m=8, n=10)
    return tmp_path


def evaluated(encoders: Encoders, folders: Path, drop: tuple[str, ...] = ("sks",)) -> Evaluation:
    images = find_images(
        folders / "real",
        folders / "out",
        drop_words=drop,
        base_images=folders / "base",
        adapted_images=folders / "adapted",
    )
    return evaluate_folders(encoders, images)


def test_folders_score_what_their_images_score(encoders: Encoders, folders: Path) -> None:
    found = evaluated(encoders, folders)
    cat = evaluate_subject(encoders, [noise(1)], [noise(4)], ["a cat"], name="cat", files=["x.png"])
    dog = evaluate_subject(
        encoders,
        [noise(2), noise(3)],
        [noise(5), noise(6), noise(7)],
        PROMPTS,
        name="dog",
        files=["x.png", "y.png", "z.png"],
    )
    assert found.subjects == (cat, dog)
    assert found.drift == measure_drift(encoders, [noise(8), noise(10)], [noise(8), noise(9)])


def test_subjects_count_alike_in_one_mean_and_images_in_the_other(encoders: Encoders, folders: Path) -> None:
    found = evaluated(encoders, folders)
    cat, dog = (subject.dino for subject in found.subjects)
    assert found.over_subjects("dino").mean == pytest.approx((cat.mean + dog.mean) / 2)
    assert found.over_subjects("dino").spread == pytest.approx(abs(cat.mean - dog.mean) / 2)
    assert found.over_images("dino").mean == pytest.approx((cat.mean + 3 * dog.mean) / 4)
    assert found.over_images("dino").values == cat.values + dog.values


def test_dropped_words_change_clip_t_alone(encoders: Encoders, folders: Path) -> None:
    with_word, without = evaluated(encoders, folders, drop=()), evaluated(encoders, folders)
    assert with_word.subjects[0].prompts == ("a sks cat",)
    assert with_word.subjects[0].clip_t != without.subjects[0].clip_t
    assert with_word.subjects[0].clip_i == without.subjects[0].clip_i
    assert with_word.subjects[1] == without.subjects[1]


def test_each_image_is_counted_once(encoders: Encoders, folders: Path) -> None:
    seen: list[tuple[int, int]] = []
    images = find_images(folders / "real", folders / "out")
    evaluate_folders(encoders, images, lambda done, total: seen.append((done, total)))
    assert seen == [(number, 7) for number in range(1, 8)]


@pytest.mark.parametrize("place", ["real/dog/b.png", "out/dog/y.png", "adapted/n.png"])
def test_an_unreadable_image_is_named(encoders: Encoders, folders: Path, place: str) -> None:
    content = (folders / place).read_bytes()
    (folders / place).write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match="cannot be read") as error:
        evaluated(encoders, folders)
    assert str(folders / place) in str(error.value)


def test_the_json_holds_every_image_and_the_summaries(encoders: Encoders, folders: Path, tmp_path: Path) -> None:
    found = evaluated(encoders, folders)
    found.write(tmp_path / "new" / "scores.json")
    written = json.loads((tmp_path / "new" / "scores.json").read_text(encoding="utf-8"))
    assert written == found.as_json()
    assert written["models"]["clip"] == {"source": encoders.clip.source, "revision": None}
    assert written["drop_words"] == ["sks"]
    dog, scores = written["subjects"][1], found.subjects[1]
    assert (dog["name"], dog["real"], dog["generated"]) == ("dog", 2, 3)
    assert dog["prompts"] == {"x.png": "a dog", "y.png": "a dog on the moon", "z.png": "a dog in a hat"}
    for name in ("clip_i", "clip_t", "dino"):
        score = scores.score(name)
        assert dog[name] == {
            "mean": score.mean,
            "spread": score.spread,
            "images": dict(zip(scores.files, score.values, strict=True)),
        }
        assert written["overall"]["subjects"][name]["mean"] == found.over_subjects(name).mean
        assert written["overall"]["images"][name]["spread"] == found.over_images(name).spread
    assert written["drift"]["images"].keys() == {"m.png", "n.png"}
    assert written["drift"]["images"]["n.png"] == found.drift.values[1] if found.drift else False


EXAMPLE = Evaluation(
    models={"clip": "c", "dino": "d"},
    revisions={"clip": None, "dino": "0123"},
    drop_words=(),
    subjects=(
        SubjectScores("a|b", 2, ("x",), ("p",), Score((0.5,)), Score((0.25,)), Score((0.75,))),
        SubjectScores("c", 3, ("x", "y"), ("p", "q"), Score((0.1, 0.3)), Score((0.2, 0.2)), Score((0, 1))),
    ),
    drift=Score((0.125,)),
    drift_files=("m",),
)


def test_the_table_has_means_and_spreads(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path / "scores.md")
    assert (tmp_path / "scores.md").read_text(encoding="utf-8").splitlines() == [
        "| subject | real | generated | CLIP-I | CLIP-T | DINO | drift |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a∣b | 2 | 1 | 0.500 ± 0.000 | 0.250 ± 0.000 | 0.750 ± 0.000 |  |",
        "| c | 3 | 2 | 0.200 ± 0.100 | 0.200 ± 0.000 | 0.500 ± 0.500 |  |",
        "| mean of the subjects | 5 | 3 | 0.350 ± 0.150 | 0.225 ± 0.025 | 0.625 ± 0.125 |  |",
        "| all images | 5 | 3 | 0.300 ± 0.163 | 0.217 ± 0.024 | 0.583 ± 0.425 |  |",
        "| without the subject |  | 1 |  |  |  | 0.125 ± 0.000 |",
    ]
    assert EXAMPLE.table().row_count == 5


def test_the_json_lists_each_image_with_its_prompt_and_scores() -> None:
    first, second = EXAMPLE.as_json()["subjects"]
    assert first["images"] == [{"file_name": "x", "prompt": "p", "clip_i": 0.5, "clip_t": 0.25, "dino": 0.75}]
    assert second["images"] == [
        {"file_name": "x", "prompt": "p", "clip_i": 0.1, "clip_t": 0.2, "dino": 0},
        {"file_name": "y", "prompt": "q", "clip_i": 0.3, "clip_t": 0.2, "dino": 1},
    ]


def test_drift_alone_needs_no_clip(vit_folder: Path, folders: Path) -> None:
    dino_only = Encoders(None, vit_folder)
    found = evaluate_folders(dino_only, find_images(base_images=folders / "base", adapted_images=folders / "adapted"))
    assert found.models == {"dino": str(vit_folder)}
    assert found.drift is not None
    with pytest.raises(EvaluationError, match="have no CLIP"):
        evaluate_subject(dino_only, [noise(1)], [noise(2)], ["a dog"])


def test_drift_alone_has_no_subjects() -> None:
    alone = Evaluation(EXAMPLE.models, EXAMPLE.revisions, (), (), EXAMPLE.drift, EXAMPLE.drift_files)
    assert alone.as_json()["overall"] is None
    assert alone.as_json()["drift"]["mean"] == 0.125
    assert alone.table().row_count == 1


def test_an_output_of_another_kind_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"scores\.csv must end in \.json or \.md"):
        EXAMPLE.write(tmp_path / "scores.json", tmp_path / "scores.csv")
    assert not list(tmp_path.iterdir())
