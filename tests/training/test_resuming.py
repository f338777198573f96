"""A run that is stopped, in whatever way, and resumed gives what it would have given without."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from safetensors.torch import load_file, save_file

from diffusekrona import storage as files
from diffusekrona.training import CheckpointError, TrainingConfig, TrainingInterrupted
from tests.pipelines import tiny_sdxl_pipeline
from tests.training.processes import started
from tests.training.runs import PIPELINES, SMALL, adapted, copies, examples, need, same, train, trained

CONFIG = TrainingConfig(max_train_steps=5, learning_rate=1e-2, checkpointing_steps=2, gradient_accumulation_steps=2)
KINDS = {
    "adamw": {"random_flip": True, "noise_offset": 0.1},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "linear"},
    "came": {"optimizer": "came", "optimizer_args": {"betas": [0.8, 0.95, 0.99]}},
    "muon": {"optimizer": "muon"},
    "ema and cosine": {"ema_decay": 0.9, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
    "text encoders with dropout": {"train_text_encoder": True, "text_encoder_lr": 1e-3},
}


class Stop(Exception):
    pass


def stop_after(step):
    def stop(done):
        if done.step == step:
            raise Stop

    return stop


def begun(folder, config=CONFIG, step=3, **rest):
    """A run that ends by an error after a step, when its last checkpoint is some steps old."""
    with pytest.raises(Stop):
        trained(config, on_step=stop_after(step), folder=folder, **rest)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def same_run(first, second):
    return first[1] == second[1] and same(first[0], second[0])


@PIPELINES
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(build, kind, tmp_path):
    config = CONFIG.replace(**KINDS[kind])
    need(config.optimizer)
    options = {"build": build, "dropout": 0.5 if config.train_text_encoder else 0.0}
    whole = trained(config, **options)
    begun(tmp_path, config, **options)
    assert same_run(trained(config, **options, folder=tmp_path, resume=True), whole)


def test_a_run_that_trains_one_of_two_text_encoders_is_resumed_bit_for_bit_and_not_with_the_other(tmp_path):
    config = CONFIG.replace(train_text_encoder=True, text_encoders_to_train=["text_encoder_2"], text_encoder_2_lr=1e-3)
    options = {"build": tiny_sdxl_pipeline, "dropout": 0.5}
    whole = trained(config, **options)
    assert {name.partition(".")[0] for name in whole[0]} == {"unet", "text_encoder_2"}
    begun(tmp_path, config, **options)
    assert same_run(trained(config, **options, folder=tmp_path, resume=True), whole)
    other = config.replace(text_encoders_to_train=["text_encoder"], text_encoder_2_lr=None)
    with pytest.raises(CheckpointError, match=r"text_encoders_to_train was \['text_encoder_2'\] and is"):
        trained(other, **options, folder=tmp_path, resume=True)


def test_a_run_with_class_images_and_a_cache_on_disk_is_resumed_bit_for_bit(tmp_path):
    config = CONFIG.replace(cache="disk", train_batch_size=3)
    options = {"class_images": examples(3, "a toy", seed=1)}
    whole = trained(config.replace(cache="memory"), **options)
    begun(tmp_path, config, **options)
    assert same_run(trained(config, folder=tmp_path, resume=True, **options), whole)


def test_a_finished_run_can_be_made_longer(tmp_path):
    longer = CONFIG.replace(max_train_steps=8)
    trained(CONFIG, folder=tmp_path)
    assert same_run(trained(longer, folder=tmp_path, resume=True), trained(longer))


def test_a_finished_run_is_resumed_at_its_end(tmp_path):
    config = CONFIG.replace(ema_decay=0.9)
    done = trained(config, folder=tmp_path)
    pipe, factors = adapted(**SMALL)
    result = train(pipe, factors, config, stop_after(0), folder=tmp_path, resume=True)
    assert (result.resumed_at, result.steps) == (5, 5)
    assert same(factors, done[0])


def test_the_result_says_where_it_went_on_and_has_all_losses(tmp_path):
    begun(tmp_path)
    pipe, factors = adapted(**SMALL)
    reported = []
    result = train(pipe, factors, CONFIG, reported.append, folder=tmp_path, resume=True)
    assert result.resumed_at == 2
    assert result.losses == trained(CONFIG)[1]
    assert [step.step for step in reported] == [3, 4, 5]
    assert all(step.images_per_second > 0 for step in reported)


def test_checkpoints_are_saved_every_so_many_steps_and_at_the_end_and_the_newest_are_kept(tmp_path):
    seen = []
    trained(CONFIG.replace(checkpoints_total_limit=2), on_step=lambda _: seen.append(count(tmp_path)), folder=tmp_path)
    assert seen == [0, 1, 1, 2, 2]
    assert checkpoints(tmp_path) == ["step-00000004.safetensors", "step-00000005.safetensors"]


def count(folder):
    return len(list((folder / "checkpoints").glob("*")))


def test_without_a_folder_or_a_checkpoint_there_is_nothing_to_resume_from(tmp_path):
    whole = trained(CONFIG)
    assert same_run(trained(CONFIG, resume=True), whole)
    assert same_run(trained(CONFIG, folder=tmp_path, resume=True), whole)


def test_a_run_begun_anew_in_the_same_folder_is_not_confused_with_the_one_before(tmp_path):
    trained(CONFIG, folder=tmp_path)
    other = CONFIG.replace(seed=1, checkpoints_total_limit=1)
    begun(tmp_path, other)
    assert checkpoints(tmp_path) == ["step-00000002.safetensors"]
    assert same_run(trained(other, folder=tmp_path, resume=True), trained(other))


@pytest.mark.parametrize("limit", [1, 2])
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_is_the_same(tmp_path, limit, caplog):
    trained(CONFIG, folder=tmp_path)
    (tmp_path / "checkpoints" / "step-00000005.safetensors").write_bytes(b"damaged")
    config = CONFIG.replace(checkpoints_total_limit=limit)
    assert same_run(trained(config, folder=tmp_path, resume=True), trained(CONFIG))
    assert "step-00000005.safetensors is no checkpoint of a run, or a damaged one" in caplog.text
    assert "step-00000005.safetensors" in checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate was 0\.01 and is 0\.001"),
        ({"seed": 1, "snr_gamma": 5.0}, "seed was 0 and is 1; snr_gamma was None and is 5"),
        ({"optimizer": "prodigy"}, "optimizer was 'adamw' and is 'prodigy'"),
        ({"max_train_steps": 1}, "it has done 2 steps, more than max_train_steps"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, said):
    need(change.get("optimizer", "adamw"))
    begun(tmp_path)
    before = checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=f"is of another run: {said}"):
        trained(CONFIG.replace(**change), folder=tmp_path, resume=True)
    assert checkpoints(tmp_path) == before


def test_settings_that_change_nothing_that_is_learnt_may_be_others(tmp_path):
    begun(tmp_path)
    others = {"cache": "none", "gradient_checkpointing": True, "checkpointing_steps": 1, "on_non_finite": "skip"}
    assert same_run(trained(CONFIG.replace(**others), folder=tmp_path, resume=True), trained(CONFIG))


@pytest.mark.parametrize(
    "images", [examples(3), examples(2, seed=1), examples(2, "a sks cup"), [examples(2)[1], examples(2)[0]]]
)
def test_other_images_are_refused(tmp_path, images):
    begun(tmp_path)
    with pytest.raises(CheckpointError, match="the images or their prompts are others"):
        trained(CONFIG, folder=tmp_path, resume=True, images=images)


def test_class_images_that_were_not_there_are_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(CheckpointError, match="the images or their prompts are others"):
        trained(CONFIG, folder=tmp_path, resume=True, class_images=examples(1))


@pytest.mark.parametrize("options", [{"target_modules": ["to_k"]}, {**SMALL, "a1": 2}])
def test_other_parameters_are_refused_and_left_alone(tmp_path, options):
    begun(tmp_path)
    pipe, factors = adapted(**options)
    started = copies(factors)
    with pytest.raises(CheckpointError, match="other parameters are trained"):
        train(pipe, factors, CONFIG, folder=tmp_path, resume=True)
    assert same(factors, started)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    def fill(done):
        if done.step == 3:
            monkeypatch.setattr(files.os, "fsync", no_room)

    def no_room(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 4 could not be written .*No space.*step-00000002"):
        trained(CONFIG, on_step=fill, folder=tmp_path)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == ["step-00000002.safetensors"]
    assert same_run(trained(CONFIG, folder=tmp_path, resume=True), trained(CONFIG))


# Ctrl-C


def interrupt_at(*steps):
    """Press Ctrl-C while these steps are reported."""

    def press(done):
        if done.step in steps:
            signal.raise_signal(signal.SIGINT)

    return press


def test_ctrl_c_saves_after_the_next_step_and_the_run_can_go_on_bit_for_bit(tmp_path):
    config = CONFIG.replace(checkpointing_steps=100, ema_decay=0.9)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="Stopped after step 3") as stopped:
        trained(config, on_step=interrupt_at(2), folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.value.step == 3
    assert stopped.value.checkpoint == tmp_path / "checkpoints" / "step-00000003.safetensors"
    assert stopped.value.checkpoint.is_file()
    assert same_run(trained(config, folder=tmp_path, resume=True), trained(config))


def test_ctrl_c_without_a_folder_stops_without_a_checkpoint():
    with pytest.raises(TrainingInterrupted) as stopped:
        trained(CONFIG, on_step=interrupt_at(1))
    assert (stopped.value.step, stopped.value.checkpoint) == (2, None)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def press_twice(done):
        interrupt_at(1)(done)
        interrupt_at(1)(done)
        raise AssertionError("not at once")

    with pytest.raises(KeyboardInterrupt) as stopped:
        trained(CONFIG, on_step=press_twice, folder=tmp_path)
    assert not isinstance(stopped.value, TrainingInterrupted)
    assert not (tmp_path / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_last_step_is_too_late_to_stop_it(tmp_path):
    assert same_run(trained(CONFIG, on_step=interrupt_at(4), folder=tmp_path), trained(CONFIG))


def test_a_run_in_another_thread_leaves_ctrl_c_alone():
    handlers, runs = [], []
    note = threading.Thread(
        target=lambda: runs.append(trained(CONFIG, on_step=lambda _: handlers.append(signal.getsignal(signal.SIGINT))))
    )
    note.start()
    note.join()
    assert set(handlers) == {signal.getsignal(signal.SIGINT)}
    assert same_run(runs[0], trained(CONFIG))


# Killed


ENDLESS = TrainingConfig(max_train_steps=40, learning_rate=1e-2, checkpointing_steps=1, ema_decay=0.9, random_flip=True)


def train_to_the_end(folder):
    """What each process does."""
    factors, _ = trained(ENDLESS, dropout=0.2, folder=folder, resume=True)
    save_file(factors, folder / "factors.safetensors")


def unfinished(folder):
    """Files that are being written."""
    return list((folder / "checkpoints").glob(".*.tmp"))


def kill_within_a_save(process, folder):
    """Freeze the process until it is caught with a file that is not whole, and kill it there."""
    known = set(unfinished(folder))
    while process.exitcode is None:
        if set(unfinished(folder)) - known:
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.05)  # until the signal has reached it
            if set(unfinished(folder)) - known:
                break
            os.kill(process.pid, signal.SIGCONT)
    process.kill()


def kill_after(process, folder, steps):
    """Kill a process when it has done some more steps, wherever it is by then."""
    begun = newest(folder)
    while process.exitcode is None and newest(folder) < begun + steps:
        pass
    process.kill()


def newest(folder):
    return max((int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be frozen here")
def test_a_run_that_is_killed_again_and_again_gives_the_same_factors(tmp_path):
    for kills in range(5):
        process = started(train_to_the_end, tmp_path)
        if kills % 2:
            kill_after(process, tmp_path, 2 + kills)
        else:
            kill_within_a_save(process, tmp_path)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert kills % 2 or unfinished(tmp_path)
    assert 0 < newest(tmp_path) < ENDLESS.max_train_steps
    process = started(train_to_the_end, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert not unfinished(tmp_path)
    assert same(load_file(tmp_path / "factors.safetensors"), trained(ENDLESS, dropout=0.2)[0])
