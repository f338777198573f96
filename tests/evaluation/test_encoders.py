"""The encoders, against transformers' own models on pixels that are prepared here by hand."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, CLIPTextModel

from diffusekrona.evaluation import Encoders, EvaluationError
from diffusekrona.evaluation.encoders import ClipEncoder, DinoEncoder
from tests.evaluation.models import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, SIDE
from tests.evaluation.pictures import noise

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
SIZES = [(40, 40), (90, 50), (50, 90), (20, 24)]


def normal(image: Image.Image, mean: list[float], std: list[float]) -> Tensor:
    pixels = (np.asarray(image, dtype=np.float64) / 255 - mean) / std
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def middle(image: Image.Image, short: int) -> Image.Image:
    """The shorter side becomes `short` pixels, of whose middle SIDE × SIDE are cut out."""
    width, height = image.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return image.resize(size, BICUBIC).crop((left, top, left + SIDE, top + SIDE))


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_clips_image_features_are_projected_and_of_the_middle(clip_folder: Path, size: tuple[int, int]) -> None:
    image = noise(1, size)
    model = AutoModel.from_pretrained(clip_folder)
    pooled = model.vision_model(normal(middle(image, SIDE), CLIP_MEAN, CLIP_STD)).pooler_output
    found = ClipEncoder(clip_folder).images([image])
    assert found.shape == (1, 24)
    torch.testing.assert_close(found, model.visual_projection(pooled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_dinos_features_are_the_class_token_of_the_whole_picture(vit_folder: Path, size: tuple[int, int]) -> None:
    image = noise(1, size)
    pixels = normal(image.resize((SIDE, SIDE), BILINEAR), IMAGENET_MEAN, IMAGENET_STD)
    states = AutoModel.from_pretrained(vit_folder)(pixels).last_hidden_state
    torch.testing.assert_close(DinoEncoder(vit_folder).images([image]), states[:, 0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_dinov2_takes_the_class_token_too(dinov2_folder: Path) -> None:
    image = noise(1, (90, 50))
    pixels = normal(middle(image, SIDE + 4), IMAGENET_MEAN, IMAGENET_STD)
    states = AutoModel.from_pretrained(dinov2_folder)(pixels).last_hidden_state
    torch.testing.assert_close(DinoEncoder(dinov2_folder).images([image]), states[:, 0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_clips_text_features_are_those_of_the_prompt_alone(clip_folder: Path, encoders: Encoders) -> None:
    """Neither padding nor the other prompts of the batch count."""
    model = AutoModel.from_pretrained(clip_folder)
    tokenizer = encoders.clip._tokenizer
    text_model = CLIPTextModel.from_pretrained(clip_folder)
    texts = ["a toy", "a dog on the moon", "x"]
    found = encoders.text_features(texts)
    for row, text in zip(found, texts, strict=True):
        pooled = text_model(**tokenizer(text, return_tensors="pt")).pooler_output
        torch.testing.assert_close(row[None], model.text_projection(pooled), rtol=1e-4, atol=1e-4)


def test_batches_do_not_change_the_features(encoders: Encoders, clip_folder: Path, vit_folder: Path) -> None:
    images = [noise(seed, size) for seed, size in enumerate(SIZES * 2)]
    one_by_one = Encoders(clip_folder, vit_folder, batch_size=1)
    for a, b in zip(encoders.image_features(iter(images)), one_by_one.image_features(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_features_of_different_pictures_differ(encoders: Encoders) -> None:
    clip, dino = encoders.image_features([noise(0), noise(1)])
    assert (clip[0] - clip[1]).abs().max() > 0.1
    assert (dino[0] - dino[1]).abs().max() > 0.1
    texts = encoders.text_features(["a toy", "a dog"])
    assert (texts[0] - texts[1]).abs().max() > 0.1


def test_a_prompt_that_is_too_long_is_named_once_and_cut(encoders: Encoders, caplog: pytest.LogCaptureFixture) -> None:
    fits, longer = "a" * 75, "b" * 90
    with caplog.at_level(logging.WARNING):
        found = encoders.text_features([fits, longer, longer, "b" * 75 + "other"])
    said = [record.message for record in caplog.records if record.name.startswith("diffusekrona")]
    assert len(said) == 2
    assert longer in said[0]
    assert "has 92 tokens" in said[0]
    assert "reads 77" in said[0]
    assert fits not in "".join(said)
    torch.testing.assert_close(found[1], found[2])


# What is not such a model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@refs/pr/1", "no such folder/at all/here"])
def test_a_model_that_cannot_be_fetched_is_named(name: str) -> None:
    with pytest.raises(EvaluationError, match=r"There is no model of DINO .*hub") as error:
        DinoEncoder(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("offline")
def test_a_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def fetch(name: str, **options: object) -> None:
        asked.update(options, name=name)
        raise OSError("enough")

    monkeypatch.setattr("diffusekrona.evaluation.encoders.AutoModel.from_pretrained", fetch)
    with pytest.raises(EvaluationError, match="enough"):
        DinoEncoder("facebook/dino-vits16@refs/pr/1")
    assert (asked["name"], asked["revision"]) == ("facebook/dino-vits16", "refs/pr/1")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"The model of CLIP in .* cannot be loaded"):
        ClipEncoder(tmp_path)


def test_models_of_other_kinds_are_refused(clip_folder: Path, vit_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="ViTModel, not a CLIP model"):
        ClipEncoder(vit_folder)
    with pytest.raises(EvaluationError, match="CLIPModel, which has no class token"):
        DinoEncoder(clip_folder)


def test_a_folder_without_its_processor_is_named(vit_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((vit_folder / name).read_bytes())
    with pytest.raises(EvaluationError, match=r"The image processor of DINO in .* cannot be loaded"):
        DinoEncoder(tmp_path)


@pytest.fixture
def incomplete(vit_folder: Path, tmp_path: Path) -> Path:
    for path in vit_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def drop(folder: Path, prefix: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_no_random_numbers(incomplete: Path) -> None:
    drop(incomplete, "embeddings.cls_token")
    with pytest.raises(EvaluationError, match=r"lacks 1 weights, such as embeddings\.cls_token"):
        DinoEncoder(incomplete)


def test_a_missing_pooler_does_not_matter(incomplete: Path, vit_folder: Path) -> None:
    drop(incomplete, "pooler.")
    images = [noise(0)]
    assert torch.equal(DinoEncoder(incomplete).images(images), DinoEncoder(vit_folder).images(images))


def test_nothing_is_unpickled(incomplete: Path) -> None:
    torch.save(load_file(incomplete / "model.safetensors"), incomplete / "pytorch_model.bin")
    (incomplete / "model.safetensors").unlink()
    with pytest.raises(EvaluationError, match=r"model\.safetensors"):
        DinoEncoder(incomplete)


def test_a_batch_of_none_is_refused(clip_folder: Path, vit_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="batch_size must be at least 1"):
        Encoders(clip_folder, vit_folder, batch_size=0)
