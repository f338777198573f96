"""The settings of `examples/settings` against the paper: what they train, and that a run of them can be planned."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import most_allocated, parts_of
from benchmarks.plans import planned
from diffusekrona import KronAConfig, inject_krona, krona_report
from diffusekrona.bases.architectures import build
from diffusekrona.bases.loading import load_base
from diffusekrona.training.families import family_of
from diffusekrona.training.plan import plan
from diffusekrona.training.run import run
from diffusekrona.training.settings import Settings, read_settings
from tests.pipelines import FAMILIES, tiny_sdxl_pipeline

RECIPES = Path(__file__).parents[2] / "examples" / "settings"
PLANS = Path(__file__).parents[2] / "benchmarks" / "results" / "plans.md"
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
    "wan.yaml": ("wan", "wan-1300m"),
    "z-image.yaml": ("z-image", "z-image"),
}
"""Recipes of families of which the paper says nothing: the tiny pipeline of each, and the architecture."""


@pytest.mark.parametrize("recipe", PAPERS)
def test_a_recipe_trains_as_many_parameters_as_the_paper_says_with_its_settings(recipe, tmp_path):
    kind, expected = PAPERS[recipe]
    found, made = planned(recipe, tmp_path)
    assert (found.training.max_train_steps, found.training.learning_rate) == (1000, 5e-4)
    assert found.adapter.a2 == 64
    assert found.training.train_text_encoder == (kind == "sd15")
    assert made.images == 4
    assert made.parameters == expected


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
    share = report.parameters / report.lora_parameters
    assert share < 0.7
    text = " ".join((RECIPES / recipe).read_text().replace("#", " ").split())
    assert f"The factors have {report.parameters / 1e6:.1f} million parameters, {share:.2f} times LoRA r=4's" in text


PRESETS = {"sdxl-12gb.yaml": 12, "flux2-klein-12gb.yaml": 12, "qwen-image-24gb.yaml": 24}
"""Recipes for a card, and how many GB it has."""

FOR_THE_REST = 1.5
"""GB for the driver, the libraries, and what a picture is computed with."""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PRESETS)
def test_a_preset_fits_its_card(recipe, tmp_path):
    found = planned(recipe, tmp_path)[1]
    assert found.drawing
    assert found.memory <= (PRESETS[recipe] - FOR_THE_REST) * 1e9
    row = next(line for line in PLANS.read_text().splitlines() if line.startswith(f"| {recipe} |"))
    assert f"| {found.parameters:,} |" in row
    assert row.endswith(f"| {found.memory / 1e9:.1f} |")


def sdxl_of_real_widths():
    pipe = tiny_sdxl_pipeline()
    pipe.unet = UNet2DConditionModel(
        **{**pipe.unet.config, "block_out_channels": (64, 320), "attention_head_dim": (4, 5), "layers_per_block": 1}
    )
    return pipe


def klein_of_real_widths():
    pipe = FAMILIES["klein"].build()
    sizes = {"num_single_layers": 3, "attention_head_dim": 64, "num_attention_heads": 16}
    pipe.transformer = Flux2Transformer2DModel(**{**pipe.transformer.config, **sizes, "axes_dims_rope": (16,) * 4})
    return pipe


def qwen_image_of_real_widths():
    pipe = FAMILIES["qwen-image"].build()
    sizes = {"attention_head_dim": 64, "num_attention_heads": 16, "axes_dims_rope": (16, 24, 24)}
    pipe.transformer = QwenImageTransformer2DModel(**{**pipe.transformer.config, **sizes})
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "build_base"),
    [
        ("sdxl-12gb.yaml", sdxl_of_real_widths),
        ("flux2-klein-12gb.yaml", klein_of_real_widths),
        ("qwen-image-24gb.yaml", qwen_image_of_real_widths),
    ],
)
def test_the_plan_of_a_preset_is_what_a_run_takes(recipe, build_base, tmp_path):
    """Fewer and smaller layers than the base's, but wide enough that the step's memory is that of its tensors."""
    build_base().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (256, 256)).save(tmp_path / "images" / f"{number}.png")
    places = {"instance_data_dir": tmp_path / "images", "output_dir": tmp_path / "out", "resolution": 256}
    given = read_settings(RECIPES / recipe)
    for name in ("validation_prompt", "validation_steps", "quantize_text_encoders"):  # which a step does without
        given.pop(name, None)
    settings = Settings.of(
        {**given, **places, "pretrained_model_name_or_path": str(tmp_path / "base"), "max_train_steps": 2, "a2": 64}
    )
    found = plan(settings)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    outcome = run(settings, on_step=lambda done: profiler.start() if done.step == 1 else profiler.stop())
    assert outcome.report.parameters == found.parameters
    pipe = load_base(str(tmp_path / "base"), torch.bfloat16, settings.quantization)
    weights = sum(part.nbytes for weight in family_of(pipe).denoiser.parameters() for part in parts_of(weight))
    assert 0.95 * weights < found.weights < 1.1 * weights
    assert 0.9 < most_allocated(profiler) / found.activations < 1.1


def test_every_recipe_is_tested_here_or_is_of_the_repositorys_own_base():
    own = {
        path.name for path in RECIPES.iterdir() if read_settings(path)["pretrained_model_name_or_path"][:6] == "models"
    }
    assert {path.name for path in RECIPES.iterdir()} == PAPERS.keys() | own | OF_FAMILIES.keys() | PRESETS.keys()
