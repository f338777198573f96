"""What is measured of a model is what the model's own pictures say."""

import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from PIL import Image

from diffusekrona import KronAConfig
from diffusekrona.bases.loading import load_base
from diffusekrona.errors import KronAError
from diffusekrona.evaluation import Encoders
from diffusekrona.evaluation.metrics import drift, image_similarity, text_similarity
from diffusekrona.generation import generate_images
from diffusekrona.inputs.images import read_image
from diffusekrona.training import TrainingConfig, train_dreambooth
from diffusekrona.training.data import ImagePlan, load_folder
from diffusekrona.training.dreambooth import training_resolution
from diffusekrona.training.loop import fit
from research.judges.scenes import COLOURS
from research.methods import method_from
from research.study.cells import BASE, Cell, Spec, View
from research.study.measuring import APART, Measurer
from research.study.sheets import sheet_of

STRONG = {"learning_rate": 0.5}
KRONA = {"a1": 2, "a2": 4}
HOW = {"steps": 1, "guidance_scale": 1.0, "batch_size": 8}
PROMPTS = ["a sks toy on a red background", "a small sks toy on a blue background"]


@pytest.fixture(scope="module")
def measurer(settings):
    return Measurer(settings)


def scores_by_hand(settings, pipe):
    """The paper's scores of a pipeline, in plain steps."""
    base = load_base(settings.base)
    encoders = Encoders(settings.clip, settings.dino)
    drawn = generate_images(pipe, PROMPTS, [1000, 1001], **HOW)
    real = [read_image(path) for path in sorted(settings_folder(settings).glob("*.png"))]
    clip, dino = encoders.image_features(drawn)
    real_clip, real_dino = encoders.image_features(real)
    texts = encoders.text_features([prompt.replace("sks ", "") for prompt in PROMPTS])
    others = [generate_images(one, ["a fox"], [1000 + APART], **HOW) for one in (pipe, base)]
    return {
        "clip_i": image_similarity(clip, real_clip).mean,
        "clip_t": text_similarity(clip, texts).mean,
        "dino": image_similarity(dino, real_dino).mean,
        "drift": drift(*(encoders.dino_features(images) for images in others)).mean,
    }


def settings_folder(settings):
    return Path(settings.subjects["bear"].images)


def test_a_trained_adapter_is_scored_as_its_own_pictures_are(settings, measurer):
    cell = Cell(Spec("krona", KRONA, STRONG), View(), "bear", 3)
    (record,) = measurer.measure([cell])
    pipe = load_base(settings.base)
    trained = train_dreambooth(
        pipe,
        settings_folder(settings),
        "a sks toy",
        TrainingConfig(max_train_steps=2, seed=3, **STRONG),
        KronAConfig(**KRONA),
    )
    expected = scores_by_hand(settings, pipe)
    assert {name: record.found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert record.found["drift"] > 1e-6
    assert record.found["loss"] == pytest.approx(mean(trained.losses))
    assert record.sheet == sheet_of(generate_images(pipe, PROMPTS, [1000, 1001], **HOW))
    assert record.found["parameters"] == sum(p.numel() for p in pipe.unet.parameters() if p.requires_grad)
    assert record.found["bytes"] > 4 * record.found["parameters"]


def test_the_base_is_scored_as_it_is(settings, measurer):
    (record,) = measurer.measure([Cell(Spec(BASE), View(), "bear", 0)])
    expected = scores_by_hand(settings, load_base(settings.base))
    assert {name: record.found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert record.found["drift"] == pytest.approx(0, abs=1e-12)


def test_pictures_are_read_beside_their_own_prompts_where_prompts_are_of_scenes(settings, monkeypatch):
    def painted(pipe, prompts, seeds, **how):
        colours = [next((word for word in ("red", "blue") if word in prompt), "white") for prompt in prompts]
        return [Image.new("RGB", (64, 64), COLOURS[colour]) for colour in colours]

    monkeypatch.setattr("research.study.measuring.generate_images", painted)
    base = [Cell(Spec(BASE), View(), "bear", 0)]
    assert Measurer(settings).measure(base)[0].found["background"] == 1.0
    (plain,) = Measurer(replace(settings, scenes=False)).measure(base)
    assert "background" not in plain.found
    assert "obeyed" not in plain.found


def test_views_of_one_model_are_what_each_alone_would_be(settings):
    spec = Spec("lora", {"rank": 2}, {**STRONG, "max_train_steps": 3})
    views = [View(step=1), View(), View(guidance_scale=3.0), View(inference_steps=2), View(step=2, spectrum=True)]
    cells = [Cell(spec, view, "car", 0) for view in views]
    together = {record.cell.key: record.found for record in Measurer(settings).measure(cells)}
    assert len(together) == len(cells)
    for cell in cells:
        (alone,) = Measurer(settings).measure([cell])
        for name in ("dino", "clip_t", "drift", "loss"):
            assert together[cell.key][name] == pytest.approx(alone.found[name], abs=1e-6), (cell.view, name)
    assert together[cells[-1].key]["spectrum"]["layers"] > 1


def test_costs_are_what_autograd_keeps_and_adamw_needs_and_the_saved_files_have(settings, measurer, tmp_path):
    (record,) = measurer.measure([Cell(Spec("lora", {"rank": 2}, STRONG), View(), "bear", 0)])
    pipe = load_base(settings.base)
    method = method_from("lora", rank=2)
    parameters = method.prepare(pipe)
    frozen = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = load_folder(settings_folder(settings), "a sks toy", ImagePlan(training_resolution(pipe, None)))
    config = TrainingConfig(max_train_steps=1, **STRONG)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fit(pipe, images, parameters, config)
    expected = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in frozen)
    gradient_and_moments = 3 * 4 * sum(p.numel() for p in parameters.values())
    assert record.found["memory"] == expected + gradient_and_moments
    assert expected > 0
    method.save(pipe, tmp_path / "saved")
    assert record.found["bytes"] == sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())


