"""Files that hold more than a pipeline has: loading what is for some of its components."""

import warnings
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from diffusekrona import KronAConfig, inject_krona, load_krona, save_krona
from diffusekrona.errors import AdapterFileError, ConfigError
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import unchanged


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(a1=4, a2=8, init_weights=False), text_encoders=True)
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what LyCORIS refuses
        return _saved(pipe, folder)


def _saved(pipe: StableDiffusionPipeline, folder: Path) -> dict[str, Path]:
    return {
        "file": save_krona(pipe, folder / "ours.safetensors"),
        "folder": save_krona(pipe, folder / "ours"),
        "comfyui": save_krona(pipe, folder / "comfyui.safetensors", format="comfyui"),
        "kohya": save_krona(pipe, folder / "kohya.safetensors", format="kohya"),
        "diffusers": save_krona(pipe, folder / "diffusers.safetensors", format="diffusers"),
    }


def without_encoder():
    pipe = tiny_sd_pipeline()
    pipe.text_encoder = None
    return pipe


@pytest.mark.parametrize("kind", ["file", "folder", "comfyui", "kohya", "diffusers"])
def test_the_denoisers_part_loads_alone(kind: str, files: dict[str, Path]) -> None:
    for pipe in (without_encoder(), tiny_sd_pipeline()):
        adapter = load_krona(pipe, files[kind], components=["unet"])
        assert list(adapter.components) == ["unet"]
        assert len(krona_layers(pipe.unet)) == 56
        assert pipe.text_encoder is None or not krona_layers(pipe.text_encoder)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_error_names_the_way_out(kind: str, files: dict[str, Path]) -> None:
    pipe = without_encoder()
    with unchanged(pipe.unet), pytest.raises(AdapterFileError, match=r"text_encoder, unet.*components=\['unet'\]"):
        load_krona(pipe, files[kind])


@pytest.mark.parametrize("kind", ["file", "kohya"])
def test_a_text_encoders_part_loads_alone(kind: str, files: dict[str, Path]) -> None:
    pipe = tiny_sd_pipeline()
    assert list(load_krona(pipe, files[kind], components="text_encoder").components) == ["text_encoder"]
    assert not krona_layers(pipe.unet)


def test_components_that_are_not_there_are_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    pipe = without_encoder()
    for wanted in (["text_encoder"], [], ["unet", "vae"]):
        with pytest.raises(ConfigError, match="components must be some of what this model has, unet"):
            load_krona(pipe, files["file"], components=wanted)
    other = tiny_sd_pipeline()
    inject_krona(other, KronAConfig(a1=4, a2=8))
    path = save_krona(other, tmp_path / "unet.safetensors")
    with pytest.raises(AdapterFileError, match="for unet, and none for text_encoder"):
        load_krona(tiny_sd_pipeline(), path, components=["text_encoder"])
    single = save_krona(other.unet, tmp_path / "single.safetensors")
    with pytest.raises(AdapterFileError, match="for a single model, and none for text_encoder"):
        load_krona(tiny_sd_pipeline(), single, components=["text_encoder"])
    assert list(load_krona(tiny_sd_pipeline(), single, components=["unet"]).components) == ["unet"]
