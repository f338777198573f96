"""The code of a run's model card, run as it stands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusekrona import load_krona, merge_krona
from diffusekrona.training.run import run
from diffusekrona.training.settings import Settings
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline
from tests.training.runs import FAMILIES


def trained(build: Callable[[], Any], folder: Path, **values: Any) -> str:
    """The code of the card of a short run in a folder, which is the working directory."""
    build().to(torch.float16).save_pretrained(folder / "base")
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "images" / "0.png")
    run(
        Settings.of(
            {
                "pretrained_model_name_or_path": "base",
                "instance_data_dir": Path("images"),
                "instance_prompt": "a 'sks' toy",
                "output_dir": Path("toy"),
                "a1": 4,
                "a2": 8,
                "max_train_steps": 1,
                "learning_rate": 1e-2,
                **values,
            }
        )
    )
    return (folder / "toy" / "README.md").read_text().split("```python\n")[1].split("```")[0]


@FAMILIES
def test_the_code_of_a_card_draws_with_the_adapter(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(trained(build, tmp_path), names)
    pipe = names["pipe"]
    assert type(pipe) is type(build())
    assert np.asarray(names["image"]).std() > 0
    expected = type(pipe).from_pretrained("base", dtype=torch.float32)
    load_krona(expected, "toy")
    merge_krona(expected)
    denoiser = "transformer" if hasattr(pipe, "transformer") else "unet"
    of_card, of_test = (krona_layers(getattr(one, denoiser)) for one in (pipe, expected))
    assert of_card
    assert all(torch.equal(layer.weight, of_test[name].weight) for name, layer in of_card.items())


def test_the_card_of_a_pushed_adapter_loads_it_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr("diffusekrona.training.run.push", lambda path, repository: pushed.append(repository))
    monkeypatch.setattr("diffusekrona.training.run.check_hub", lambda repository: None)
    code = trained(tiny_sd_pipeline, tmp_path, push_to_hub=True, hub_model_id="me/toy")
    assert pushed == ["me/toy"]
    assert "load_krona(pipe, 'me/toy')" in code
    (tmp_path / "me").mkdir()
    (tmp_path / "toy").rename(tmp_path / "me" / "toy")  # a folder of that name goes before the hub
    names: dict[str, Any] = {}
    exec(code, names)
    assert krona_layers(names["pipe"].unet)
