"""LPIPS by torchmetrics, against its formula in float64, and what its weights may be."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusekrona.errors import EvaluationError
from diffusekrona.evaluation import Encoders, Lpips, evaluate_folders, evaluate_subject, find_images, perceptual
from tests.evaluation.networks import lpips_by_hand, provide_torchvision, save_network
from tests.evaluation.pictures import noise, save

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    provide_torchvision(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("alex") / "alexnet.safetensors", "alex")


@pytest.fixture(scope="module")
def lpips(alex: Path) -> Iterator[Lpips]:
    with pytest.MonkeyPatch.context() as patch:
        provide_torchvision(patch)
        yield Lpips(alex, batch_size=2)


# The distance


def test_the_distance_is_the_formulas(lpips: Lpips, alex: Path) -> None:
    weights = load_file(alex)
    one, *others = [lpips.pixels(noise(seed)) for seed in range(4)]
    expected = [lpips_by_hand("alex", weights, one, other) for other in others]
    assert lpips.distances(one, others) == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 1e-3
    assert max(expected) > 1.05 * min(expected)
    assert lpips.network == "alex"


def test_vggs_distance_is_the_formulas_with_a_file_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "SIDE", 64)
    more = {"pre_logits.fc1.weight": torch.zeros(2, 2), "head.fc.weight": torch.zeros(2, 2)}
    lpips = Lpips(save_network(tmp_path / "model.safetensors", "vgg", **more))
    one, other = (lpips.pixels(noise(seed)) for seed in (0, 1))
    expected = lpips_by_hand("vgg", load_file(tmp_path / "model.safetensors"), one, other)
    assert lpips.distances(one, [other]) == pytest.approx([expected], rel=1e-3)
    assert expected > 1e-3
    assert lpips.network == "vgg"


def test_equal_images_are_at_no_distance_and_sides_do_not_matter(lpips: Lpips) -> None:
    a, b = lpips.pixels(noise(0)), lpips.pixels(noise(1))
    same, there = lpips.distances(a, [a, b])
    assert same == pytest.approx(0, abs=1e-7)
    assert lpips.distances(b, [a]) == pytest.approx([there], rel=1e-5)


@pytest.mark.parametrize(("size", "box"), [((500, 300), (100, 0, 400, 300)), ((300, 500), (0, 100, 300, 400))])
def test_the_middle_square_is_compared(lpips: Lpips, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = noise(3, size)
    square = image.crop(box).resize((256, 256), Image.Resampling.BICUBIC)
    found = lpips.pixels(image)
    assert found.shape == (3, 256, 256)
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy().astype(int), np.asarray(square, dtype=int), atol=1)


def test_weights_in_half_precision_are_computed_with_in_float32(alex: Path, lpips: Lpips, tmp_path: Path) -> None:
    save_file({name: value.half() for name, value in load_file(alex).items()}, tmp_path / "half.safetensors")
    half = Lpips(tmp_path / "half.safetensors")
    a, b = lpips.pixels(noise(0)), lpips.pixels(noise(1))
    assert half.distances(a, [b]) == pytest.approx(lpips.distances(a, [b]), rel=1e-2)


def test_making_it_draws_no_random_numbers(alex: Path) -> None:
    before = torch.random.get_rng_state()
    Lpips(alex)
    assert torch.equal(torch.random.get_rng_state(), before)


# Among the scores


@pytest.fixture(scope="module")
def with_lpips(clip_folder: Path, vit_folder: Path, alex: Path) -> Iterator[Encoders]:
    with pytest.MonkeyPatch.context() as patch:
        provide_torchvision(patch)
        yield Encoders(clip_folder, vit_folder, lpips=alex, batch_size=2)


def test_an_images_score_is_its_mean_distance_to_the_real_ones(with_lpips: Encoders, lpips: Lpips) -> None:
    real, generated = [noise(seed) for seed in (1, 2, 3)], [noise(4, (90, 50)).convert("RGBA"), noise(1)]
    found = evaluate_subject(with_lpips, iter(real), iter(generated), ["a dog", "a cat"])
    others = [lpips.pixels(image) for image in real]
    expected = [np.mean(lpips.distances(lpips.pixels(image.convert("RGB")), others)) for image in generated]
    assert found.lpips is not None
    assert found.lpips.values == pytest.approx(expected, rel=1e-5)
    assert found.measured == ("clip_i", "clip_t", "dino", "lpips")


def test_it_changes_no_other_score(with_lpips: Encoders, encoders: Encoders) -> None:
    given = [noise(1), noise(2)], [noise(3)], ["a dog"]
    plain, found = evaluate_subject(encoders, *given), evaluate_subject(with_lpips, *given)
    assert (found.clip_i, found.clip_t, found.dino) == (plain.clip_i, plain.clip_t, plain.dino)
    assert plain.lpips is None
    assert plain.measured == ("clip_i", "clip_t", "dino")
    with pytest.raises(EvaluationError, match="lpips was not measured"):
        plain.score("lpips")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    save(tmp_path / "real", a=1, b=2)
    save(tmp_path / "out", x=3, y=4)
    (tmp_path / "out" / "prompts.txt").write_text("a dog\na cat\n")
    save(tmp_path / "base", m=8)
    save(tmp_path / "adapted", m=9)
    return tmp_path


def test_the_json_and_the_table_have_it_where_it_was_measured(
    with_lpips: Encoders, encoders: Encoders, folders: Path, alex: Path
) -> None:
    images = find_images(
        folders / "real", folders / "out", base_images=folders / "base", adapted_images=folders / "adapted"
    )
    found, plain = evaluate_folders(with_lpips, images), evaluate_folders(encoders, images)
    written, without = found.as_json(), plain.as_json()
    assert written["models"].pop("lpips") == {"source": str(alex), "revision": None, "network": "alex"}
    (subject,) = written["subjects"]
    score = found.subjects[0].lpips
    assert score is not None
    assert subject.pop("lpips") == {
        "mean": score.mean,
        "spread": score.spread,
        "images": dict(zip(("x.png", "y.png"), score.values, strict=True)),
    }
    assert [image.pop("lpips") for image in subject["images"]] == list(score.values)
    for over in ("subjects", "images"):
        assert written["overall"][over].pop("lpips")["mean"] == pytest.approx(score.mean)
    assert written == without
    json.dumps(found.as_json(), allow_nan=False)
    head, _, row, drift = found.markdown().splitlines()
    assert head == "| subject | real | generated | CLIP-I | CLIP-T | DINO | LPIPS | drift |"
    assert row.endswith(f"| {score.mean:.3f} ± {score.spread:.3f} |  |")
    assert drift.count("|") == head.count("|")
    assert "LPIPS" not in plain.markdown()
    assert len(found.table().columns) == len(plain.table().columns) + 1


def test_drift_alone_does_not_name_it(with_lpips: Encoders, folders: Path) -> None:
    found = evaluate_folders(with_lpips, find_images(base_images=folders / "base", adapted_images=folders / "adapted"))
    assert found.models.keys() == {"dino"}
    assert found.lpips_network is None


# Weights


def test_a_folder_of_one_file_does_too(alex: Path, lpips: Lpips) -> None:
    found = Lpips(alex.parent)
    a, b = lpips.pixels(noise(0)), lpips.pixels(noise(1))
    assert found.distances(a, [b]) == lpips.distances(a, [b])
    assert (found.source, found.revision) == (str(alex.parent), None)


def test_a_repository_of_the_hub_is_fetched_at_its_revision(
    alex: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(alex.read_bytes())
    asked: dict[str, object] = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr("diffusekrona.storage.snapshot_download", fetch)
    assert Lpips("timm/alexnet@v1").revision == COMMIT
    assert (asked["name"], asked["revision"]) == ("timm/alexnet", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert Lpips("timm/alexnet").revision == COMMIT
    assert asked["revision"] is None


@pytest.mark.parametrize("source", ["vgg", "nobody/nothing", "nobody/nothing@main", "no such/folder/at/all"])
def test_weights_that_are_nowhere_are_named_with_what_to_give(source: str) -> None:
    with pytest.raises(
        EvaluationError, match=r"^The weights of LPIPS cannot be found: .*lpips takes .*safetensors"
    ) as error:
        Lpips(source)
    assert source.partition("@")[0] in str(error.value)
    assert "timm/vgg16.tv_in1k" in str(error.value)


def test_a_folder_has_no_revision(alex: Path) -> None:
    with pytest.raises(EvaluationError, match="no revision main"):
        Lpips(f"{alex.parent}@main")


def test_a_pickle_is_not_opened(alex: Path, tmp_path: Path) -> None:
    torch.save(load_file(alex), tmp_path / "alexnet.pth")
    with pytest.raises(EvaluationError, match=r"alexnet\.pth is a pickle.*in safetensors"):
        Lpips(tmp_path / "alexnet.pth")


@pytest.mark.parametrize(("count", "said"), [(0, "holds no safetensors files"), (2, "holds 2 safetensors files")])
def test_a_folder_of_none_or_of_two_files_is_refused(alex: Path, tmp_path: Path, count: int, said: str) -> None:
    for number in range(count):
        (tmp_path / f"{number}.safetensors").write_bytes(alex.read_bytes())
    with pytest.raises(EvaluationError, match=said):
        Lpips(tmp_path)


def test_another_network_is_refused(alex: Path, tmp_path: Path) -> None:
    renamed = {name.replace("features.10.", "features.11."): value for name, value in load_file(alex).items()}
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(EvaluationError, match=r"other\.safetensors does not hold the layers of vgg16 or alexnet"):
        Lpips(tmp_path / "other.safetensors")


@pytest.mark.parametrize("how", ["missing", "of another shape"])
def test_a_layer_that_is_missing_or_of_another_shape_is_named(alex: Path, tmp_path: Path, how: str) -> None:
    weights = load_file(alex)
    if how == "missing":
        del weights["features.8.bias"]
    else:
        weights["features.8.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(EvaluationError, match=r"part\.safetensors is not of LPIPS's network alex.*8\.bias"):
        Lpips(tmp_path / "part.safetensors")


def test_weights_that_are_no_numbers_are_named(alex: Path, tmp_path: Path) -> None:
    weights = load_file(alex)
    weights["features.8.bias"][0] = float("nan")
    save_file(weights, tmp_path / "damaged.safetensors")
    lpips = Lpips(tmp_path / "damaged.safetensors")
    with pytest.raises(EvaluationError, match=r"not finite.*damaged\.safetensors"):
        lpips.distances(lpips.pixels(noise(0)), [lpips.pixels(noise(1))])


# Packages


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["torchvision"], "LPIPS needs torchvision, which is not installed: pip install torchvision."),
        (
            ["torchmetrics", "torchvision"],
            "LPIPS needs torchmetrics and torchvision, which are not installed: pip install",
        ),
    ],
)
def test_missing_packages_are_told_in_one_line(
    alex: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str], said: str
) -> None:
    found = perceptual.find_spec
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(EvaluationError, match=re.escape(said)) as error:
        Lpips(alex)
    assert torch.__version__ in str(error.value)
    assert "\n" not in str(error.value)


def test_a_torchvision_of_another_build_is_told(alex: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its import ends so where torch is of another build."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        EvaluationError, match=r"cannot be loaded: operator nms does not exist\. torchvision must be the build"
    ):
        Lpips(alex)


def test_a_torchmetrics_without_the_class_is_told(alex: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torchmetrics.functional.image.lpips._NoTrainLpips")
    with pytest.raises(EvaluationError, match=r"LPIPS needs torchmetrics and .*cannot be loaded: .*_NoTrainLpips"):
        Lpips(alex)
