"""Whole runs as their settings say, on a tiny base."""

import base64
import re
import shlex
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from diffusekrona import load_krona
from diffusekrona.bases.loading import load_base
from diffusekrona.cli import app
from diffusekrona.errors import AdapterFileError, KronAError
from diffusekrona.files.inspect import inspect_file
from diffusekrona.training import CheckpointError, TrainingConfigError, TrainingStep
from diffusekrona.training.export import export_checkpoint
from diffusekrona.training.reports import loss_curve
from diffusekrona.training.run import class_images, image_plan, run
from diffusekrona.training.settings import Settings, read_settings
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_sd_pipeline().save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / "images" / f"{number}.png")
    return folder


def settings(place: Path, output: Path, **values: Any) -> Settings:
    return Settings.of(
        {
            "pretrained_model_name_or_path": str(place / "base"),
            "instance_data_dir": place / "images",
            "instance_prompt": "a sks toy",
            "output_dir": output,
            "a1": 4,
            "a2": 8,
            "max_train_steps": 4,
            "learning_rate": 1e-2,
            "validation_inference_steps": 1,
            **values,
        }
    )


def factors(path: Path) -> dict[str, torch.Tensor]:
    pipe = tiny_sd_pipeline()
    load_krona(pipe, path)
    return factors_in(pipe)


