"""The settings of `examples/settings` against the paper: what they train, and that a run of them can be planned."""

import inspect
import json
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from diffusekrona import KronAConfig, inject_krona, krona_report
from diffusekrona.bases.architectures import build
from diffusekrona.training.plan import plan
from diffusekrona.training.settings import Settings, read_settings
from tests.pipelines import FAMILIES

RECIPES = Path(__file__).parents[2] / "examples" / "settings"
PARTS = {
    "sd15": {"unet": "sd15", "text_encoder": "sd15-text-encoder"},
    "sdxl": {"unet": "sdxl", "text_encoder": "sd15-text-encoder", "text_encoder_2": "sdxl-text-encoder-2"},
}
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
PAPERS = {
    "sd15.yaml": ("sd15", 520_928),  # Table 2: 0.52 M
    "sd15-small.yaml": ("sd15", 328_048),  # Table 4: 0.32 M
    "sdxl.yaml": ("sdxl", 3_874_560),  # Table 2: 3.8 M
}
OF_FAMILIES = {
    "chroma.yaml": ("chroma", "chroma"),
    "flux.yaml": ("flux", "flux1"),
    "flux2.yaml": ("flux2", "flux2"),
    "klein.yaml": ("klein", "flux2-klein-4b"),
    "krea2.yaml": ("krea2", "krea2"),
    "pixart.yaml": ("pixart", "pixart-sigma"),
    "qwen-image.yaml": ("qwen-image", "qwen-image"),
    "sana.yaml": ("sana", "sana-1600m"),
    "sd35.yaml": ("sd3", "sd35-large"),
    "wan.yaml": ("wan", "wan-14b"),
    "z-image.yaml": ("z-image", "z-image"),
}
"""Recipes of families of which the paper says nothing: the tiny pipeline of each, and the architecture."""


@pytest.mark.parametrize("recipe", PAPERS)
def test_a_recipe_trains_as_many_parameters_as_the_paper_says_with_its_settings(recipe, tmp_path):
    kind, expected = PAPERS[recipe]
    given = read_settings(RECIPES / recipe)
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{number}.png")
    places = {"instance_data_dir": tmp_path / "images", "output_dir": tmp_path / "out"}
    found = Settings.of({**given, **places, "pretrained_model_name_or_path": str(configs_only(kind, tmp_path))})
    assert (found.training.max_train_steps, found.training.learning_rate) == (1000, 5e-4)
    assert found.adapter.a2 == 64
    assert found.training.train_text_encoder == (kind == "sd15")
    planned = plan(found)
    assert planned.images == 3
    assert planned.parameters == expected


@pytest.mark.parametrize("recipe", OF_FAMILIES)
def test_a_recipe_of_another_family_can_be_planned_at_the_papers_rate(recipe, tmp_path):
    given = read_settings(RECIPES / recipe) | {"a1": 4, "a2": 8, "resolution": 64}  # which the tiny layers can take
    FAMILIES[OF_FAMILIES[recipe][0]].build().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "one.png")
    places = {"instance_data_dir": tmp_path / "images", "output_dir": tmp_path / "out"}
    found = Settings.of({**given, **places, "pretrained_model_name_or_path": str(tmp_path / "base")})
    assert found.training.learning_rate == 5e-4
    assert found.training.mixed_precision == "bf16"
    assert plan(found).parameters > 0


@pytest.mark.parametrize("recipe", OF_FAMILIES)
def test_a_recipes_factors_fit_the_real_layers_with_fewer_parameters_than_lora(recipe):
    """As the comments of the recipes say; Wan's is for a smaller model than is known here."""
    given = read_settings(RECIPES / recipe)
    model = build(OF_FAMILIES[recipe][1])
    inject_krona(model, KronAConfig(a1=given["a1"], a2=given["a2"]))
    report = krona_report(model)
    if recipe == "wan.yaml":
        return
    share = report.parameters / report.lora_parameters
    assert share < 0.7
    text = " ".join((RECIPES / recipe).read_text().replace("#", " ").split())
    assert f"The factors have {report.parameters / 1e6:.1f} million parameters, {share:.2f} times LoRA r=4's" in text


def configs_only(kind, folder):
    """A base's folder without weights."""
    base = folder / "base"
    base.mkdir()
    models = {part: build(name) for part, name in PARTS[kind].items()}
    index = {part: ["library", type(model).__name__] for part, model in models.items()}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    names = inspect.signature(PIPELINES[kind].__init__).parameters.keys() - {"self"}
    index |= {name: [None, None] for name in names if name.startswith(("tokenizer", "safety", "feature"))}
    (base / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[kind].__name__, **index}))
    for part, model in models.items():
        save = model.save_config if part == "unet" else model.config.save_pretrained
        save(base / part)
    AutoencoderKL(block_out_channels=(32,) * 4, **LEVELS).save_config(base / "vae")
    DDIMScheduler().save_config(base / "scheduler")
    return base


def test_every_recipe_is_tested_here_or_is_of_the_repositorys_own_base():
    own = {
        path.name for path in RECIPES.iterdir() if read_settings(path)["pretrained_model_name_or_path"][:6] == "models"
    }
    assert {path.name for path in RECIPES.iterdir()} == PAPERS.keys() | own | OF_FAMILIES.keys()
