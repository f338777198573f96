from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.bases.loading import BaseModelError
from diffusekrona.training import TrainingConfigError
from diffusekrona.training.batches import Batches, text_encoders
from diffusekrona.training.families import family_of
from diffusekrona.training.offload import blocks_of
from diffusekrona.training.plan import Plan, SavedTensors, plan
from diffusekrona.training.settings import Settings
from tests.pipelines import FAMILIES, IMAGE_SIZE, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import examples


@pytest.fixture(params=[tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_sd3_pipeline], ids=["sd", "sdxl", "sd3"])
def base(request, tmp_path):
    return saved_base(request.param, tmp_path)


def saved_base(build, folder):
    """A pipeline, saved in a folder beside three images, and the folder."""
    pipe = build()
    pipe.save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40)).save(folder / "images" / f"{number}.png")
    return pipe, folder


def settings(folder, **values):
    given = {"base": folder / "base", "images": folder / "images", "prompt": "a sks toy", "output": folder / "out"}
    names = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir")
    return Settings.of({**dict(zip(names, map(str, given.values()), strict=True)), "a1": 4, "a2": 8, **values})


def trained_modules(pipe, training):
    return [family_of(pipe).denoiser, *(text_encoders(pipe) if training.train_text_encoder else [])]


def kept_bytes(pipe, chosen):
    """What a real step's forward pass keeps for the backward pass."""
    training = chosen.training
    half = {"bf16": torch.bfloat16, "no": torch.float32}[training.mixed_precision]
    where = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=0,
        num_processes=1,
        autocast=lambda: torch.autocast("cpu", half, enabled=half != torch.float32),
    )
    source = Batches("subject", pipe, family_of(pipe), examples(3), training, where)
    modules = trained_modules(pipe, training)
    for module in modules:
        module.train()
    saved = SavedTensors(modules)
    with saved.counting():
        loss = source.loss(0)
    del loss
    return saved.bytes


