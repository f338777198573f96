"""Many subjects on one tiny base, each as it is alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffusekrona.cli import app
from diffusekrona.errors import KronAError, TrainingInterrupted
from diffusekrona.training import TrainingConfigError
from diffusekrona.training.checkpoints import Checkpoints
from diffusekrona.training.many import Ended, check_all, train_many, write_summary
from diffusekrona.training.run import base_of, run
from diffusekrona.training.subjects import Subject, find_subjects
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import SMALL

COLOURS = {"bird": "red", "cat": "green", "dog": "blue"}
BASES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline, "sd3": tiny_sd3_pipeline}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        if not (folder / name).exists():
            BASES[name]().save_pretrained(folder / name)
        return folder / name

    return base


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        folder = tmp_path / "subjects" / name
        folder.mkdir(parents=True)
        for number in range(2):
            picture = Image.new("RGB", (40, 30), colour)
            picture.putpixel((number, 0), (255, 255, 255))
            picture.save(folder / f"{number}.png")
    return tmp_path / "subjects"


def shared(base: Path, **values: Any) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(base),
        "instance_prompt": "a sks {name}",
        "a1": 4,
        "a2": 8,
        "max_train_steps": 3,
        "optimizer": "SGD",
        "learning_rate": 1.0,
        "checkpointing_steps": 1,
        **SMALL,
        **values,
    }


def own(pictures: Path, name: str, **values: Any) -> None:
    (pictures / name / "settings.yaml").write_text(json.dumps(values), encoding="utf-8")


def tensors(output: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(output / name / f"{name}.safetensors")


def assert_as_alone(subjects: list[Subject], output: Path, folder: Path, names: list[str] | None = None) -> None:
    """Each adapter is what `run` makes of the same settings in another folder, and has learnt something."""
    for subject in subjects:
        if names is None or subject.name in names:
            alone = subject.settings.output.replace(output_dir=folder / subject.name, resume=False)
            run(subject.settings.replace(output=alone))
            together, by_itself = tensors(output, subject.name), tensors(folder, subject.name)
            assert together.keys() == by_itself.keys()
            assert any(tensor.abs().max() > 0 for key, tensor in together.items() if "krona_B" in key)
            for key in together:
                torch.testing.assert_close(together[key], by_itself[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_each_adapter_is_what_it_is_alone(bases: Any, pictures: Path, tmp_path: Path, base: str) -> None:
    own(pictures, "cat", a1=2, a2=4, max_train_steps=2, learning_rate=0.5, seed=3)
    subjects = find_subjects(pictures, tmp_path / "out", shared(bases(base)))
    ended = train_many(subjects, at_once=2)
    assert [(one.name, one.state, one.steps) for one in ended] == [
        ("bird", "trained", 3),
        ("cat", "trained", 2),
        ("dog", "trained", 3),
    ]
    assert_as_alone(subjects, tmp_path / "out", tmp_path / "alone")


@pytest.mark.parametrize(
    "values",
    [
        {"prior_prompt": "a {name}"},
        {"gradient_accumulation_steps": 2, "train_batch_size": 2, "ema_decay": 0.5},
        {"gradient_checkpointing": True},
        {"train_text_encoder": True, "prior_prompt": "a {name}", "learning_rate": 100.0},
        {"train_text_encoder": True, "train_denoiser": False},
        # With an epsilon far above rounding errors, which AdamW would otherwise take for gradients.
        {"optimizer": "adamw", "learning_rate": 1e-3, "lr_scheduler": "cosine", "adam_epsilon": 1e-2},
        {"cache": "none", "random_flip": True},
    ],
    ids=lambda values: "-".join(values),
)
def test_so_it_is_with_what_else_a_run_can_do(bases: Any, pictures: Path, tmp_path: Path, values: Any) -> None:
    subjects = find_subjects(pictures, tmp_path / "out", shared(bases("sd"), **values))[:2]
    train_many(subjects, at_once=2)
    assert_as_alone(subjects, tmp_path / "out", tmp_path / "alone")


def test_in_bf16_they_differ_by_its_rounding_only(bases: Any, pictures: Path, tmp_path: Path) -> None:
    values = {"mixed_precision": "bf16", "dtype": "float32", "max_train_steps": 1}
    subjects = find_subjects(pictures, tmp_path / "out", shared(bases("sd"), **values))[:2]
    train_many(subjects, at_once=2)
    for subject in subjects:
        run(subject.settings.replace(output=subject.settings.output.replace(output_dir=tmp_path / subject.name)))
        together, by_itself = tensors(tmp_path / "out", subject.name), tensors(tmp_path, subject.name)
        for key, tensor in by_itself.items():
            assert (together[key] - tensor).norm() <= 0.05 * tensor.norm(), key


def test_so_it_is_beside_images_of_another_size_and_of_the_class(bases: Any, pictures: Path, tmp_path: Path) -> None:
    """The dog begins when the cat has learnt something, and its class is drawn by the base all the same."""
    own(pictures, "bird", max_train_steps=2)
    own(pictures, "cat", learning_rate=1e3)
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
    own(pictures, "dog", resolution=48, **prior)
    subjects = find_subjects(pictures, tmp_path / "out", shared(bases("sd")))
    train_many(subjects, at_once=2)
    assert_as_alone(subjects, tmp_path / "out", tmp_path / "alone", ["bird", "dog"])
    here, there = (sorted((tmp_path / place / "dog" / "run" / "class").iterdir()) for place in ("out", "alone"))
    assert [file.read_bytes() for file in here] == [file.read_bytes() for file in there]


def test_validation_is_each_subjects_own(bases: Any, pictures: Path, tmp_path: Path) -> None:
    values = {"validation_data_dir": str(pictures / "dog"), "validation_loss_steps": 1, "save_every": 2}
    values["learning_rate"] = 1e3  # so that another adapter has another loss
    subjects = find_subjects(pictures, tmp_path / "out", shared(bases("sd"), **values))[:2]
    train_many(subjects, at_once=2)
    for subject in subjects:
        alone = run(
            subject.settings.replace(output=subject.settings.output.replace(output_dir=tmp_path / subject.name))
        )
        found = Checkpoints(tmp_path / "out" / subject.name / "run" / "checkpoints", 1).newest()
        assert found is not None
        losses = {int(step): loss for step, loss in found.values["validation"].items()}
        assert losses == pytest.approx(dict(alone.result.validation_losses), rel=1e-5)
        step = f"run/steps/{subject.name}-step00000002.safetensors"
        for key, tensor in load_file(tmp_path / "out" / subject.name / step).items():
            torch.testing.assert_close(tensor, load_file(tmp_path / subject.name / step)[key], rtol=1e-3, atol=1e-5)


def test_subjects_that_go_wrong_are_set_aside_and_named(bases: Any, pictures: Path, tmp_path: Path) -> None:
    for number in range(2):
        (pictures / "bird" / f"{number}.png").write_bytes(b"no picture")
    own(pictures, "cat", learning_rate=1e30)
    seen: list[Ended] = []
    subjects = find_subjects(pictures, tmp_path / "out", shared(bases("sd")))
    ended = train_many(subjects, at_once=3, on_end=seen.append)
    bird, cat, dog = ended
    assert (bird.state, cat.state, dog.state) == ("set aside", "set aside", "trained")
    assert "0.png" in str(bird.reason)
    assert "learning rate" in str(cat.reason)
    assert bird.path is None
    assert {one.name for one in seen} == set(COLOURS)
    assert not (tmp_path / "out" / "cat" / "cat.safetensors").exists()
    assert_as_alone(subjects, tmp_path / "out", tmp_path / "alone", ["dog"])
    told = json.loads(write_summary(tmp_path / "out", ended).read_text(encoding="utf-8"))
    assert [one["state"] for one in told] == ["set aside", "set aside", "trained"]


def test_nothing_of_a_subject_stays_in_the_base(
    bases: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "bird" / "0.png").unlink()
    (pictures / "bird" / "1.png").write_bytes(b"no picture")
    own(pictures, "cat", learning_rate=1e30)
    subjects = find_subjects(pictures, tmp_path / "out", shared(bases("sd")))
    pipe = base_of(subjects[0].settings)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    monkeypatch.setattr("diffusekrona.training.many.base_of", lambda _: pipe)
    train_many(subjects, at_once=2)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(pipe.unet, "peft_config")
    assert not pipe.unet.training


class Killed(BaseException):
    """As good as a signal: nothing of ours runs after it."""


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_what_is_cut_short_goes_on_as_if_it_had_not_been(bases: Any, pictures: Path, tmp_path: Path, how: str) -> None:
    own(pictures, "bird", max_train_steps=1)
    # After Ctrl-C there are checkpoints, whenever they were due.
    values = shared(bases("sd"), ema_decay=0.5, checkpointing_steps=1 if how == "killed" else 100)

    def cut(name: str, done: Any) -> None:
        if name == "cat" and done.step == 2:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    subjects = find_subjects(pictures, tmp_path / "out", values)
    with pytest.raises(Killed if how == "killed" else TrainingInterrupted):
        train_many(subjects, at_once=2, on_step=cut)
    assert (tmp_path / "out" / "bird" / "bird.safetensors").exists()
    if how == "stopped":
        assert list((tmp_path / "out" / "cat" / "run" / "steps").glob("*.safetensors"))
    again = find_subjects(pictures, tmp_path / "out", {**values, "resume": True})
    steps: list[tuple[str, int]] = []
    ended = train_many(again, at_once=2, on_step=lambda name, done: steps.append((name, done.step)))
    assert [(one.name, one.state) for one in ended] == [("bird", "earlier"), ("cat", "trained"), ("dog", "trained")]
    assert ("cat", 3) in steps
    assert ("cat", 1) not in steps
    assert all(name != "bird" for name, _ in steps)
    assert_as_alone(subjects, tmp_path / "out", tmp_path / "alone")


def test_a_subject_that_was_finished_with_other_settings_is_not_taken_for_this_one(
    bases: Any, pictures: Path, tmp_path: Path
) -> None:
    train_many(find_subjects(pictures, tmp_path / "out", shared(bases("sd"))), at_once=3)
    values = shared(bases("sd"), learning_rate=0.5, resume=True)
    ended = train_many(find_subjects(pictures, tmp_path / "out", values))
    assert {one.state for one in ended} == {"set aside"}
    assert "learning_rate was 1.0 and is 0.5" in str(ended[0].reason)


def test_the_pipeline_of_a_killed_checkpoint_is_refused_by_its_subject_alone(
    bases: Any, pictures: Path, tmp_path: Path
) -> None:
    values = shared(bases("sd"))
    train_many(find_subjects(pictures, tmp_path / "out", values), at_once=3)
    (tmp_path / "out" / "cat" / "run" / "report.html").unlink()  # killed before its end
    own(pictures, "cat", learning_rate=0.5)
    ended = train_many(find_subjects(pictures, tmp_path / "out", {**values, "resume": True}))
    assert [one.state for one in ended] == ["earlier", "set aside", "earlier"]
    assert "of another run" in str(ended[1].reason)


@pytest.mark.parametrize(
    ("values", "of_cat", "said"),
    [
        ({}, {"guidance_scale": 2.0}, "guidance_scale is 2.0 for cat and 1.0 for bird"),
        ({"offload": "blocks"}, {}, "offload is not possible"),
        ({"dropout": 0.1}, {}, "dropout draws for a whole batch"),
        ({"optimizer": "no-such"}, {}, "no-such"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(
    pictures: Path, tmp_path: Path, values: Any, of_cat: Any, said: str
) -> None:
    if of_cat:
        own(pictures, "cat", **of_cat)
    subjects = find_subjects(pictures, tmp_path / "out", shared(tmp_path / "nowhere", **values))
    with pytest.raises(TrainingConfigError, match=said):
        train_many(subjects)


def test_at_once_1_may_have_dropout(pictures: Path, tmp_path: Path) -> None:
    check_all(find_subjects(pictures, tmp_path / "out", shared(tmp_path, dropout=0.1)), at_once=1)


def test_an_output_in_the_way_stops_all(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "cat").mkdir(parents=True)
    (tmp_path / "out" / "cat" / "cat.safetensors").write_bytes(b"somebody's")
    with pytest.raises(KronAError, match=r"cat\.safetensors is there already"):
        train_many(find_subjects(pictures, tmp_path / "out", shared(tmp_path / "nowhere")))


def test_no_subject_and_no_slot_are_told(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingConfigError, match="no subject"):
        train_many([])
    with pytest.raises(TrainingConfigError, match="At least one subject"):
        train_many(find_subjects(pictures, tmp_path / "out", shared(tmp_path)), at_once=0)


def test_the_command_trains_all_and_says_what_became_of_each(bases: Any, pictures: Path, tmp_path: Path) -> None:
    (pictures / "bird" / "0.png").write_bytes(b"")
    (pictures / "bird" / "1.png").write_bytes(b"")
    config = tmp_path / "shared.yaml"
    config.write_text(json.dumps(shared(bases("sd"), max_train_steps=1)), encoding="utf-8")
    command = ["train-many", str(pictures), str(tmp_path / "out"), "--config", str(config), "--seed", "5"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "bird is set aside" in result.stderr
    assert "2 trained, 1 set aside" in result.stdout
    told = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in told] == sorted(COLOURS)
    assert 'instance_prompt: "a sks cat"' in (tmp_path / "out" / "cat" / "README.md").read_text(encoding="utf-8")
    assert "seed: 5" in (tmp_path / "out" / "cat" / "run" / "settings.yaml").read_text(encoding="utf-8")
