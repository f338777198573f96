import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from diffusekrona.training import (
    TrainingConfig,
    TrainingConfigError,
    TrainingDivergedError,
    UnsupportedPipelineError,
    fit,
    prepare_images,
)
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import (
    FAMILIES,
    OPTIMIZERS,
    PIPELINES,
    PLAN,
    QUICK,
    SMALL,
    adapted,
    copies,
    examples,
    need,
    pictures,
    same,
    train,
    trained,
    weights,
)


@FAMILIES
def test_training_lowers_the_loss(build):
    pipe, factors = adapted(build)
    config = TrainingConfig(max_train_steps=30, learning_rate=2e-2, train_batch_size=4)
    # One and the same draws before and after: nothing is learnt at a rate that is next to zero.
    still = config.replace(max_train_steps=6, learning_rate=1e-30, adam_weight_decay=0, seed=1)
    before = train(pipe, factors, still).losses
    train(pipe, factors, config)
    after = train(pipe, factors, still).losses
    assert sum(after) < 0.9 * sum(before)
    assert all(late < early for late, early in zip(after, before, strict=True))


@FAMILIES
def test_only_the_parameters_given_change(build):
    pipe, factors = adapted(build)
    before, started = copies(weights(pipe)), copies(factors)
    train(pipe, factors)
    after = weights(pipe)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".krona_" in name for name in changed)
    # What the last block of SD3's transformer asks about the text, nothing listens to.
    still = {name for name in factors if torch.equal(started[name], factors[name])}
    assert all("transformer_blocks.1.attn.add_q_proj.krona_B" in name for name in still)


@PIPELINES
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equal_seeds_give_equal_factors_bit_for_bit(build, dropout):
    runs = []
    for noise, seed in ((1, 0), (2, 0), (3, 1)):
        pipe, factors = adapted(build, dropout=dropout)
        torch.manual_seed(noise)
        losses = train(pipe, factors, QUICK.replace(seed=seed, random_flip=True)).losses
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
        QUICK.replace(train_text_encoder=True),
        on_step=lambda _: modes.append(pipe.text_encoder.training),
    )
    assert modes == [True, True]
    assert not pipe.text_encoder.training
    encoders = {name for name in factors if name.startswith("text_encoder")}
    learnt = {name for name in encoders if not torch.equal(started[name], factors[name])}
    # The UNet of SDXL does not listen to the first encoder's last layer.
    assert learnt == encoders if build is tiny_sd_pipeline else len(learnt) > len(encoders) / 2
    assert result.parameters == sum(factor.numel() for factor in factors.values())