@pytest.mark.parametrize(
    "values",
    [
        {"train_batch_size": 3},
        {"train_batch_size": 2, "train_text_encoder": True},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "dtype": "float32"},
    ],
    ids=["frozen", "text", "bf16", "bf16 on fp32"],
)
def test_a_plan_is_what_a_real_step_trains_and_at_least_what_it_keeps(base, values):
    pipe, folder = base
    chosen = settings(folder, **values)
    found = plan(chosen)
    pipe.to(getattr(torch, chosen.base_dtype))
    krona = inject_krona(pipe, KronAConfig(a1=4, a2=8), text_encoders=chosen.training.train_text_encoder)
    kept = kept_bytes(pipe, chosen)
    # The fused step, which looks into no tensors without numbers, keeps less; with factors this small, a third.
    assert kept <= found.activations < 1.6 * kept
    assert found.parameters == sum(factor.numel() for factor in krona.parameters())
    modules = trained_modules(pipe, chosen.training)
    factors = set(krona.parameters())
    assert found.weights == sum(p.nbytes for module in modules for p in module.parameters() if p not in factors)
    assert (found.images, found.steps_per_epoch) == (3, 3 / chosen.training.train_batch_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_of_each_family_can_be_planned(name, tmp_path):
    """A plan's prompts are as long as they can be."""
    pipe, folder = saved_base(FAMILIES[name].build, tmp_path)
    chosen = settings(folder, train_batch_size=3, resolution=IMAGE_SIZE)
    found = plan(chosen)
    krona = inject_krona(pipe, KronAConfig(a1=4, a2=8))
    assert found.activations >= kept_bytes(pipe, chosen)
    assert found.parameters == sum(factor.numel() for factor in krona.parameters())
    with_text = settings(folder, train_batch_size=3, resolution=IMAGE_SIZE, train_text_encoder=True)
    assert plan(with_text).activations > found.activations


def test_text_encoders_that_are_trained_keep_activations_too(base):
    pipe, folder = base
    frozen, trained = plan(settings(folder)), plan(settings(folder, train_text_encoder=True))
    inject_krona(pipe, KronAConfig(a1=4, a2=8), text_encoders=True)
    saved = SavedTensors(text_encoders(pipe))
    with saved.counting():
        said = family_of(pipe).encode(["a sks toy"], torch.device("cpu"))
    assert all(tensor.requires_grad for tensor in said.values())
    assert saved.bytes <= trained.activations - frozen.activations < 4 * saved.bytes


def test_only_the_named_encoders_are_trained_and_the_others_are_there_in_each_step(tmp_path):
    pipe, folder = saved_base(tiny_sdxl_pipeline, tmp_path)
    one = settings(folder, train_text_encoder=True, text_encoders_to_train=["text_encoder_2"], optimizer="lion")
    found, none, both = plan(one), plan(settings(folder)), plan(settings(folder, train_text_encoder=True))
    krona = inject_krona(pipe, KronAConfig(a1=4, a2=8), text_encoders=["text_encoder_2"])
    assert found.parameters == sum(factor.numel() for factor in krona.parameters())
    assert none.parameters < found.parameters < both.parameters
    assert none.activations < found.activations < both.activations
    assert (found.weights, found.encoders) == (both.weights, both.encoders)


def test_encoders_are_there_before_the_first_step_or_in_every_one(base):
    pipe, folder = base
    texts = sum(weight.nbytes for encoder in text_encoders(pipe) for weight in encoder.parameters())
    both = texts + sum(weight.nbytes for weight in pipe.vae.parameters())
    plain, uncached = plan(settings(folder)), plan(settings(folder, cache="none"))
    assert (plain.encoders, uncached.encoders) == (both, 0)
    assert uncached.weights == plain.weights + both
    assert plan(settings(folder, train_text_encoder=True)).encoders == both - texts


def test_the_peak_is_that_of_a_step_or_of_the_encoders():
    parts = {"parameters": 1, "share": 1.0, "images": 1, "steps_per_epoch": 1.0, "epochs": 1.0}
    assert Plan(**parts, encoders=5, weights=1, state=1, activations=1).memory == 5
    assert Plan(**parts, encoders=5, weights=2, state=2, activations=2).memory == 6
    assert Plan(**parts, encoders=5, weights=2, state=2, activations=2, drawing=7).memory == 7


@pytest.mark.parametrize(
    "values",
    [{"validation_prompt": ["a sks toy"]}, {"with_prior_preservation": True, "class_prompt": "a toy"}],
    ids=["validation", "class images"],
)
def test_all_models_are_there_at_once_where_pictures_are_drawn(base, values):
    pipe, folder = base
    found = plan(settings(folder, offload="blocks", **values))
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert found.drawing == sum(weight.nbytes for model in models for weight in model.parameters()) + found.state
    assert plan(settings(folder)).drawing == 0


def test_images_are_those_of_the_trainer_patches_counted(tmp_path):
    _, folder = saved_base(tiny_sd3_pipeline, tmp_path)
    with pytest.raises(TrainingConfigError, match="not divisible by 8"):
        plan(settings(folder, resolution=36))
    larger = plan(settings(folder, resolution=128)).activations
    assert larger > 1.4 * plan(settings(folder)).activations


def test_checkpointing_and_a_half_precision_base_take_less(base):
    _, folder = base
    plain = plan(settings(folder))
    assert plan(settings(folder, gradient_checkpointing=True)).activations < 0.7 * plain.activations
    assert plan(settings(folder, dtype="bfloat16")).weights < 0.6 * plain.weights


def test_more_is_trained_and_kept_with_text_encoders_averages_and_other_optimizers(base):
    _, folder = base
    plain = plan(settings(folder))
    assert plan(settings(folder, train_text_encoder=True)).parameters > plain.parameters
    assert plan(settings(folder, ema_decay=0.9)).state == plain.state + 4 * plain.parameters
    assert plan(settings(folder, optimizer="adamw8bit")).state == plain.state - 6 * plain.parameters
    assert plan(settings(folder, optimizer="SGD")).state == plain.state - 8 * plain.parameters


@pytest.mark.parametrize(("name", "least", "most"), [("lion", 4, 4), ("muon", 4, 4), ("came", 4, 7)])
def test_a_plan_measures_the_state_of_other_optimizers(name, least, most, base):
    pytest.importorskip("pytorch_optimizer")
    _, folder = base
    plain = plan(settings(folder))
    moments = (plan(settings(folder, optimizer=name)).state - plain.state) / plain.parameters + 8
    assert least <= moments <= most


@pytest.mark.parametrize("how", ["blocks", "all"])
def test_of_blocks_that_wait_elsewhere_a_plan_counts_one(how, base):
    pipe, folder = base
    found = plan(settings(folder, offload=how))
    denoiser = family_of(pipe).denoiser
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in blocks_of(denoiser)]
    assert found.weights == sum(weight.nbytes for weight in denoiser.parameters()) - sum(sizes) + max(sizes)
    assert found.state == plan(settings(folder)).state


def test_a_base_that_cannot_be_read_is_an_error(base):
    _, folder = base
    for part, said in (("vae", "vae has no"), ("scheduler", "scheduler has"), ("model_index.json", "no model_index")):
        (folder / "base" / part).rename(folder / part)
        with pytest.raises(BaseModelError, match=said):
            plan(settings(folder))
        (folder / part).rename(folder / "base" / part)
