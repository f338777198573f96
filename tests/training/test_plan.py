import pytest
import torch
from PIL import Image

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.base import BaseModelError
from diffusekrona.training.families import family_of
from diffusekrona.training.plan import _Kept, plan
from diffusekrona.training.settings import Settings
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline


@pytest.fixture(params=[tiny_sd_pipeline, tiny_sdxl_pipeline], ids=["sd", "sdxl"])
def base(request, tmp_path):
    request.param().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / f"{number}.png")
    return request.param(), tmp_path


def settings(folder, **values):
    given = {"base": folder / "base", "images": folder / "images", "prompt": "a sks toy", "output": folder / "out"}
    names = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir")
    return Settings.of({**dict(zip(names, map(str, given.values()), strict=True)), "a1": 4, "a2": 8, **values})


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plan_is_what_a_real_pass_trains_and_at_least_what_it_keeps(base, batch):
    pipe, folder = base
    found = plan(settings(folder, train_batch_size=batch))
    krona = inject_krona(pipe, KronAConfig(a1=4, a2=8))
    family = family_of(pipe)
    pipe.unet.train()
    kept = _Kept(pipe.unet)
    with kept.counting():
        latents = torch.zeros(batch, 4, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
        family.predict(latents, torch.zeros(batch, dtype=torch.long), family.example(batch), torch.zeros(batch, 6))
    # The fused step, which looks into no tensors without numbers, keeps less; with factors this small, a third.
    assert kept.bytes <= found.activations < 1.6 * kept.bytes
    assert found.parameters == sum(factor.numel() for factor in krona.parameters())
    assert found.weights == sum(
        weight.nbytes for name, weight in pipe.unet.named_parameters() if "krona_" not in name
    ) + 4 * sum(factor.numel() for factor in krona.parameters())
    assert (found.images, found.steps_per_epoch) == (3, 3 / batch)


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


def test_a_base_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(BaseModelError, match="autoencoder"):
        plan(settings(tmp_path))