def factors_in(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": factor.detach()
        for name, layer in krona_layers(pipe.unet).items()
        for key, factor in layer.parameters_of("default").items()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_comes_out_is_the_adapter_in_all_its_forms(place: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    outcome = run(settings(place, tmp_path / "toy-v1.5", also="lokr"), lambda done: seen.append(done.step))
    folder, single, lokr = outcome.saved
    assert [path.name for path in outcome.saved] == ["toy-v1.5", "toy-v1.5.safetensors", "toy-v1.5-lokr.safetensors"]
    assert outcome.page == folder / "run" / "report.html"
    assert same(factors(folder), factors(single))
    assert same(factors(folder), factors(lokr))
    assert seen == [1, 2, 3, 4]
    with safe_open(lokr, "pt") as file:
        said = file.metadata()
    assert (said["ss_steps"], said["ss_learning_rate"]) == ("4", "0.01")


def test_the_card_and_the_page_say_what_came_of_the_run(place: Path, tmp_path: Path) -> None:
    outcome = run(settings(place, tmp_path / "toy", also="lokr"))
    report, result = outcome.report, outcome.result
    card, page = (outcome.saved[0] / "README.md").read_text(), outcome.page.read_text()
    assert result.final_loss != result.losses[0]
    for name, value in {
        "parameters": f"{report.parameters:,}, {100 * report.share:.3f}% of the base's",
        "steps": f"4 on 3 images, {result.seconds:.0f} s",
        "final loss": f"{np.mean(result.losses):.4f}",
    }.items():
        assert f"| {name} | {value} |" in card
        assert f"<td>{name}</td><td>{value.replace(chr(39), '&#x27;')}</td>" in page
    assert 'instance_prompt: "a sks toy"' in card
    assert f'base_model: "{place / "base"}"' in card
    assert "StableDiffusionPipeline.from_pretrained" in card
    assert "Files: `toy.safetensors`, `toy-lokr.safetensors`." in card
    assert "<h1>a sks toy</h1>" in page
    assert "<td>learning_rate</td><td>0.01</td>" in page
    assert base64.b64encode(loss_curve(result.losses)).decode() in page


@pytest.mark.parametrize(("values", "kept"), [({}, False), ({"validation_prompt": ["a toy"]}, True)])
def test_encoders_are_kept_only_where_pictures_are_drawn(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], kept: bool
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(
        "diffusekrona.training.run.load_base", lambda *how, **more: loaded.append(load_base(*how, **more)) or loaded[0]
    )
    run(settings(place, tmp_path / "toy", max_train_steps=1, **values))
    assert [part is not None for part in (loaded[0].vae, loaded[0].text_encoder)] == [kept, kept]


def test_a_single_file_has_its_run_beside_it(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    outcome = run(settings(place, folder / "toy.safetensors", checkpointing_steps=2))
    assert outcome.saved == [folder / "toy.safetensors"]
    assert outcome.page == folder / "toy" / "run" / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["toy", "toy.safetensors"]
    assert len(list((folder / "toy" / "run" / "checkpoints").iterdir())) == 2


def test_the_settings_beside_the_result_repeat_it(place: Path, tmp_path: Path) -> None:
    first = run(settings(place, tmp_path / "one", learning_rate=3e-3, factors={"to_k": (2, 2)}, random_flip=True))
    given = read_settings(tmp_path / "one" / "run" / "settings.yaml")
    again = run(Settings.of({**given, "output_dir": tmp_path / "two"}))
    assert same(factors(first.saved[0]), factors(again.saved[0]))
    command = f"diffusekrona train --config {tmp_path / 'one' / 'run' / 'settings.yaml'}"
    assert f"<pre>{command}</pre>" in first.page.read_text()


def test_validation_draws_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    prompts = ["a sks toy on sand", "a <sks> toy"]
    plain = run(settings(place, tmp_path / "plain", dropout=0.1))
    shown = run(settings(place, tmp_path / "shown", dropout=0.1, validation_prompt=prompts, validation_steps=3))
    assert same(factors(plain.saved[0]), factors(shown.saved[0]))
    pictures = tmp_path / "shown" / "run" / "validation"
    names = {f"step-{step:08d}-{number}.png" for step in (3, 4) for number in (0, 1)} | {"sheet.png"}
    assert {path.name for path in pictures.iterdir()} == names
    early, late = (np.asarray(Image.open(pictures / f"step-0000000{step}-0.png")) for step in (3, 4))
    assert not np.array_equal(early, late)
    page = shown.page.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "a &lt;sks&gt; toy" in page
    assert plain.page.read_text().count("data:image/png;base64,") == 1


def test_tensorboard_has_every_step_also_of_a_resumed_run(place: Path, tmp_path: Path) -> None:
    first = run(settings(place, tmp_path / "toy"))
    second = run(settings(place, tmp_path / "toy", max_train_steps=6, resume=True, validation_prompt=["a toy"]))
    assert second.result.resumed_at == 4
    board = EventAccumulator(str(tmp_path / "toy" / "run" / "tensorboard")).Reload()
    events = board.Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([event.value for event in events], second.result.losses, rtol=1e-6)
    assert second.result.losses[:4] == first.result.losses
    assert board.Images("validation/0")[-1].step == 6


def test_class_images_are_trained_on(place: Path, tmp_path: Path) -> None:
    prior = {"with_prior_preservation": True, "class_prompt": "a toy", "num_class_images": 1}
    with_class, without = (
        run(settings(place, tmp_path / name, **values)) for name, values in (("a", prior), ("b", {}))
    )
    assert len(list((tmp_path / "a" / "run" / "class").glob("class-*-00000.png"))) == 1
    assert all(a > b for a, b in zip(with_class.result.losses, without.result.losses, strict=True))


def test_class_images_that_are_there_count(place: Path, tmp_path: Path) -> None:
    drawn: list[tuple[int, int]] = []
    (tmp_path / "class").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "class" / "own.jpg")
    prior = {"with_prior_preservation": True, "class_prompt": "a toy", "class_data_dir": tmp_path / "class"}
    for _ in range(2):
        run(
            settings(
                place,
                tmp_path / "toy",
                **prior,
                num_class_images=4,
                sample_batch_size=2,
                max_train_steps=1,
                overwrite=True,
            ),
            on_class_image=lambda done, count: drawn.append((done, count)),
        )
    assert drawn == [(1, 4), (3, 4), (4, 4)]
    assert (tmp_path / "class" / "own.jpg").is_file()
    assert len(list((tmp_path / "class").iterdir())) == 4
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "class").glob("*.png"))]
    assert not np.array_equal(pictures[0], pictures[1])


