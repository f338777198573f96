"""Drawing a batch: each picture against itself alone; and what is wrong with one costs no other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusekrona import AdapterStore
from diffusekrona.serving.drawing import Drawer
from diffusekrona.serving.gather import Outcome
from diffusekrona.serving.picture import Picture, Refusal
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.serving.adapters import folder_of

MODELS = ["dog", None, "cat", "dog"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path, "dog", "cat", "fox")


def pictures(models: Sequence[str | None] = MODELS, **more: Any) -> list[Picture]:
    given = {"width": 64, "height": 32, "steps": 2, "guidance_scale": 3.0, **more}
    return [Picture(model, f"a toy {number}", number, **given) for number, model in enumerate(models)]


def drawer(folder: Path, **more: Any) -> Drawer:
    pipe = tiny_sdxl_pipeline()
    return Drawer(pipe, AdapterStore(pipe, folder, **more))


def pixels(outcome: Outcome) -> np.ndarray[Any, Any]:
    assert isinstance(outcome, bytes), outcome
    return np.asarray(Image.open(io.BytesIO(outcome)), float)


def test_each_picture_is_what_it_is_alone(folder: Path) -> None:
    together = drawer(folder).draw(pictures())
    for picture, outcome in zip(pictures(), together, strict=True):
        (alone,) = drawer(folder).draw([picture])
        assert pixels(outcome).shape == (32, 64, 3)
        assert np.abs(pixels(outcome) - pixels(alone)).max() <= 2
    first, second = (Picture("dog", "a toy", seed, None, 64, 32, 2, 3.0) for seed in (1, 2))
    one, other = drawer(folder).draw([first, second])
    assert np.abs(pixels(one) - pixels(other)).max() > 10
    assert np.abs(pixels(together[0]) - pixels(drawer(folder).draw(pictures([None]))[0])).max() > 10


def test_pictures_of_other_options_are_of_another_kind(folder: Path) -> None:
    one = drawer(folder)
    kinds = {
        one.kind(pictures(["dog"], **more)[0])
        for more in ({}, {"width": 32}, {"steps": 3}, {"guidance_scale": None}, {"negative_prompt": "fog"})
    }
    assert len(kinds) == 5
    assert len({one.kind(picture) for picture in pictures()}) == 1
    long = Picture("dog", "a toy " * 40, 0, None, 64, 32, 2, 3.0)
    assert one.kind(long) not in kinds  # in more chunks, which would change the others' texts


def test_a_damaged_adapter_fails_its_own_picture(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "bad.safetensors").write_bytes(b"noise")
    found = drawer(folder).draw(pictures(["dog", "bad", "gone", None]))
    assert [one.status if isinstance(one, Refusal) else 200 for one in found] == [200, 422, 404, 200]
    assert str(folder) not in found[1].message  # type: ignore[union-attr]
    assert str(folder) in caplog.text
    (alone,) = drawer(folder).draw(pictures(["dog"]))
    assert np.abs(pixels(found[0]) - pixels(alone)).max() <= 2


def test_what_the_pipeline_fails_at_fails_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = drawer(folder)
    encode, fox = one._pipe.encode_prompt, "a toy 1"

    def failing(*given: Any, **named: Any) -> Any:
        if fox in named["prompt"]:
            raise RuntimeError("no memory")
        return encode(*given, **named)

    one._pipe.encode_prompt = failing
    found = one.draw(pictures(["dog", "fox", "cat"]))
    assert [one.status if isinstance(one, Refusal) else 200 for one in found] == [200, 500, 200]
    assert "no memory" in caplog.text


def test_adapters_that_do_not_fit_together_are_drawn_one_after_the_other(folder: Path) -> None:
    size = AdapterStore(tiny_sdxl_pipeline(), folder).load("dog").bytes
    found = drawer(folder, budget=size + size // 2).draw(pictures(["dog", "cat", None, "fox", "dog"]))
    (alone,) = drawer(folder).draw([pictures(["dog", "cat"])[1]])
    assert np.abs(pixels(found[1]) - pixels(alone)).max() <= 2
    assert all(isinstance(one, bytes) for one in found)
    (none,) = drawer(folder, budget=10).draw(pictures(["dog"]))
    assert isinstance(none, Refusal)
    assert (none.status, none.code) == (503, "adapter_too_large")


def test_it_stops_at_the_next_step_when_nobody_waits(folder: Path) -> None:
    asked: list[int] = []

    def abandoned() -> bool:
        asked.append(1)
        return len(asked) == 2

    found = drawer(folder).draw(pictures(steps=5), abandoned)
    assert len(asked) == 2
    assert {one.status for one in found if isinstance(one, Refusal)} == {499}
    assert drawer(folder)._store.loaded() == []


def test_what_is_known_before_is_refused_before(folder: Path) -> None:
    one = drawer(folder)
    assert one.refusal(pictures(["dog"])[0]) is None
    assert one.refusal(pictures(["cow"])[0]) is not None
    pipe = tiny_flux_pipeline()
    pipe.__class__ = type("Plain", (type(pipe),), {"__call__": lambda self, prompt: None})
    other = Drawer(pipe, AdapterStore(pipe, folder))
    found = other.refusal(Picture(None, "a toy", 0, "fog"))
    assert found is not None
    assert (found.status, found.param) == (400, "negative_prompt")


def test_the_next_batchs_adapters_are_loaded_ahead(folder: Path) -> None:
    one = drawer(folder)
    one.ahead(pictures(["dog", None, "cat"]))
    one._store._prefetching.submit(lambda: None).result(timeout=60)  # type: ignore[union-attr]
    assert set(one._store.loaded()) == {"dog", "cat"}
