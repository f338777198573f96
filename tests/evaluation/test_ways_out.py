"""What the evaluation's errors tell users to do instead is done here, and works."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from diffusekrona.errors import EvaluationError
from diffusekrona.evaluation import DINO, Encoders, Lpips, SheetSettings, evaluate_subject, find_images, measure_drift
from diffusekrona.evaluation.encoders import _ON_PILLOW
from diffusekrona.evaluation.evaluate import check_asked
from diffusekrona.evaluation.metrics import drift, image_similarity, text_similarity
from diffusekrona.evaluation.result import check_outputs
from tests.evaluation.networks import NETWORKS, provide_torchvision, save_network
from tests.evaluation.pictures import noise, save
from tests.refusals import refusal


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# Folders


def prompts(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture
def real(tmp_path):
    return save(tmp_path / "real", a=1)


@pytest.fixture
def generated(tmp_path):
    return prompts(save(tmp_path / "generated", b=2), b="a sks toy")


@pytest.mark.parametrize(
    ("given", "said", "missing"),
    [
        (["real"], "of real and generated images only one is given; give both", ["generated"]),
        (["adapted_images"], "of base and adapted images only one is given; give both", ["base_images"]),
        ([], "give real and generated images", ["real", "generated"]),
        ([], "or base and adapted ones", ["base_images", "adapted_images"]),
    ],
)
def test_folders_are_given_as_the_text_says(given, said, missing, real, generated):
    folders = {"real": real, "generated": generated, "base_images": generated, "adapted_images": generated}
    assert said in refusal(find_images, **{name: folders[name] for name in given})
    assert len(find_images(**{name: folders[name] for name in (*given, *missing)})) == 2


@pytest.mark.parametrize("way", ["two folders of images of one subject", "two with a subfolder for each subject"])
def test_two_folders_are_of_one_kind(way, tmp_path, real, generated):
    save(tmp_path / "many" / "toy", a=1)
    assert way in refusal(find_images, tmp_path / "many", generated)
    if way.startswith("two folders"):
        assert len(find_images(real, generated)) == 2
    else:
        prompts(save(tmp_path / "made" / "toy", b=2), b="a toy")
        assert len(find_images(tmp_path / "many", tmp_path / "made")) == 2


def test_subfolders_are_named_alike(tmp_path):
    save(tmp_path / "real" / "toy", a=1)
    prompts(save(tmp_path / "generated" / "dog", b=2), b="a toy")
    text = refusal(find_images, tmp_path / "real", tmp_path / "generated")
    lacking, own = re.search(r"no subfolder for: (\w+) \(it has (\w+)\)\. Name the subfolders", text).groups()
    side = tmp_path / re.search(r"(real|generated) has no subfolder", text)[1]
    (side / own).rename(side / lacking)
    assert len(find_images(tmp_path / "real", tmp_path / "generated")) == 2


def test_pairs_have_the_names_that_generate_gave_them(tmp_path):
    base, adapted = save(tmp_path / "base", a=1, b=2), save(tmp_path / "adapted", a=3)
    text = refusal(find_images, base_images=base, adapted_images=adapted)
    assert "with the same prompts and seeds, and leave the names as they are" in text
    noise(4).save(adapted / re.search(r"such as (\S+)\. ", text)[1])
    assert len(find_images(base_images=base, adapted_images=adapted)) == 4


def test_a_prompt_says_more_than_what_is_dropped(real, generated):
    prompts(generated, b="sks")
    assert "CLIP-T needs what it says besides" in refusal(find_images, real, generated, drop_words=["sks"])
    prompts(generated, b="sks toy")
    assert find_images(real, generated, drop_words=["sks"]).subjects[0].prompts == ("toy",)


def test_results_are_written_in_a_format_that_the_text_names(tmp_path):
    endings = re.findall(r"\.\w+\b", refusal(check_outputs, [tmp_path / "scores"]).partition("must end in ")[2])
    assert endings == [".json", ".md"]
    check_outputs([tmp_path / f"scores{ending}" for ending in endings])


# Encoders


def test_an_encoder_that_is_nowhere_is_a_folder_that_save_pretrained_wrote(tmp_path, clip_folder, vit_folder):
    folder = tmp_path / "clip"
    text = refusal(Encoders, folder, vit_folder)
    assert "give a folder into which save_pretrained wrote model, image processor and tokenizer" in text
    CLIPModel.from_pretrained(clip_folder).save_pretrained(folder)
    assert "image processor of CLIP" in refusal(Encoders, folder, vit_folder)
    AutoImageProcessor.from_pretrained(clip_folder, **_ON_PILLOW).save_pretrained(folder)
    AutoTokenizer.from_pretrained(clip_folder).save_pretrained(folder)
    assert Encoders(folder, vit_folder).image_features([noise(1)])[0].shape == (1, 24)


def test_each_encoder_is_of_the_kind_that_the_text_names(clip_folder, vit_folder):
    assert re.search(r"is a ViTModel, not a CLIP model such as \S+/\S+\.$", refusal(Encoders, vit_folder, vit_folder))
    text = refusal(Encoders, None, clip_folder)
    assert f"give a model such as {DINO}" in text
    Encoders(clip_folder, vit_folder)


def test_encoders_without_clip_measure_drift_and_get_one_for_the_rest(clip_folder, vit_folder):
    encoders = Encoders(None, vit_folder)
    text = refusal(evaluate_subject, encoders, [noise(1)], [noise(2)], ["a toy"])
    assert "so they measure drift alone; give Encoders a clip" in text
    assert measure_drift(encoders, [noise(1)], [noise(2)]).mean > 0
    encoders = Encoders(clip=clip_folder, dino=vit_folder)
    evaluate_subject(encoders, [noise(1)], [noise(2)], ["a toy"])


def test_a_batch_has_at_least_as_many_as_the_text_says(clip_folder, vit_folder):
    least = int(re.search(r"at least (\d)", refusal(Encoders, clip_folder, vit_folder, batch_size=0))[1])
    Encoders(clip_folder, vit_folder, batch_size=least)


@pytest.mark.parametrize("what", ["prompts", "files"])
def test_each_image_gets_its_prompt_and_name(what, encoders):
    plain = {"prompts": ["a toy", "a dog"], "files": ["a.png", "b.png"]}
    few = {**plain, what: plain[what][:1]}
    run = {"encoders": encoders, "real": [noise(1)], "generated": [noise(2), noise(3)]}
    assert "give one for each" in refusal(evaluate_subject, **run, **few)
    evaluate_subject(**run, **plain)


# LPIPS and the sheet


def test_lpips_takes_the_networks_and_the_places_that_the_text_names(tmp_path, monkeypatch):
    provide_torchvision(monkeypatch)
    text = refusal(Lpips, tmp_path / "nowhere.safetensors")
    networks = re.search(r"weights of torchvision's (\w+) or (\w+) in safetensors: a file, a folder", text).groups()
    for name in networks:
        (network,) = (short for short, make in NETWORKS.items() if make.__name__ == name)
        file = save_network(tmp_path / f"{network}.safetensors", network)
        assert Lpips(file).network == network
        assert "holds 2 safetensors files" in refusal(Lpips, tmp_path) if network == "alex" else Lpips(tmp_path)


def test_what_has_nothing_to_do_is_left_out_or_gets_both_folders(real, generated):
    drift, both = find_images(base_images=real, adapted_images=real), find_images(real, generated)
    sheet = SheetSettings(sheet="sheet.png")
    text = refusal(check_asked, drift, "weights", sheet)
    assert "Give both folders, or leave it out" in text
    check_asked(both, "weights", sheet)
    check_asked(drift, None, None)


def test_a_sheet_by_lpips_needs_its_weights(real, generated):
    images, sheet = find_images(real, generated), SheetSettings(sheet="sheet.png", sheet_score="lpips")
    assert "give lpips the weights of its network" in refusal(check_asked, images, None, sheet)
    check_asked(images, "weights", sheet)


# Numbers


@pytest.mark.parametrize(
    ("score", "wrong", "said", "right"),
    [
        (drift, (3, 2), "they go in pairs", (2, 2)),
        (text_similarity, (1, 2), "they go in pairs", (2, 2)),
        (image_similarity, (0, 1), "(images, width) of at least one image", (1, 1)),
    ],
)
def test_features_are_as_the_text_says(score, wrong, said, right):
    def features(count, width=4):
        return torch.ones(count, width)

    assert said in refusal(score, *map(features, wrong))
    score(*map(features, right))
    assert "one encoder must make both" in refusal(score, features(1), features(1, 5))
    with pytest.raises(EvaluationError, match="image 2 of 2 are zero or not finite"):
        score(features(2) * torch.tensor([[1.0], [0.0]]), features(2))