@pytest.mark.parametrize(
    ("build", "chosen"),
    [(tiny_sdxl_pipeline, ["text_encoder_2"]), (tiny_sd3_pipeline, ["text_encoder", "text_encoder_3"])],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_only_the_text_encoders_that_are_named_learn(build, chosen, recompute):
    config = QUICK.replace(
        train_text_encoder=True, text_encoders_to_train=chosen, gradient_checkpointing=recompute, seed=1
    )
    pipe, factors = adapted(build, text_encoders=config.adapted_encoders)
    frozen = [f"text_encoder{end}" for end in ("", "_2", "_3") if f"text_encoder{end}" not in chosen]
    before, started = copies(weights(pipe)), copies(factors)
    modes = []

    def look(_):
        for part in (*chosen, *frozen):
            encoder = getattr(pipe, part, None)
            modes.append((part, getattr(encoder, "training", None)))

    train(pipe, factors, config, on_step=look)
    assert {part for part, mode in modes if mode} == set(chosen)
    learnt = {name.partition(".")[0] for name in factors if not torch.equal(started[name], factors[name])}
    assert learnt == {*chosen, "unet" if build is tiny_sdxl_pipeline else "transformer"}
    after = weights(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before if name.partition(".")[0] in frozen)


def test_a_text_encoder_that_the_pipeline_does_not_have_is_refused_with_those_that_it_has():
    pipe, factors = adapted(tiny_sdxl_pipeline)
    config = QUICK.replace(train_text_encoder=True, text_encoders_to_train=["text_encoder_3", "text_encoder"])
    with pytest.raises(TrainingConfigError, match=r"names text_encoder_3, .* are text_encoder, text_encoder_2\.$"):
        train(pipe, factors, config)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_half_precision_base_trains_with_float32_factors(precision):
    pipe, factors = adapted(lambda: tiny_sdxl_pipeline().to(torch.bfloat16))
    started = copies(factors)
    result = train(pipe, factors, QUICK.replace(mixed_precision=precision))
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
        train(pipe, factors, QUICK.replace(max_train_steps=1, mixed_precision=precision))
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def gradients(config):
    """The gradients of each forward pass, as they stand after it, of one factor."""
    pipe, factors = adapted()
    factor, seen = next(factor for name, factor in factors.items() if "krona_B" in name), []
    factor.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    result = train(pipe, factors, config)
    return seen, result.losses


def test_accumulated_gradients_and_losses_are_the_mean_over_the_batches():
    still = TrainingConfig(max_train_steps=2, learning_rate=1e-30, adam_weight_decay=0, max_grad_norm=0)
    (first, second), losses = gradients(still)
    (_, accumulated), (loss,) = gradients(still.replace(max_train_steps=1, gradient_accumulation_steps=2))
    torch.testing.assert_close(accumulated, (first + second) / 2, rtol=1e-4, atol=1e-9)
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.parametrize("limit", [0, 1e-4])
def test_long_gradients_are_shortened(limit):
    pipe, factors = adapted()
    norms = []
    hook = register_optimizer_step_pre_hook(
        lambda *_: norms.append(float(torch.cat([f.grad.flatten() for f in factors.values()]).norm()))
    )
    train(pipe, factors, QUICK.replace(max_grad_norm=limit))
    hook.remove()
    assert len(norms) == 2
    assert all(norm == pytest.approx(limit, rel=1e-2) if limit else norm > 1e-3 for norm in norms)


def test_every_image_is_used_equally_often():
    pipe, factors = adapted()
    drawn = []
    images = examples(3, ["toy 0", "toy 1", "toy 2"])
    prompts = pipe.encode_prompt([image.prompt for image in images], "cpu", 1, False)[0]
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: drawn.extend(
            int((prompts - hidden).abs().sum(dim=(1, 2)).argmin()) for hidden in kwargs["encoder_hidden_states"]
        ),
        with_kwargs=True,
    )
    train(pipe, factors, QUICK.replace(max_train_steps=3, train_batch_size=4), images=images)
    assert sorted(drawn) == [0] * 4 + [1] * 4 + [2] * 4
    assert drawn != sorted(drawn)


