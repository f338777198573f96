"""The table of what the judges see."""

from __future__ import annotations

from PIL import Image

from research.judges import seeing
from research.subjects import subject


def test_a_table_has_the_mean_of_each_kind_of_picture_of_each_subject() -> None:
    def brightness(image: Image.Image) -> float:
        return sum(image.convert("L").histogram()[200:]) / 128**2

    lines = seeing.table({"llama": brightness, "car": lambda image: 0.126})
    kinds = list(seeing.shown(subject("llama")))
    assert lines[0] == f"| subject | {' | '.join(kinds)} |"
    assert lines[3] == "| car | " + " | ".join(["0.13"] * len(kinds)) + " |"
    assert lines[2].startswith("| llama | ")
    assert lines[4].startswith("| mean | ")
    ground = float(lines[2].split(" | ")[-1].rstrip(" |"))
    assert ground == 0
    assert float(lines[2].split(" | ")[1]) > 0.05
