"""FSDP by accelerate's settings: two processes hold half of the frozen weights each and do what one does."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diffusekrona.training import TrainingConfig, TrainingConfigError, TrainingInterrupted, train_dreambooth
from diffusekrona.training.runtime import accelerator_for, sharding_of
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline
from tests.training.processes import both
from tests.training.runs import SMALL, adapted, all_close, copies, examples, same, train, trained, weights
from tests.training.test_processes import press_ctrl_c

CONFIG = TrainingConfig(max_train_steps=3, learning_rate=1e-2, gradient_accumulation_steps=2)
BLOCKS = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
OLD = {
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "5000",
    "FSDP_OFFLOAD_PARAMS": "true",
}
ZERO_3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
ALL_AT_ONCE = {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
RUNS = {
    "by blocks": (BLOCKS, CONFIG, tiny_sd_pipeline),
    "recomputing activations": (BLOCKS, CONFIG.replace(gradient_checkpointing=True), tiny_sd3_pipeline),
    "all at once, with text encoders": (ALL_AT_ONCE, CONFIG.replace(train_text_encoder=True), tiny_sd_pipeline),
    "version 1, by size, offloaded": (OLD, CONFIG, tiny_sd_pipeline),
    "as DeepSpeed's ZeRO 3": (ZERO_3, CONFIG, tiny_sd_pipeline),
    "in half precision": (BLOCKS, CONFIG.replace(mixed_precision="bf16"), tiny_sd_pipeline),
}


def with_fsdp(settings):
    """As accelerate's launcher passes them on."""
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        del os.environ[name]
    os.environ |= {"ACCELERATE_USE_FSDP": str(settings is not ZERO_3).lower(), **settings}


def bytes_held(*models):
    """Of frozen weights, in this process."""
    frozen = [weight for model in models for weight in model.parameters() if not weight.requires_grad]
    here = [getattr(weight, "_local_tensor", weight).untyped_storage() for weight in frozen]
    return sum({storage.data_ptr(): storage.nbytes() for storage in here}.values())


def one_run(settings, config, build):
    """Its factors and losses, the share of weights that was held, and whether the pipeline was whole afterwards."""
    with_fsdp(settings)
    pipe, factors = adapted(build, text_encoders=config.train_text_encoder, **SMALL)
    part = "unet" if build is tiny_sd_pipeline else "transformer"
    model, all_of_it = getattr(pipe, part), bytes_held(getattr(pipe, part))
    before, kind, held = copies(weights(pipe)), dict(pipe.config)[part], []

    def look(done):
        stand_in = getattr(pipe, part)
        assert isinstance(stand_in, FSDPModule)
        held.append(bytes_held(model, stand_in) / all_of_it)

    losses = train(pipe, factors, config, look, images=examples(3)).losses
    after = {name: tensor for name, tensor in weights(pipe).items() if "krona_" not in name}
    whole = same(after, {name: before[name] for name in after}) and getattr(pipe, part) is model
    return copies(factors) | {
        "losses": torch.tensor(losses),
        "held": torch.tensor(held),
        "whole": torch.tensor(whole and dict(pipe.config)[part] == kind),
    }


def all_runs(rank, folder):
    return {f"{name}/{key}": tensor for name, run in RUNS.items() for key, tensor in one_run(*run).items()}


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    first, second = both(all_runs, tmp_path_factory.mktemp("sharded"))
    assert same(first, second)
    return first


@pytest.mark.parametrize("name", RUNS)
def test_factors_are_those_of_one_process_and_each_holds_half_of_the_weights(name, of_both):
    found = {key.removeprefix(f"{name}/"): tensor for key, tensor in of_both.items() if key.startswith(f"{name}/")}
    assert bool(found.pop("whole"))
    held = found.pop("held")
    assert len(held) == CONFIG.max_train_steps
    assert 0.49 < held.min() <= held.max() < 0.52
    _, config, build = RUNS[name]
    one, losses = trained(config.replace(train_batch_size=2), build, images=examples(3))
    if config.mixed_precision == "bf16":  # the first factors to be changed by rounding turn the others
        torch.testing.assert_close(found["losses"], torch.tensor(losses), rtol=2e-2, atol=1e-2)
    else:
        all_close(found, {**one, "losses": torch.tensor(losses)}, rtol=1e-2, atol=1e-4)


def stopped_and_resumed(rank, folder):
    with_fsdp(BLOCKS)
    config = CONFIG.replace(checkpointing_steps=1)
    pipe, factors = adapted(**SMALL)
    before = bytes_held(pipe.unet)
    with pytest.raises(TrainingInterrupted):
        train(pipe, factors, config, press_ctrl_c if rank else None, images=examples(3), folder=folder / "run")
    assert bytes_held(pipe.unet) == before
    factors, losses = trained(config, images=examples(3), folder=folder / "run", resume=True)
    assert len(load_file(folder / "run" / "checkpoints" / "step-00000003.safetensors")["losses"]) == 3
    return {**factors, "losses": torch.tensor(losses)}


def test_it_is_stopped_and_goes_on_as_if_it_had_not_been(tmp_path, of_both):
    first, second = both(stopped_and_resumed, tmp_path)
    assert same(first, second)
    assert same(first, {key: of_both[f"by blocks/{key}"] for key in first})


def failing_alone(rank, folder):
    """An error of one process, which cannot wait for the other one's weights."""
    with_fsdp(BLOCKS)
    pipe = tiny_sd_pipeline()
    unet = pipe.unet

    def fail(done):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train_dreambooth(pipe, examples(3), "a toy", CONFIG, on_step=fail)
    assert pipe.unet is unet
    return {"weights": torch.tensor(sum(weight.numel() for weight in unet.parameters()))}


def test_a_process_that_fails_by_itself_waits_for_nobody(tmp_path):
    assert [int(found["weights"]) for found in both(failing_alone, tmp_path)] == [0, 0]


def refused(rank, folder):
    asked = {
        "HYBRID_SHARD is not possible": {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
        "set that, and fsdp_activation_checkpointing: false": {**BLOCKS, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
    }
    for message, settings in asked.items():
        with_fsdp(settings)
        with pytest.raises(TrainingConfigError, match=message):
            trained()
    with_fsdp(BLOCKS)
    pipe, factors = adapted(**SMALL)
    kernel = pipe.unet.conv_in
    kernel.weight = nn.Parameter(kernel.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(TrainingConfigError, match=r"cannot split the weight conv_in\.weight.* torch\.int8"):
        train(pipe, factors)
    assert kernel.weight.numel()
    with_fsdp({"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "NO_SHARD"})
    with accelerator_for("no") as accelerator:
        assert sharding_of(accelerator.state) is None
    return {"done": torch.ones(())}


def test_what_cannot_be_split_is_refused_before_the_training(tmp_path):
    both(refused, tmp_path)
