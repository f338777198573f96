"""Two processes, started as accelerate starts them, do together what one does with the batch of both."""

from __future__ import annotations

import signal

import pytest
import torch

from diffusekrona.training import CheckpointError, TrainingConfig, TrainingInterrupted
from tests.training.processes import both
from tests.training.runs import all_close, examples, same, trained

CONFIG = TrainingConfig(max_train_steps=4, learning_rate=1e-2, checkpointing_steps=2, gradient_accumulation_steps=2)
KINDS = {
    "subject": CONFIG,
    "class": CONFIG.replace(random_flip=True, train_batch_size=2),
    "text encoders": CONFIG.replace(train_text_encoder=True),
}


def run(kind, config, **rest):
    """Three images, by which batches are not divided; one kind of run has class images, too."""
    others = examples(3, "a toy", seed=1) if kind == "class" else ()
    factors, losses = trained(config, images=examples(3), class_images=others, **rest)
    return {**factors, "losses": torch.tensor(losses)}


def subject(rank, folder):
    return run("subject", KINDS["subject"], folder=folder / f"run {rank}")


def class_images(rank, folder):
    return run("class", KINDS["class"], folder=folder / f"run {rank}")


def text_encoders(rank, folder):
    return run("text encoders", KINDS["text encoders"], folder=folder / f"run {rank}")


WORK = {"subject": subject, "class": class_images, "text encoders": text_encoders}


@pytest.mark.parametrize("kind", KINDS)
def test_factors_and_losses_are_those_of_one_process_and_only_the_first_of_two_writes(kind, tmp_path):
    first, second = both(WORK[kind], tmp_path)
    assert same(first, second)
    config = KINDS[kind]
    one = run(kind, config.replace(train_batch_size=2 * config.train_batch_size))
    all_close(first, one, rtol=1e-2, atol=1e-4)
    half = run(kind, config)
    assert max(float((first[name] - half[name]).abs().max()) for name in half) > 1e-3
    assert len(list((tmp_path / "run 0" / "checkpoints").iterdir())) == 2
    assert not (tmp_path / "run 1" / "checkpoints").exists()


def press_ctrl_c(done):
    if done.step == 1:
        signal.raise_signal(signal.SIGINT)


def stopped_and_resumed(rank, folder):
    """Ctrl-C reaches the second process and no other."""
    with pytest.raises(TrainingInterrupted) as stopped:
        run("subject", CONFIG, on_step=press_ctrl_c if rank else None, folder=folder)
    assert stopped.value.step == 2
    assert stopped.value.checkpoint == folder / "checkpoints" / "step-00000002.safetensors"
    return run("subject", CONFIG, folder=folder, resume=True)


def test_ctrl_c_in_one_process_stops_both_at_the_same_step_and_they_go_on_as_if_it_had_not(tmp_path):
    first, second = both(stopped_and_resumed, tmp_path)
    assert same(first, second)
    all_close(first, run("subject", CONFIG.replace(train_batch_size=2)), rtol=1e-2, atol=1e-4)
    with pytest.raises(CheckpointError, match="there were 2 processes"):
        run("subject", CONFIG, folder=tmp_path, resume=True)