def test_seconds_of_a_step_are_without_those_of_looking(measurer, monkeypatch):
    now = 0.0

    def taking(seconds, function):
        def slow(*args, **options):
            nonlocal now
            now += seconds
            return function(*args, **options)

        return slow

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(torch.Tensor, "backward", taking(7.0, torch.Tensor.backward))
    monkeypatch.setattr(Measurer, "_seen", taking(100.0, Measurer._seen))
    cells = [Cell(Spec("krona", KRONA, STRONG), View(step=step), "bear", 0) for step in (1, 2)]
    assert [record.found["seconds_per_step"] for record in measurer.measure(cells)] == [7.0, 7.0]


def test_a_view_may_be_of_more_steps_than_usual_or_of_fewer(measurer, monkeypatch):
    done = []
    plain = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **options: done.append(1) or plain(*args, **options))
    for steps in (1, 3):
        (record,) = measurer.measure([Cell(Spec("krona", KRONA, STRONG), View(step=steps), "bear", 0)])
        assert record.cell.view.step == steps
        assert len(done) == steps
        done.clear()


@pytest.mark.parametrize("name", ["krona", "lora", "lokr", "loha", "svdiff", "custom-diffusion", "dreambooth"])
def test_every_method_leaves_the_base_as_it_was(measurer, name):
    options = KRONA if name == "krona" else {}
    before = {key: value.clone() for key, value in measurer._pipe.unet.state_dict().items()}
    (record,) = measurer.measure([Cell(Spec(name, options, {"learning_rate": 1e-2}), View(), "bear", 0)])
    assert record.found["parameters"] > 0
    after = measurer._pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_that_diverges_is_recorded_as_one(measurer):
    cells = [Cell(Spec("krona", KRONA, {"learning_rate": 1e30}), View(step=step), "bear", 0) for step in (1, 2)]
    records = measurer.measure(cells)
    assert [record.cell.view.step for record in records] == [1, 2]
    assert records[-1].found["diverged"] is True
    assert "dino" not in records[-1].found


def test_an_infinite_factor_after_the_last_step_has_no_scores(measurer):
    (record,) = measurer.measure([Cell(Spec("krona", KRONA, {"learning_rate": 1e39}), View(step=1), "bear", 0)])
    assert record.found["diverged"] is True
    assert "dino" not in record.found


def test_fewer_pictures_are_the_first_ones(settings, measurer):
    one = Cell(Spec("krona", KRONA, STRONG, images=1), View(), "bear", 0)
    two = Cell(Spec("krona", KRONA, STRONG, images=2), View(), "bear", 0)
    every = Cell(Spec("krona", KRONA, STRONG), View(), "bear", 0)
    dino = [measurer.measure([cell])[0].found["dino"] for cell in (one, two, every)]
    assert dino[0] != dino[1] == dino[2]


def test_an_unknown_method_is_named(measurer):
    with pytest.raises(KronAError, match=r"'krone'.*krona"):
        measurer.measure([Cell(Spec("krone"), View(), "bear", 0)])


def test_a_missing_base_is_named_before_anything_is_trained(settings, tmp_path):
    with pytest.raises(KronAError, match="nowhere"):
        Measurer(replace(settings, base=str(tmp_path / "nowhere")))
