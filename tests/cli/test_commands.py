import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusekrona import KronALayer, load_krona
from diffusekrona.cli import app
from diffusekrona.generation import generated
from diffusekrona.training.settings import read_settings
from tests.evaluation.models import save_clip, save_vit
from tests.pipelines import tiny_sd_pipeline

TRAIN = ["--prompt", "a sks toy", "--max-train-steps", "3", "--learning-rate", "0.05"]
GENERATE = ["--prompt", "a sks toy", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_sd_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for name in ("red", "green", "blue"):
        Image.new("RGB", (40, 40), name).save(path / f"{name}.png")
    return path


@pytest.fixture(scope="module")
def adapter(base, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "toy.safetensors"
    run("train", "--base", base, "--images", images, "--output", path, *TRAIN)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def fail(*arguments):
    """Run a command that has to end with one line on standard error and no traceback."""
    result = run(*arguments, code=1)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def pictures(folder):
    return {path.name: np.array(Image.open(path), dtype=int) for path in sorted(folder.glob("*.png"))}


def test_training_saves_an_adapter_that_loads(base, images, tmp_path):
    output = tmp_path / "new" / "toy"
    factors = ["--a1", 2, "--a2", 8, "--factors", "to_k|to_v=4,32", "--factors", r".*mid_block.*to_q = 8, 16"]
    result = run("train", "--base", base, "--images", images, "--output", output, *TRAIN, *factors)
    pipe = tiny_sd_pipeline()
    load_krona(pipe, output)
    shapes = {
        name: tuple(module.krona_A["default"].shape)
        for name, module in pipe.unet.named_modules()
        if isinstance(module, KronALayer)
    }
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    found = [shapes[f"{block}.{name}"] for name in ("to_k", "to_v", "to_q", "to_out.0")]
    assert found == [(4, 32), (4, 32), (8, 16), (2, 8)]
    assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"] == (2, 8)
    trained = sum(p.numel() for name, p in pipe.unet.named_parameters() if "krona_" in name)
    assert f"Adapted {len(shapes)} layers with {trained:,} trainable parameters" in result.stdout
    assert re.search(r"3 steps on 3 images in [\d.]+ s, final loss \d\.\d{4}", result.stdout)
    assert re.search(rf"Saved {re.escape(str(output))}, [\d.]+ [kM]B", result.stdout)


def test_the_progress_bar_shows_the_loss_and_stays_off_standard_output(base, images, tmp_path):
    result = run("train", "--base", base, "--images", images, "--output", tmp_path / "toy", *TRAIN)
    assert re.search(r"Training .*3/3 loss \d\.\d{4} lr 5\.0e-02 \d[\d.]* images/s left \d:\d\d:\d\d", result.stderr)
    assert "Training" not in result.stdout
    assert "leaves out" not in result.stderr


HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding:
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {"tensorboard", "matplotlib", "datasets", "prodigyopt", "bitsandbytes"}
        return None if hidden else PathFinder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(PathFinder, name)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding()
sys.argv[0] = "diffusekrona"
from diffusekrona.cli import app
app()
"""


def test_without_the_extra_packages_training_runs_and_one_line_says_what_is_left_out(base, images, tmp_path):
    options = ["--validation-prompt", "a sks toy", "--validation-inference-steps", "1"]
    command = ["train", "--base", base, "--images", images, "--output", tmp_path / "toy", *TRAIN, *options]
    program = [sys.executable, "-c", HIDING, *map(str, command)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "leaves out" in line] == [
        "This run leaves out TensorBoard's files, the loss curve and the sheet of pictures, which need tensorboard and "
        "matplotlib. To have them, pip install 'diffusekrona[train]'."
    ]
    folder = tmp_path / "toy" / "run"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "report.html", "settings.yaml", "status.json", "validation", "written.json",
    }  # fmt: skip
    assert [path.name for path in (folder / "validation").iterdir()] == ["step-00000003-0.png"]
    page = (folder / "report.html").read_text()
    assert "<h2>Settings</h2>" in page
    assert "<h2>Loss</h2>" not in page
    assert "<h2>Validation</h2>" not in page
    load_krona(tiny_sd_pipeline(), tmp_path / "toy")


def test_every_option_of_training_is_accepted_together(base, images, tmp_path):
    options = {
        "--alpha": 0.5, "--dropout": 0.1, "--train-batch-size": 2, "--gradient-accumulation-steps": 2,
        "--resolution": 16, "--seed": 3, "--lr-scheduler": "cosine", "--lr-warmup-steps": 1,
        "--adam-weight-decay": 0, "--max-grad-norm": 0.5, "--snr-gamma": 5, "--mixed-precision": "bf16",
        "--dtype": "bfloat16",
    }  # fmt: skip
    flat = [part for pair in options.items() for part in pair]
    command = ["train", "--base", base, "--images", images, "--output", tmp_path / "toy", *TRAIN]
    run(*command, *flat, "--random-flip", "--train-text-encoder")
    pipe = tiny_sd_pipeline()
    load_krona(pipe, tmp_path / "toy")
    assert any(isinstance(module, KronALayer) for module in pipe.text_encoder.modules())
    assert pipe.unet.peft_config["default"].alpha == 0.5


def test_settings_come_from_a_file_and_flags_win_over_it(base, images, tmp_path):
    (tmp_path / "toy.yaml").write_text(
        f"pretrained_model_name_or_path: {base}\ninstance-data-dir: {images}\ninstance_prompt: a sks toy\n"
        f"output_dir: {tmp_path / 'toy'}\nmax_train_steps: 9\na1: 2\nlearning_rate: 1e-3\n"
    )
    result = run("train", "--config", tmp_path / "toy.yaml", "--max_train_steps", 2)
    assert "2 steps on 3 images" in result.stdout
    used = read_settings(tmp_path / "toy" / "run" / "settings.yaml")
    assert (used["max_train_steps"], used["a1"], used["learning_rate"], used["train_batch_size"]) == (2, 2, 1e-3, 1)
    again = run("train", "--config", tmp_path / "toy" / "run" / "settings.yaml", "--output", tmp_path / "again")
    assert "2 steps on 3 images" in again.stdout
    adapters = [(tmp_path / name / "unet" / "adapter_model.safetensors").read_bytes() for name in ("toy", "again")]
    assert adapters[0] == adapters[1]


def test_an_interrupted_training_says_how_to_go_on_and_does(base, images, tmp_path, monkeypatch):
    output = tmp_path / "my toy"
    command = ["train", "--base", base, "--images", images, "--prompt", "a sks toy", "--max-train-steps", 4]

    @contextmanager
    def pressing_ctrl_c():
        yield lambda done: os.kill(os.getpid(), signal.SIGINT) if done.step == 1 else None

    monkeypatch.setattr("diffusekrona.cli.train.training_progress", pressing_ctrl_c)
    said, again = run(*command, "--output", output, code=130).stderr.splitlines()
    adapter = output / "run" / "steps" / "my toy-step00000002.safetensors"
    assert said.startswith(f"Stopped after step 2. The adapter so far is {adapter}. Its state is in ")
    load_krona(tiny_sd_pipeline(), adapter)
    assert said.endswith("step-00000002.safetensors. To go on from there:")
    monkeypatch.undo()
    program, *arguments = shlex.split(again)
    assert (program, arguments[-1]) == ("diffusekrona", "--resume")
    run(*arguments)
    run(*command, "--output", tmp_path / "whole")
    adapters = [(folder / "unet" / "adapter_model.safetensors").read_bytes() for folder in (output, tmp_path / "whole")]
    assert adapters[0] == adapters[1]


def test_generating_with_a_merged_adapter_is_generating_with_it(base, adapter, tmp_path):
    runs = {
        "plain": [],
        "beside": ["--adapter", adapter, "--no-merge"],
        "merged": ["--adapter", adapter, "--merge"],
        "off": ["--adapter", adapter, "--weight", 0],
        "doubled": ["--adapter", adapter, "--weight", 2],
    }
    found = {}
    for name, options in runs.items():
        run("generate", "--base", base, "--output", tmp_path / name, *GENERATE, *options)
        (found[name],) = pictures(tmp_path / name).values()
    assert np.abs(found["beside"] - found["merged"]).max() <= 1
    assert np.abs(found["plain"] - found["off"]).max() <= 1
    assert np.abs(found["plain"] - found["merged"]).max() > 1
    assert np.abs(found["doubled"] - found["merged"]).max() > 1


@pytest.mark.parametrize(("options", "merged"), [([], True), (["--merge"], True), (["--no-merge"], False)])
def test_the_adapter_is_merged_unless_asked_otherwise(base, adapter, tmp_path, monkeypatch, options, merged):
    found = []

    def look_and_generate(pipe, *arguments, **rest):
        found.extend(module.merged for module in pipe.unet.modules() if isinstance(module, KronALayer))
        return generated(pipe, *arguments, **rest)

    monkeypatch.setattr("diffusekrona.generation.generated", look_and_generate)
    run("generate", "--base", base, "--output", tmp_path, *GENERATE, "--adapter", adapter, *options)
    assert set(found) == {merged}


def test_each_prompt_and_seed_has_its_image(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("A dog, on sand!\n\n  a cup \n")
    output = tmp_path / "images"
    result = run(
        "generate", "--base", base, "--output", output, *GENERATE, "--prompts-file", tmp_path / "prompts.txt",
        "--images-per-prompt", 2, "--seed", 7, "--batch-size", 4, "--height", 16, "--width", 24,
        "--guidance-scale", 3,
    )  # fmt: skip
    found = pictures(output)
    assert list(found) == [
        "000-a-sks-toy-seed7.png",
        "001-a-sks-toy-seed8.png",
        "002-a-dog-on-sand-seed7.png",
        "003-a-dog-on-sand-seed8.png",
        "004-a-cup-seed7.png",
        "005-a-cup-seed8.png",
    ]
    assert {picture.shape for picture in found.values()} == {(16, 24, 3)}
    assert len({picture.tobytes() for picture in found.values()}) == 6
    assert [line.rpartition("/")[2] for line in result.stdout.splitlines()] == list(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--base": "nobody/nothing"}, "There is no base model 'nobody/nothing'"),
        ({"--images": "nowhere"}, "There is no image folder nowhere"),
        ({"--prompt": " "}, "The prompt is empty"),
        ({"--max-train-steps": 0}, "max_train_steps must be a whole number of at least 1"),
        ({"--resolution": 30}, "resolution 30 is not divisible by 4"),
        ({"--factors": "to_k=4"}, "--factors takes REGEX=A1,A2"),
        ({"--factors": "(=2,8"}, "not a regular expression"),
        ({"--config": "typo.yaml"}, "There is no setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"--config": "nowhere.yaml"}, "The settings file nowhere.yaml cannot be read"),
        ({"--dataset-dir": "dataset"}, "Give either instance_data_dir"),
        ({"--repeats": 0}, "repeats must be a whole number of at least 1"),
        ({"--output": "taken.txt"}, "output_dir taken.txt is a file"),
        ({"--output": "folder.safetensors"}, "output_dir folder.safetensors is a folder"),
    ],
)
def test_a_mistake_in_training_is_one_helpful_line(base, images, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.txt").write_text("")
    (tmp_path / "typo.yaml").write_text("learning_rat: 1e-3")
    (tmp_path / "folder.safetensors").mkdir()
    options = {"--base": base, "--images": images, "--output": "toy", "--prompt": "a sks toy", "--max-train-steps": 1}
    assert said in fail("train", *[part for pair in (options | change).items() for part in pair])


def test_factors_that_fit_no_layer_are_named_and_nothing_is_saved(base, images, tmp_path):
    command = ["train", "--base", base, "--images", images, "--output", tmp_path / "toy.safetensors", *TRAIN]
    result = run(*command, "--a1", 3, code=1)
    assert "divisor" in result.stderr or "divisible" in result.stderr
    assert not (tmp_path / "toy.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a toy", "--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
        ([], "There is no prompt"),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a toy", "--steps", 0], "steps must be at least 1"),
    ],
)
def test_a_mistake_in_generating_is_one_helpful_line(base, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in fail("generate", "--base", base, "--output", "out", "--device", "cpu", *arguments)


def test_ctrl_c_ends_with_one_line_and_the_usual_code(base, images, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusekrona.training.output.save_krona", interrupted)
    command = ["train", "--base", base, "--images", images, "--output", tmp_path / "toy.safetensors", *TRAIN]
    assert run(*command, code=130).stderr.endswith("Stopped before the end.\n")


def test_help_names_the_commands():
    assert {"train", "generate"} <= set(run("--help").stdout.split())


# inspect, convert, merge


def test_inspect_says_what_a_file_is_and_what_it_can_become(adapter, tmp_path, base):
    text = run("inspect", adapter).stdout
    assert "KronA, 56 layers" in text
    assert "4 × 64" in text or "⊗" in text
    assert "Can become KronA, LoKr: exactly" in text
    run("convert", adapter, tmp_path / "lokr.safetensors", "--to", "lokr", "--model", base)
    text = run("inspect", tmp_path / "lokr.safetensors", "--every-layer").stdout
    assert "LoKr, 56 layers" in text
    assert "lora_unet_" in text
    assert "ss_network_module: lycoris.kohya" in text


def test_convert_says_whether_it_was_exact_and_how_near_it_came(adapter, tmp_path, base):
    text = run("convert", adapter, tmp_path / "lokr.safetensors", "--to", "lokr", "--model", base).stdout
    assert "exactly the same updates" in text
    text = run("convert", adapter, tmp_path / "small", "--model", base, "--budget", 0.9).stdout
    assert re.search(r"relative error 0\.\d+", text)
    assert "Largest error of a layer" in text
    text = run("convert", adapter, tmp_path / "other", "--model", base, "--factors", "2,2").stdout
    assert "relative error" in text


def test_extract_finds_what_a_fine_tune_changed(adapter, tmp_path, base):
    run("merge", base, adapter, tmp_path / "tuned")
    text = run("extract", base, tmp_path / "tuned", tmp_path / "found", "--factors", "4,64").stdout
    assert "56 layers" in text
    assert "relative error 0.00" in text
    assert "either factors" in fail("extract", base, tmp_path / "tuned", tmp_path / "x")


def test_merge_writes_a_pipeline_that_draws_as_the_adapter_does(adapter, tmp_path, base):
    assert "56 layers changed" in run("merge", base, adapter, tmp_path / "merged").stdout
    run("generate", "--base", tmp_path / "merged", "--output", tmp_path / "a", *GENERATE)
    run("generate", "--base", base, "--adapter", adapter, "--output", tmp_path / "b", *GENERATE)
    merged, adapted = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert merged.keys() == adapted.keys()
    assert all(np.abs(picture - adapted[name]).max() <= 1 for name, picture in merged.items())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect", "nothing.safetensors"], "does not exist"),
        (["convert", "ADAPTER", "out", "--factors", "4"], "--factors takes A1,A2, such as 4,64, not '4'"),
        (["convert", "ADAPTER", "out", "--num-terms", "2"], "--num-terms needs --factors or --budget"),
        (["convert", "ADAPTER", "out", "--factors", "2,2", "--budget", "0.5"], "either factors"),
        (["convert", "ADAPTER", "out"], "fits none of sdxl, sd15"),
        (["merge", "nothing", "ADAPTER", "out"], "nothing"),
    ],
)
def test_inspect_convert_and_merge_end_with_one_line_where_something_is_wrong(arguments, text, adapter, tmp_path):
    given = [adapter if argument == "ADAPTER" else argument for argument in arguments]
    result = run(*[tmp_path / "out" if argument == "out" else argument for argument in given], code=1)
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


# evaluate


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    clip, dino = save_clip(tmp_path_factory.mktemp("clip")), save_vit(tmp_path_factory.mktemp("dino"))
    return ["--clip", clip, "--dino", dino, "--device", "cpu"]


def test_evaluate_scores_what_generate_wrote_with_its_prompts(base, images, encoders, tmp_path):
    prompts = ["--prompt", "a sks toy", "--prompt", "A sks toy [on sand]", "--images-per-prompt", 2]
    run("generate", "--base", base, "--output", tmp_path / "out", *GENERATE[2:], *prompts)
    shutil.copytree(tmp_path / "out", tmp_path / "adapted")
    arguments = ["--real", images, "--generated", tmp_path / "out", "--drop-word", "sks", *encoders]
    drift = ["--base-images", tmp_path / "out", "--adapted-images", tmp_path / "adapted"]
    outputs = ["--output", tmp_path / "scores.json", "--output", tmp_path / "scores.md"]
    result = run("evaluate", *arguments, *drift, *outputs)
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    (subject,) = scores["subjects"]
    assert (subject["name"], subject["real"], subject["generated"]) == (images.name, 3, 4)
    assert list(subject["prompts"].values()) == ["a toy"] * 2 + ["A toy [on sand]"] * 2
    assert subject["prompts"].keys() == pictures(tmp_path / "out").keys()
    assert scores["drift"]["mean"] == pytest.approx(0, abs=1e-6)
    assert f"{subject['clip_t']['mean']:.3f} ±" in result.stdout
    assert f"{subject['dino']['mean']:.3f} ±" in (tmp_path / "scores.md").read_text(encoding="utf-8")
    assert "15/15" in result.stderr


def test_generate_keeps_earlier_images_and_their_prompts(base, tmp_path):
    for prompt, seed in (("a toy", 0), ("a dog", 1), ("a toy", 0)):
        run("generate", "--base", base, "--output", tmp_path, *GENERATE[2:], "--prompt", prompt, "--seed", seed)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert rows == [
        {"file_name": "000-a-toy-seed0.png", "text": "a toy", "seed": 0},
        {"file_name": "001-a-dog-seed1.png", "text": "a dog", "seed": 1},
        {"file_name": "002-a-toy-seed0.png", "text": "a toy", "seed": 0},
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--generated": None}, "Of the folders of real and generated images only one is given"),
        ({"--real": None, "--generated": None}, "There is nothing to measure"),
        ({"--generated": "IMAGES"}, "3 of 3 images in"),
        ({"--real": "nowhere"}, "There is no image folder nowhere"),
        ({"--clip": "nobody/nothing"}, "There is no model of CLIP 'nobody/nothing'"),
        ({"--output": "scores.csv"}, "must end in .json or .md"),
        ({"--batch-size": 0}, "batch_size must be at least 1"),
    ],
)
def test_evaluate_ends_with_one_line_where_something_is_wrong(change, text, images, encoders, tmp_path):
    shutil.copytree(images, tmp_path / "out")
    (tmp_path / "out" / "prompts.txt").write_text("a toy\n" * 3)
    given = {"--real": images, "--generated": tmp_path / "out", **dict(zip(encoders[::2], encoders[1::2], strict=True))}
    given |= {name: images if value == "IMAGES" else value for name, value in change.items()}
    assert text in fail("evaluate", *(part for pair in given.items() if pair[1] is not None for part in pair))
