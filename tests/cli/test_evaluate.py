"""`diffusekrona evaluate` from the command line: the sheet, LPIPS and the scores of each image."""

import json
import shutil

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusekrona.cli import app
from diffusekrona.evaluation import sheet as sheets
from tests.evaluation.models import save_clip, save_vit
from tests.evaluation.networks import provide_torchvision, save_network
from tests.evaluation.pictures import save


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    clip, dino = save_clip(tmp_path_factory.mktemp("clip")), save_vit(tmp_path_factory.mktemp("dino"))
    return ["--clip", clip, "--dino", dino, "--device", "cpu"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with real and generated images."""
    save(tmp_path / "real", a=1, b=2)
    save(tmp_path / "out", x=3, y=4, z=5)
    (tmp_path / "out" / "prompts.txt").write_text("a sks dog\na sks dog [on sand]\na sks cat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SUBJECT = ["--real", "real", "--generated", "out", "--drop-word", "sks"]
DRIFT = ["--base-images", "real", "--adapted-images", "real"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments):
    """The one line that a command ends with, before a model is loaded: none of those named is there."""
    result = run(*arguments, "--clip", "nobody/clip", "--dino", "nobody/dino", code=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "nobody" not in line
    return line


def test_each_image_is_listed_with_its_prompt_and_scores(place, encoders):
    run(*SUBJECT, *encoders, "--output", "scores.json")
    (subject,) = json.loads((place / "scores.json").read_text(encoding="utf-8"))["subjects"]
    assert [image["file_name"] for image in subject["images"]] == ["x.png", "y.png", "z.png"]
    assert [image["prompt"] for image in subject["images"]] == ["a dog", "a dog [on sand]", "a cat"]
    for image in subject["images"]:
        assert {name: image[name] for name in ("clip_i", "clip_t", "dino")} == {
            name: subject[name]["images"][image["file_name"]] for name in ("clip_i", "clip_t", "dino")
        }
        assert len(image) == 5


@pytest.mark.parametrize("score", [[], ["--sheet-score", "clip_t"], ["--sheet-score", "clip-t"]])
def test_the_sheet_is_drawn_and_named(score, place, encoders):
    result = run(*SUBJECT, *encoders, "--sheet", "new/sheet.png", *score, "--sheet-images", 1, "--output", "scores.md")
    assert result.stdout.splitlines()[-2:] == ["scores.md", "new/sheet.png"]
    with Image.open(place / "new" / "sheet.png") as sheet:
        assert sheet.width < 700  # two columns


def test_the_flags_of_the_sheet_reach_it(place, encoders, monkeypatch):
    given = []
    draw = sheets.sheet_figure
    monkeypatch.setattr(sheets, "sheet_figure", lambda *all_: given.append(all_[2]) or draw(*all_))
    run(*SUBJECT, *encoders, "--sheet", "a.png", "--sheet-score", "clip-i", "--sheet-images", 3)
    run(*SUBJECT, *encoders, "--sheet", "a.png")
    assert [(one.sheet_score, one.sheet_images) for one in given] == [("clip_i", 3), ("dino", 4)]


def test_without_matplotlib_all_but_the_sheet_is_there(place, encoders, monkeypatch):
    monkeypatch.setattr(sheets, "find_spec", lambda name: None)
    result = run(*SUBJECT, *encoders, "--sheet", "sheet.png", "--output", "scores.json")
    assert result.stderr.startswith("The sheet sheet.png is left out, for want of matplotlib.")
    assert "pip install 'diffusekrona[train]'" in result.stderr.splitlines()[0]
    assert (place / "scores.json").is_file()
    assert not (place / "sheet.png").exists()
    assert "sheet.png" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SUBJECT, "--sheet-score", "clip_i"], "sheet is missing"),
        ([*SUBJECT, "--sheet-images", 2], "sheet is missing"),
        ([*SUBJECT, "--sheet", "sheet.gif"], "must end in .png"),
        ([*SUBJECT, "--sheet", "a.png", "--sheet-images", 0], "at least 1 and of at most 12, not 0"),
        ([*SUBJECT, "--sheet", "a.png", "--sheet-score", "lpips"], "sheet_score is lpips, which is not measured"),
        ([*DRIFT, "--sheet", "a.png"], "sheet would have nothing to do"),
        ([*DRIFT, "--lpips", "nowhere"], "lpips would have nothing to do"),
    ],
)
def test_what_cannot_be_made_ends_with_one_line_before_a_model_is_loaded(arguments, said, place):
    assert said in refused(*arguments)


def test_weights_of_lpips_that_are_nowhere_are_named_first(place, monkeypatch):
    provide_torchvision(monkeypatch)
    assert "The weights of LPIPS cannot be found: weights.safetensors" in refused(
        *SUBJECT, "--lpips", "weights.safetensors"
    )


def test_without_torchvision_lpips_says_what_it_needs(place, monkeypatch):
    monkeypatch.setattr("diffusekrona.evaluation.perceptual.find_spec", lambda name: None)
    assert "LPIPS needs torchmetrics and torchvision, which are not installed" in refused(
        *SUBJECT, "--lpips", "weights"
    )


def test_lpips_is_in_the_json_the_table_and_the_sheet(place, encoders, monkeypatch):
    provide_torchvision(monkeypatch)
    monkeypatch.setattr("diffusekrona.evaluation.perceptual.SIDE", 64)
    save_network(place / "weights.safetensors", "alex")
    shutil.copy(place / "real" / "a.png", place / "out" / "y.png")
    sheet = ["--sheet", "sheet.png", "--sheet-score", "lpips"]
    result = run(*SUBJECT, *encoders, "--lpips", "weights.safetensors", "--output", "scores.json", *sheet)
    scores = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    assert scores["models"]["lpips"] == {"source": "weights.safetensors", "revision": None, "network": "alex"}
    values = {image["file_name"]: image["lpips"] for image in scores["subjects"][0]["images"]}
    assert min(values, key=values.get) == "y.png"
    assert "LPIPS" in result.stdout
    assert (place / "sheet.png").is_file()