def test_class_images_are_drawn_and_read_as_the_settings_say(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "diffusekrona.training.run.draw_class_images",
        lambda *some, **named: asked.append((some, named)) or ["0.png", "2.png"],
    )
    prior = {"with_prior_preservation": True, "class_prompt": "a toy", "class_data_dir": place / "images"}
    chosen = settings(place, tmp_path, **prior, num_class_images=7, sample_batch_size=2, seed=5)
    plan, on_image = image_plan(chosen, 32, 4), print
    found = class_images("pipe", chosen, plan, on_image)
    ((some, named),) = asked
    assert some == ("pipe", "a toy", place / "images", 7)
    assert named == {"batch_size": 2, "seed": 5, "device": torch.device("cpu"), "on_image": on_image}
    assert [(one.prompt, Path(one.source).name) for one in found] == [("a toy", "0.png"), ("a toy", "2.png")]
    assert class_images("pipe", settings(place, tmp_path), plan, on_image) == []
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"with_prior_preservation": True}, "class_prompt"),
        ({"report_to": "wandb"}, "pip install wandb"),
        ({"validation_steps": 0}, "validation_steps must be"),
        ({"resolution": 30}, "not divisible"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_training(
    place: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingConfigError, match=message):
        run(settings(place, tmp_path / "toy", **values))
    assert not (tmp_path / "toy" / "unet").exists()


def test_a_run_is_not_replaced_by_accident(place: Path, tmp_path: Path) -> None:
    first = run(settings(place, tmp_path / "toy"))
    with pytest.raises(CheckpointError, match="up to step-00000004: go on from there"):
        run(settings(place, tmp_path / "toy", max_train_steps=2))
    second = run(settings(place, tmp_path / "toy", max_train_steps=2, overwrite=True))
    assert second.result.losses == first.result.losses[:2]
    assert not {"resume", "overwrite"} & read_settings(tmp_path / "toy" / "run" / "settings.yaml").keys()
    assert [path.stem for path in (tmp_path / "toy" / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("change", [{"alpha": 0.5}, {"dropout": 0.1}, {"factors": {"to_k": (8, 4)}}], ids=str)
def test_a_run_is_not_resumed_with_another_adapter(place: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    given = {"factors": {"to_k": (4, 8)}}
    run(settings(place, tmp_path / "toy", **given))
    with pytest.raises(CheckpointError, match="the adapter's"):
        run(settings(place, tmp_path / "toy", **{**given, **change}, resume=True))


def test_a_run_is_not_resumed_on_another_base(place: Path, tmp_path: Path) -> None:
    run(settings(place, tmp_path / "toy"))
    tiny_sd_pipeline(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"of another run: the base model was '\w{16}' and is '\w{16}'\."):
        run(settings(place, tmp_path / "toy", pretrained_model_name_or_path=str(tmp_path / "base"), resume=True))


def test_another_run_is_not_resumed(place: Path, tmp_path: Path) -> None:
    run(settings(place, tmp_path / "toy"))
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01 and is 0\.02"):
        run(settings(place, tmp_path / "toy", learning_rate=2e-2, resume=True))


def test_a_hub_that_takes_nothing_is_told_before_the_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KronAError, match=r"does not let nobody/toy be written to, so nothing was begun"):
        run(settings(place, tmp_path / "toy", push_to_hub=True, hub_model_id="nobody/toy"))
    assert not (tmp_path / "toy" / "run").exists()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """But for those of images that are small."""
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [text for text in told if not text.startswith("Smaller than")]


@pytest.mark.parametrize(
    ("broken", "values", "said"),
    [
        (
            "diffusekrona.training.run.push",
            {"push_to_hub": True, "hub_model_id": "me/toy"},
            "could not be pushed to me/toy",
        ),
        ("diffusekrona.training.run.run_page", {}, "report could not be written"),
        ("diffusekrona.training.observers.Validation.draw", {"validation_prompt": ["a toy"]}, "could not be drawn"),
        ("diffusekrona.training.observers.Trackers.step", {}, "could not be written down; the training goes on"),
        ("diffusekrona.training.observers.Trackers.close", {}, "could not be written to its end"),
    ],
    ids=["push", "page", "draw", "step", "close"],
)
def test_what_the_adapter_does_not_need_never_costs_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, broken: str, values: Any, said: str
) -> None:
    def fail(*some: Any, **named: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("diffusekrona.training.hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "files", {}, raising=False)
    monkeypatch.setattr(broken, fail)
    run(settings(place, tmp_path / "toy", **values))
    assert factors(tmp_path / "toy")
    (told,) = [text for text in warnings_in(caplog) if "no room" in text]
    assert said in told


@pytest.mark.parametrize(
    "prompt",
    [
        "for $5 and a $10 bill",
        "$x_{1$",
        "\\frac{5} & $10_^ %",
        "<b>[bold]{x}",
        "costs $\\frac{5} & $10_^ % a day",
        "犬",
    ],
)
def test_a_prompt_is_text_and_nothing_else(place: Path, tmp_path: Path, caplog: Any, prompt: str) -> None:
    run(settings(place, tmp_path / "toy", instance_prompt=prompt, validation_prompt=[prompt], max_train_steps=1))
    assert (tmp_path / "toy" / "run" / "validation" / "sheet.png").is_file()
    assert not warnings_in(caplog)


# Files on the way


def test_each_saved_step_is_an_adapter_that_loads(place: Path, tmp_path: Path) -> None:
    averaged = {"ema_decay": 0.5}
    run(settings(place, tmp_path / "long", save_every=2, **averaged))
    short = run(settings(place, tmp_path / "short", max_train_steps=2, **averaged))
    first, last = sorted((tmp_path / "long" / "run" / "steps").iterdir())
    assert first.name == "long-step00000002.safetensors"
    assert same(factors(first), factors(short.saved[1]))
    assert same(factors(last), factors(tmp_path / "long"))


@pytest.mark.parametrize("values", [{}, {"ema_decay": 0.5}, {"factors": {"to_k": (8, 4)}, "num_terms": 2}], ids=str)
@pytest.mark.parametrize("target", ["toy", "toy.safetensors"])
def test_a_checkpoint_is_exported_as_the_adapter_that_it_is_of(
    place: Path, tmp_path: Path, values: dict[str, Any], target: str
) -> None:
    outcome = run(settings(place, tmp_path / "run-of-it", **values))
    for number, source in enumerate((outcome.saved[0], outcome.page.parent, outcome.page.parent / "checkpoints")):
        assert export_checkpoint(source, tmp_path / str(number) / target) == 4
        assert same(factors(tmp_path / str(number) / target), factors(outcome.saved[0]))


def test_a_checkpoint_that_is_taken_for_an_adapter_says_how_to_make_one(place: Path, tmp_path: Path) -> None:
    outcome = run(settings(place, tmp_path / "toy"))
    checkpoint = outcome.page.parent / "checkpoints" / "step-00000004.safetensors"
    for reads in (inspect_file, partial(load_krona, tiny_sd_pipeline())):
        with pytest.raises(AdapterFileError, match="is a checkpoint of a run") as caught:
            reads(checkpoint)
        (command,) = re.findall("`diffusekrona (.*)`", str(caught.value))
        told = CliRunner().invoke(app, shlex.split(command.replace("OUTPUT", str(tmp_path / "made"))))
        assert told.exit_code == 0, told.output
        assert same(factors(tmp_path / "made"), factors(outcome.saved[0]))
        shutil.rmtree(tmp_path / "made")


def test_what_is_no_run_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint, which is called like"):
        export_checkpoint(tmp_path, tmp_path / "toy")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        export_checkpoint(tmp_path / "gone.safetensors", tmp_path / "toy")


def test_a_renamed_run_goes_on_where_it_is(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    relative = {"pretrained_model_name_or_path": "base", "instance_data_dir": "images"}
    for name in ("toy", "bear.safetensors"):
        run(settings(place, tmp_path / "a" / name, **relative))
    whole = run(settings(place, tmp_path / "whole", max_train_steps=6))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for folder in ("toy/run", "bear/run"):
        found = read_settings(tmp_path / "b" / folder / "settings.yaml")
        again = run(Settings.of({**found, "resume": True, "max_train_steps": 6}))
        assert again.result.losses == whole.result.losses
    assert not (tmp_path / "a").exists()


def test_a_single_files_settings_name_it(place: Path, tmp_path: Path) -> None:
    run(settings(place, tmp_path / "toy.v2.safetensors", max_train_steps=1))
    found = read_settings(tmp_path / "toy.v2" / "run" / "settings.yaml")
    assert Settings.of(found).output.output_dir == tmp_path / "toy.v2.safetensors"


def test_a_resume_that_finds_nothing_says_so(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing to resume: .*checkpoints has no checkpoint"):
        run(settings(place, tmp_path / "toy", resume=True))


@pytest.mark.parametrize("name", ["README.md", "toy.safetensors", "toy-lokr.safetensors", "unet"])
def test_what_was_in_the_output_folder_before_is_not_replaced(place: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "toy"
    output.mkdir()
    (output / name).write_text("precious")
    with pytest.raises(KronAError, match=f"{re.escape(name)} is there already, and no run of this folder wrote it"):
        run(settings(place, output, also="lokr"))
    assert (output / name).read_text() == "precious"
    (output / name).rename(output / "kept")
    run(settings(place, output, also="lokr", max_train_steps=1))
    run(settings(place, output, also="lokr", max_train_steps=2, resume=True))
    assert (output / "kept").read_text() == "precious"


class Hub:
    """What of a repository on the hub this library uses, in memory."""

    files: dict[str, list[str]]

    def create_repo(self, name: str, exist_ok: bool = False) -> None:
        assert exist_ok
        self.files[name] = []

    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
        assert path_or_fileobj.is_file()
        self.files[repo_id].append(path_in_repo)

    def upload_folder(self, *, folder_path: Path, repo_id: str, ignore_patterns: list[str]) -> None:
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        self.files[repo_id] += filter_repo_objects(names, ignore_patterns=ignore_patterns)


@pytest.mark.parametrize(
    ("output", "pushed"),
    [
        ("toy", ["README.md", "toy.safetensors", "unet/adapter_config.json", "unet/adapter_model.safetensors"]),
        ("toy.safetensors", ["toy.safetensors"]),
    ],
)
def test_the_adapter_is_pushed_without_its_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, pushed: list[str]
) -> None:
    monkeypatch.setattr("diffusekrona.training.hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "files", {}, raising=False)
    run(settings(place, tmp_path / output, push_to_hub=True, hub_model_id="me/toy", max_train_steps=1))
    assert {name: sorted(files) for name, files in Hub.files.items()} == {"me/toy": pushed}


def test_a_folder_above_gives_the_adapter_its_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "toy" / "deep")
    run(settings(place, Path(".."), max_train_steps=1))
    assert (tmp_path / "toy" / "toy.safetensors").is_file()


@pytest.mark.parametrize("output", ["file", "folder.safetensors", "file/below", "file/below.safetensors"])
def test_a_place_that_cannot_be_written_to_is_an_error_before_anything_is_loaded(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(KronAError, match="output_dir"):
        run(settings(tmp_path / "nothing", tmp_path / output))


def test_an_interrupted_run_is_resumed_to_the_same_adapter(place: Path, tmp_path: Path) -> None:
    def stop(done: TrainingStep) -> None:
        if done.step == 3:
            raise KeyboardInterrupt

    def seen() -> list[int]:
        board = EventAccumulator(str(tmp_path / "parts" / "run" / "tensorboard")).Reload()
        return [event.step for event in board.Scalars("train/loss")]

    chosen = {"checkpointing_steps": 2, "dropout": 0.1}
    whole = run(settings(place, tmp_path / "whole", **chosen))
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as interrupted:
        run(settings(place, tmp_path / "parts", **chosen), stop)
    assert seen() == [1, 2, 3]
    assert threading.active_count() == threads, interrupted  # which keeps trackers alive that were not closed
    assert not (tmp_path / "parts" / "unet").exists()
    parts = run(settings(place, tmp_path / "parts", **chosen, resume=True))
    assert parts.result.resumed_at == 2
    assert seen() == [1, 2, 3, 4]
    assert same(factors(whole.saved[0]), factors(parts.saved[0]))


def test_what_is_cached_on_disk_goes_to_the_runs_folder_and_is_used_again(place: Path, tmp_path: Path) -> None:
    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "toy" / "run" / "cache").iterdir()}

    run(settings(place, tmp_path / "toy", cache="disk"))
    before = files()
    run(settings(place, tmp_path / "toy", cache="disk", seed=1, overwrite=True))
    assert len(before) == 3 + 1
    assert files() == before


def test_the_images_are_prepared_as_the_settings_say(place: Path, tmp_path: Path) -> None:
    chosen = {"center_crop": False, "repeats": 3, "aspect_ratio_buckets": True, "on_bad_image": "skip", "seed": 5}
    plan = image_plan(settings(place, tmp_path, **chosen), 64, 16)
    assert {name: getattr(plan, name) for name in chosen} == chosen
    assert (plan.resolution, plan.multiple) == (64, 16)


@pytest.mark.parametrize("form", ["dataset_dir", "dataset_name"])
def test_images_come_from_a_dataset_instead_of_a_folder(
    place: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = sorted((place / "images").iterdir())
    rows = datasets.Dataset.from_dict({"picture": [str(path) for path in paths], "said": ["a sks toy"] * 3})
    rows, source = rows.cast_column("picture", datasets.Image()), str(tmp_path / "dataset")
    if form == "dataset_dir":
        rows.save_to_disk(source)
    else:
        (tmp_path / "dataset").mkdir()
        rows.to_parquet(f"{source}/train.parquet")
    chosen = {"instance_data_dir": None, form: source, "instance_prompt": None}
    of_dataset = run(settings(place, tmp_path / "one", **chosen, image_column="picture", caption_column="said"))
    of_folder = run(settings(place, tmp_path / "two"))
    assert same(factors(of_dataset.saved[0]), factors(of_folder.saved[0]))


def test_a_flow_with_patches_is_trained_on_images_of_several_sizes(place: Path, tmp_path: Path) -> None:
    tiny_sd3_pipeline().save_pretrained(tmp_path / "base")
    chosen = {"pretrained_model_name_or_path": str(tmp_path / "base"), "aspect_ratio_buckets": True, "resolution": 40}
    outcome = run(settings(place, tmp_path / "toy", **chosen))
    assert (tmp_path / "toy" / "transformer" / "adapter_model.safetensors").is_file()
    assert all(loss > 0 for loss in outcome.result.losses)