def test_each_step_is_reported():
    pipe, factors = adapted()
    steps = []
    result = train(
        pipe,
        factors,
        QUICK.replace(max_train_steps=4, lr_scheduler="linear", lr_warmup_steps=1, learning_rate=3e-3),
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
    with pytest.raises(
        TrainingDivergedError, match=r"loss became nan at step 1 of 2, on image [12].*Nothing was saved.*0\.01"
    ):
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


def test_guidance_is_not_dropped_in_silence_where_a_base_cannot_be_told_of_it():
    pipe, factors = adapted(**SMALL)
    with pytest.raises(TrainingConfigError, match=r"guidance_scale is told to bases .* UNet2DConditionModel was not"):
        train(pipe, factors, QUICK.replace(guidance_scale=3.5))


def test_fp16_on_a_cpu_is_refused_and_later_runs_are_not_affected(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    pipe, factors = adapted()
    with pytest.raises(TrainingConfigError, match="mixed_precision='fp16' needs a GPU"):
        train(pipe, factors, QUICK.replace(mixed_precision="fp16"))
    train(pipe, factors, QUICK.replace(max_train_steps=1))


def test_nothing_to_train_is_an_error():
    with pytest.raises(TrainingConfigError, match="nothing to train"):
        fit(tiny_sd_pipeline(), examples(), {}, QUICK)


def test_another_kind_of_pipeline_is_an_error():
    pipe, factors = adapted()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UnsupportedPipelineError):
        train(pipe, factors)


def test_a_cache_on_disk_without_a_folder_is_an_error():
    pipe, factors = adapted()
    with pytest.raises(TrainingConfigError, match="'disk' needs a folder"):
        train(pipe, factors, QUICK.replace(cache="disk"))


@FAMILIES
def test_cached_in_memory_on_disk_or_not_at_all_the_factors_are_the_same_bits(build, tmp_path):
    runs = {
        keep: trained(QUICK.replace(cache=keep, random_flip=True), build, folder=tmp_path)
        for keep in ("memory", "disk", "none")
    }
    assert (tmp_path / "cache").is_dir()
    for factors, losses in runs.values():
        assert losses == runs["memory"][1]
        assert same(factors, runs["memory"][0])


def test_images_of_several_sizes_are_trained_on_each_in_batches_of_its_own():
    pipe, factors = adapted(tiny_sdxl_pipeline, **SMALL)
    plan = PLAN.replace(aspect_ratio_buckets=True, multiple=4)
    images = prepare_images([*pictures(2, (60, 40)), *pictures(2, (40, 40)), *pictures(1, (30, 80))], "a toy", plan)
    shapes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[2:])))
    train(pipe, factors, QUICK.replace(max_train_steps=5), images=images)
    sizes = [image.image.size[::-1] for image in images]
    assert len(set(sizes)) == 3
    assert sorted(shapes) == sorted((height // 4, width // 4) for height, width in sizes)


# Learning rates, averages, class images


def test_the_text_encoders_own_learning_rate_is_used():
    config = TrainingConfig(
        max_train_steps=1, learning_rate=1e-2, text_encoder_lr=1e-4, train_text_encoder=True, adam_weight_decay=0
    )
    pipe, factors = adapted(text_encoders=True)
    started = copies(factors)
    train(pipe, factors, config)
    # The first step of Adam is of the learning rate's length for each number that has a gradient, which B's have.
    for name, factor in factors.items():
        rate = 1e-4 if name.startswith("text_encoder") else 1e-2
        moved = (factor.detach() - started[name]).abs().max()
        assert float(moved) == pytest.approx(rate if "krona_B" in name else 0, rel=0.01)


@pytest.mark.parametrize("decay", [0.05, 0.9])
def test_the_factors_end_as_their_exponential_moving_averages(decay):
    pipe, factors = adapted(**SMALL)
    each = [copies(factors)]
    config = QUICK.replace(max_train_steps=4, ema_decay=decay)
    train(pipe, factors, config, on_step=lambda _: each.append(copies(factors)))
    for name, found in factors.items():
        average = each[0][name].double()
        for step, now in enumerate(each[1:]):
            # Early steps count for more, or the start would stay in the average for long.
            keep = min(decay, (1 + step) / (10 + step)) if step else 0.0
            average = keep * average + (1 - keep) * now[name]
        torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=1e-7)
    assert not same(factors, each[-1])


def test_averages_do_not_change_what_is_learnt():
    assert trained(QUICK.replace(ema_decay=0.9))[1] == trained()[1]


def test_the_loss_with_class_images_is_the_weighted_sum():
    still = QUICK.replace(max_train_steps=3, learning_rate=1e-30, adam_weight_decay=0)
    others = examples(3, "a toy", seed=1)

    def losses(weight):
        return np.array(trained(still.replace(prior_loss_weight=weight), class_images=others)[1])

    subject = np.array(trained(still)[1])
    assert (losses(0) == subject).all()
    classes = losses(1) - subject
    assert (classes > 0.1).all()
    np.testing.assert_allclose(losses(2.5), subject + 2.5 * classes, rtol=1e-5)


def test_class_images_of_no_weight_are_none():
    config = QUICK.replace(prior_loss_weight=0, random_flip=True)
    some = trained(config, dropout=0.3, class_images=examples(3, "a toy", seed=1))
    none = trained(config, dropout=0.3)
    assert some[1] == none[1]
    assert same(some[0], none[0])


def test_class_images_change_what_is_learnt_and_are_not_counted_as_the_subjects():
    pipe, factors = adapted(**SMALL)
    result = train(pipe, factors, class_images=examples(3, "a toy", seed=1))
    assert result.images == 2
    assert not same(copies(factors), trained()[0])


# Memory


@PIPELINES
def test_recomputing_activations_changes_no_bit_and_is_over_afterwards(build):
    runs = []
    for recompute in (False, True):
        pipe, factors = adapted(build, text_encoders=True, dropout=0.3)
        count = []
        pipe.unet.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_, count=count: count.append(1))
        config = QUICK.replace(train_text_encoder=True, gradient_checkpointing=recompute)
        losses = train(pipe, factors, config).losses
        runs.append((losses, copies(factors), len(count)))
        assert not pipe.unet.is_gradient_checkpointing
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert (runs[0][2], runs[1][2]) == (2, 4)


