from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from diffusekrona import KronAConfig, inject_krona
from diffusekrona.training import (
    TrainingConfig,
    TrainingConfigError,
    TrainingDivergedError,
    UnsupportedPipelineError,
    fit,
    prepare_images,
)
from tests.pipelines import IMAGE_SIZE, tiny_sd_pipeline, tiny_sdxl_pipeline

QUICK = TrainingConfig(steps=2, learning_rate=1e-2, batch_size=2)
PIPELINES = pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])


def examples(count=2):
    noise = np.random.default_rng(0).integers(0, 255, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return prepare_images([Image.fromarray(pixels) for pixels in noise], "a sks toy", IMAGE_SIZE)


def adapted(build=tiny_sd_pipeline, *, text_encoders=False, **options):
    """A tiny pipeline and the trainable factors of a fresh adapter, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build()
        krona = inject_krona(pipe, KronAConfig(**options), text_encoders=text_encoders)
    return pipe, dict(krona.named_parameters())


def train(pipe, factors, config=QUICK, on_step=None, images=None):
    return fit(pipe, images or examples(), factors.values(), config, on_step)


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def weights(pipe):
    """Every tensor of every module of a pipeline by name."""
    return {
        f"{part}.{name}": tensor
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for name, tensor in module.state_dict().items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@PIPELINES
def test_training_lowers_the_loss(build):
    pipe, factors = adapted(build)
    config = TrainingConfig(steps=30, learning_rate=2e-2, batch_size=4)
    # One and the same draws before and after: nothing is learnt at a rate that is next to zero.
    still = replace(config, steps=6, learning_rate=1e-30, weight_decay=0, seed=1)
    before = train(pipe, factors, still).losses
    train(pipe, factors, config)
    after = train(pipe, factors, still).losses
    assert sum(after) < 0.9 * sum(before)
    assert all(late < early for late, early in zip(after, before, strict=True))


@PIPELINES
def test_only_the_parameters_given_change(build):
    pipe, factors = adapted(build)
    before, started = copies(weights(pipe)), copies(factors)
    train(pipe, factors)
    after = weights(pipe)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".krona_" in name
    }
    assert not any(torch.equal(started[name], factors[name]) for name in factors)


@PIPELINES
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equal_seeds_give_equal_factors_bit_for_bit(build, dropout):
    runs = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        pipe, factors = adapted(build, dropout=dropout)
        torch.manual_seed(noise)
        losses = train(pipe, factors, replace(QUICK, seed=seed, horizontal_flip=True)).losses
        runs.append((losses, copies(factors)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]
    assert not same(runs[0][1], runs[2][1])


def test_the_callers_random_state_is_left_alone():
    pipe, factors = adapted(dropout=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(pipe, factors)
    assert torch.equal(torch.rand(3), expected)


def test_modes_and_scheduler_are_as_before_and_training_happens_in_train_mode():
    pipe, factors = adapted()
    pipe.unet.eval()
    pipe.unet.mid_block.train()
    pipe.vae.train()
    before = {
        id(part): part.training for module in (pipe.unet, pipe.vae, pipe.text_encoder) for part in module.modules()
    }
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    modes = []
    train(pipe, factors, on_step=lambda _: modes.append((pipe.unet.conv_in.training, pipe.vae.training)))
    assert modes == [(True, False)] * 2
    after = {
        id(part): part.training for module in (pipe.unet, pipe.vae, pipe.text_encoder) for part in module.modules()
    }
    assert after == before
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config


@PIPELINES
def test_text_encoders_learn_when_asked_to(build):
    pipe, factors = adapted(build, text_encoders=True)
    modes, started = [], copies(factors)
    result = train(
        pipe,
        factors,
        replace(QUICK, text_encoders=True),
        on_step=lambda _: modes.append(pipe.text_encoder.training),
    )
    assert modes == [True, True]
    assert not pipe.text_encoder.training
    encoders = {name for name in factors if name.startswith("text_encoder")}
    learnt = {name for name in encoders if not torch.equal(started[name], factors[name])}
    # The UNet of SDXL does not listen to the first encoder's last layer.
    assert learnt == encoders if build is tiny_sd_pipeline else len(learnt) > len(encoders) / 2
    assert result.parameters == sum(factor.numel() for factor in factors.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_half_precision_base_trains_with_float32_factors(precision):
    pipe, factors = adapted(lambda: tiny_sdxl_pipeline().to(torch.bfloat16))
    started = copies(factors)
    result = train(pipe, factors, replace(QUICK, mixed_precision=precision))
    assert pipe.unet.conv_in.weight.dtype == pipe.vae.dtype == torch.bfloat16
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    assert not any(torch.equal(started[name], factors[name]) for name in factors)
    assert all(np.isfinite(result.losses))


def test_mixed_precision_computes_in_bfloat16_and_runs_of_other_precision_may_follow():
    seen = []
    for precision in ("no", "bf16", "no"):
        pipe, factors = adapted()
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(
            lambda module, args, output: seen.append(output.dtype)
        )
        train(pipe, factors, replace(QUICK, steps=1, mixed_precision=precision))
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def gradients(config):
    """The gradients of each forward pass, as they stand after it, of one factor."""
    pipe, factors = adapted()
    factor, seen = next(factor for name, factor in factors.items() if "krona_B" in name), []
    factor.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    result = train(pipe, factors, config)
    return seen, result.losses


def test_accumulated_gradients_and_losses_are_the_mean_over_the_batches():
    still = TrainingConfig(steps=2, learning_rate=1e-30, weight_decay=0, max_grad_norm=None)
    (first, second), losses = gradients(still)
    (_, accumulated), (loss,) = gradients(replace(still, steps=1, gradient_accumulation_steps=2))
    torch.testing.assert_close(accumulated, (first + second) / 2, rtol=1e-4, atol=1e-9)
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.parametrize("limit", [None, 1e-4])
def test_long_gradients_are_shortened(limit):
    pipe, factors = adapted()
    norms = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: norms.append(float(torch.cat([f.grad.flatten() for f in factors.values()]).norm()))
    )
    train(pipe, factors, replace(QUICK, max_grad_norm=limit))
    hook.remove()
    assert len(norms) == 2
    assert all(norm == pytest.approx(limit, rel=1e-2) if limit else norm > 1e-3 for norm in norms)


def test_every_image_is_used_equally_often():
    pipe, factors = adapted()
    drawn = []
    images = examples(3)
    images = [replace(image, prompt=f"toy {index}") for index, image in enumerate(images)]
    prompts = pipe.encode_prompt([image.prompt for image in images], "cpu", 1, False)[0]
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: drawn.extend(
            int((prompts - hidden).abs().sum(dim=(1, 2)).argmin()) for hidden in kwargs["encoder_hidden_states"]
        ),
        with_kwargs=True,
    )
    train(pipe, factors, replace(QUICK, steps=3, batch_size=4), images=images)
    assert sorted(drawn) == [0] * 4 + [1] * 4 + [2] * 4
    assert drawn != sorted(drawn)


def test_each_step_is_reported():
    pipe, factors = adapted()
    steps = []
    result = train(
        pipe,
        factors,
        replace(QUICK, steps=4, lr_schedule="linear", lr_warmup_steps=1, learning_rate=3e-3),
        steps.append,
    )
    assert [(step.step, step.steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert tuple(step.loss for step in steps) == result.losses
    assert [step.learning_rate for step in steps] == pytest.approx([0, 3e-3, 2e-3, 1e-3])
    assert steps[-1].average == result.final_loss == pytest.approx(sum(result.losses) / 4)
    assert 0 < steps[0].seconds < steps[-1].seconds <= result.seconds
    assert (result.steps, result.images) == (4, 2)


def test_a_loss_that_is_not_a_number_stops_the_run():
    pipe, factors = adapted()
    pipe.unet.conv_out.bias.data[0] = torch.nan
    started = copies(factors)
    with pytest.raises(TrainingDivergedError, match=r"loss became nan at step 1 of 2\. Nothing was saved.*0\.01"):
        train(pipe, factors)
    assert same(started, factors)
    assert not pipe.unet.training


def test_a_weight_that_is_not_a_number_at_the_end_is_an_error():
    pipe, factors = adapted()

    def spoil(step):
        if step.step == step.steps:
            next(iter(factors.values())).data[0, 0] = torch.inf

    with pytest.raises(TrainingDivergedError, match="weight is no longer a finite number"):
        train(pipe, factors, on_step=spoil)


def test_fp16_on_a_cpu_is_refused_and_later_runs_are_not_affected(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    pipe, factors = adapted()
    with pytest.raises(TrainingConfigError, match="mixed_precision='fp16' needs a GPU"):
        train(pipe, factors, replace(QUICK, mixed_precision="fp16"))
    train(pipe, factors, replace(QUICK, steps=1))


def test_nothing_to_train_is_an_error():
    with pytest.raises(TrainingConfigError, match="nothing to train"):
        fit(tiny_sd_pipeline(), examples(), [], QUICK)


def test_another_kind_of_pipeline_is_an_error():
    pipe, factors = adapted()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UnsupportedPipelineError):
        train(pipe, factors)