@OPTIMIZERS
def test_each_optimizer_learns(optimizer):
    need(optimizer)
    rate = {"prodigy": 1.0, "SGD": 100.0}.get(optimizer, 2e-2)
    still = TrainingConfig(max_train_steps=4, learning_rate=1e-30, adam_weight_decay=0, seed=1, train_batch_size=4)
    pipe, factors = adapted()
    before = train(pipe, factors, still).losses
    config = TrainingConfig(max_train_steps=30, learning_rate=rate, train_batch_size=4, optimizer=optimizer)
    train(pipe, factors, config)
    assert sum(train(pipe, factors, still).losses) < 0.97 * sum(before)


# Numbers that are not finite


def spoilt(pipe, steps):
    """Let the denoiser's answer be no number in these steps, from 1."""
    count = []

    def spoil(module, args, output):
        count.append(1)
        return output * torch.nan if len(count) in steps else output

    pipe.unet.conv_out.register_forward_hook(spoil)


def test_the_error_names_the_step_the_images_and_the_last_checkpoint(tmp_path):
    pipe, factors = adapted(**SMALL)
    spoilt(pipe, {4})
    config = TrainingConfig(max_train_steps=5, checkpointing_steps=2)
    with pytest.raises(
        TrainingDivergedError, match=r"nan at step 4 of 5, on image [12]\. .*step-00000002\.safetensors"
    ):
        train(pipe, factors, config, folder=tmp_path)


def test_the_error_names_all_images_of_a_step_of_several_batches_once_each():
    pipe, factors = adapted(**SMALL)
    spoilt(pipe, {2})
    config = TrainingConfig(max_train_steps=1, gradient_accumulation_steps=3)
    others = [replace(image, source="image 3") for image in examples(1)]
    with pytest.raises(TrainingDivergedError, match=r", on image \d, image \d, image \d\. Nothing") as error:
        train(pipe, factors, config, class_images=others)
    assert set(re.findall(r"image \d", str(error.value))) == {"image 1", "image 2", "image 3"}


def test_a_gradient_that_is_not_a_number_stops_the_run_before_it_is_used():
    pipe, factors = adapted(**SMALL)
    started = copies(factors)
    next(iter(factors.values())).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingDivergedError, match="A gradient is not a finite number at step 1 of 2"):
        train(pipe, factors)
    assert same(started, factors)


@OPTIMIZERS
@pytest.mark.parametrize("bad", [1, 2])
def test_such_steps_can_be_skipped(optimizer, bad):
    need(optimizer)
    pipe, factors = adapted(**SMALL)
    spoilt(pipe, {bad})
    each = [copies(factors)]
    config = TrainingConfig(max_train_steps=3, on_non_finite="skip", optimizer=optimizer)
    result = train(pipe, factors, config, lambda _: each.append(copies(factors)))
    assert [math.isfinite(loss) for loss in result.losses] == [step != bad for step in (1, 2, 3)]
    good = [loss for loss in result.losses if math.isfinite(loss)]
    assert result.final_loss == pytest.approx(sum(good) / 2)
    assert [same(before, after) for before, after in itertools.pairwise(each)] == [step == bad for step in (1, 2, 3)]
    assert all(factor.isfinite().all() for factor in factors.values())


def test_a_run_that_skips_too_many_in_a_row_stops(monkeypatch):
    monkeypatch.setattr("diffusekrona.training.run_state.MOST_SKIPPED", 3)
    pipe, factors = adapted(**SMALL)
    spoilt(pipe, {1, 2, 4, 5, 6})
    reported = []
    config = TrainingConfig(max_train_steps=9, on_non_finite="skip")
    with pytest.raises(TrainingDivergedError, match="nan at step 6 of 9 and in the 2 before"):
        train(pipe, factors, config, reported.append)
    assert len(reported) == 5
