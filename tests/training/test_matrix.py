"""What holds for every run, whatever is chosen: a covering array, in which each pair of choices meets in some run."""

import itertools
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusekrona import load_krona, unload_krona
from diffusekrona.bases.loading import load_base
from diffusekrona.errors import ConfigError, KronAError
from diffusekrona.training import DatasetError, TrainingConfigError, UnsupportedPipelineError
from diffusekrona.training.families import family_of
from diffusekrona.training.run import Outcome, run
from diffusekrona.training.settings import Settings, read_settings
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import copies, need, same, weights

BASES: dict[str, Callable[[], Any]] = {
    "sd1": tiny_sd_pipeline,
    "sd2": lambda: tiny_sd_pipeline(prediction_type="v_prediction"),
    "sdxl": tiny_sdxl_pipeline,
    "sd3": tiny_sd3_pipeline,
}

Values = dict[str, Any]
ABILITIES: dict[str, dict[str, Values]] = {
    "base": {name: {"pretrained_model_name_or_path": name} for name in BASES},
    "schedule": {
        "constant": {},
        "warmed": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1},
        "restarts": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
        "polynomial": {"lr_scheduler": "polynomial", "lr_power": 2.0},
    },
    "images": {
        "folder": {"instance_data_dir": "images"},
        "captions, one damaged": {
            "instance_data_dir": "captioned",
            "instance_prompt": None,
            "on_bad_image": "skip",
        },
        "dataset": {"dataset_dir": "dataset", "instance_prompt": None},
        "one": {"instance_data_dir": "one"},
    },
    "layers": {
        "attention": {"dropout": 0.1},
        "attention+ff": {"target_modules": "attention+ff", "factors": {r".*(ff\.net|mlp).*": (2, 4)}},
        "cross-attention": {"target_modules": "cross-attention", "init_a": "zeros", "init_b": "normal"},
        "pattern": {
            "target_modules": r".*\.(to_q|add_k_proj|q_proj|SelfAttention\.q)",
            "num_terms": 2,
            "b_rank": 2,
            "alpha": 0.5,
        },
    },
    "text encoders": {
        "frozen": {},
        "trained": {"train_text_encoder": True},
        "own rate": {"train_text_encoder": True, "text_encoder_lr": 3e-3},
    },
    "optimizer": {
        "adamw": {},
        "adamw8bit": {"optimizer": "adamw8bit"},
        "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    },
    "B": {"as fast as A": {}, "faster": {"loraplus_lr_ratio": 4.0}},
    "precision": {
        "float32": {},
        "bf16": {"mixed_precision": "bf16"},
        "float32 base": {"mixed_precision": "bf16", "dtype": "float32"},
    },
    "cache": {name: {"cache": name} for name in ("memory", "disk", "none")},
    "cut": {
        "middle": {},
        "random": {"center_crop": False, "repeats": 2},
        "buckets": {"aspect_ratio_buckets": True, "resolution": 40},
    },
    "batches": {
        "one": {},
        "two": {"train_batch_size": 2},
        "accumulated": {"gradient_accumulation_steps": 2},
    },
    "prior": {
        "none": {},
        "class": {"with_prior_preservation": True, "class_prompt": "a toy", "num_class_images": 1},
    },
    "flip": {"off": {}, "on": {"random_flip": True}},
    "recomputing": {"off": {}, "on": {"gradient_checkpointing": True}},
    "levels": {"alike": {}, "Min-SNR": {"snr_gamma": 5.0}},
    "noise": {"plain": {}, "offset": {"noise_offset": 0.1}},
    "clipping": {"off": {"max_grad_norm": 0.0}, "on": {"max_grad_norm": 1e-3}},
    "averages": {"off": {}, "on": {"ema_decay": 0.9}},
    "seeing": {"off": {}, "pictures": {"validation_prompt": ["a toy", "a toy on sand"], "validation_steps": 2}},
    "output": {"folder": {}, "file": {"output_dir": "toy.safetensors"}, "also LoKr": {"also": "lokr"}},
}
"""Each ability's choices and what they set. All that a choice leaves out is as by default."""

IMPOSSIBLE = [
    {"base": "sd3", "levels": "Min-SNR"},
    {"base": "sd3", "layers": "cross-attention"},
    {"text encoders": "trained", "layers": "cross-attention"},
    {"text encoders": "own rate", "layers": "cross-attention"},
    {"text encoders": "own rate", "optimizer": "prodigy"},
    {"B": "faster", "optimizer": "prodigy"},
    {"layers": "pattern", "output": "also LoKr"},
]
"""Choices that exclude each other; each has its error below."""

Choice = tuple[str, str]


def covering(seed: int = 7, tries: int = 8) -> list[dict[str, str]]:
    """Rows of one choice for each ability in which each possible pair of choices occurs, found greedily.

    Each row begins with a pair that is still open; the other abilities follow in random order, each by the choice that
    closes most open pairs. Of several such rows the one that closes most is taken.
    """
    draw = random.Random(seed)
    singles = [[(ability, choice) for choice in ABILITIES[ability]] for ability in ABILITIES]
    pairs = (pair for first, second in itertools.combinations(singles, 2) for pair in itertools.product(first, second))
    still_open = {frozenset(pair) for pair in pairs if _possible(dict(pair))}
    rows = []
    while still_open:
        start = min(still_open, key=sorted)
        best = max((_row(start, still_open, draw) for _ in range(tries)), key=lambda row: len(_pairs(row) & still_open))
        still_open -= _pairs(best)
        rows.append({ability: best[ability] for ability in ABILITIES})
    return rows


def _row(start: frozenset[Choice], still_open: set[frozenset[Choice]], draw: random.Random) -> dict[str, str]:
    row = dict(start)
    rest = [ability for ability in ABILITIES if ability not in row]
    for ability in draw.sample(rest, len(rest)):
        choices = [choice for choice in ABILITIES[ability] if _possible({**row, ability: choice})]
        closed = {
            choice: sum(frozenset({(ability, choice), other}) in still_open for other in row.items())
            for choice in draw.sample(choices, len(choices))
        }
        row[ability] = max(closed, key=lambda choice: closed[choice])
    return row


def _pairs(row: Mapping[str, str]) -> set[frozenset[Choice]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def _possible(row: Mapping[str, str]) -> bool:
    return not any(excluded.items() <= row.items() for excluded in IMPOSSIBLE)


ROWS = covering()


def test_each_possible_pair_of_choices_meets_in_some_run() -> None:
    met = {pair for row in ROWS for pair in _pairs(row)}
    for first, second in itertools.combinations(ABILITIES, 2):
        for pair in itertools.product(ABILITIES[first], ABILITIES[second]):
            row = dict(zip((first, second), pair, strict=True))
            assert (frozenset(row.items()) in met) == _possible(row), row
    assert all(row.keys() == ABILITIES.keys() for row in ROWS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all bases, and with images in every form."""
    folder = tmp_path_factory.mktemp("place")
    for name, build in BASES.items():
        build().save_pretrained(folder / name)
    pictures = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((48, 32), (32, 32), (20, 40))]
    for kind, some in (("images", pictures), ("captioned", pictures), ("one", pictures[:1])):
        (folder / kind).mkdir()
        for number, image in enumerate(some):
            image.save(folder / kind / f"{number}.png")
    for number in range(3):
        (folder / "captioned" / f"{number}.txt").write_text(f"a sks toy, number {number}")
    (folder / "captioned" / "damaged.png").write_bytes(b"no image")
    (folder / "captioned" / "damaged.txt").write_text("a sks toy")
    for name in ("sd1", "sd2", "sdxl"):  # so that one base is enough to draw class images
        (folder / f"class-{name}").mkdir()
        pictures[0].save(folder / f"class-{name}" / "own.png")
    if datasets := _datasets():
        rows = {"image": [str(folder / "images" / f"{n}.png") for n in range(3)], "text": [f"toy {n}" for n in "abc"]}
        found = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        found.save_to_disk(str(folder / "dataset"))
    return folder


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        return None
    return datasets


PLACES = ("pretrained_model_name_or_path", "instance_data_dir", "dataset_dir", "class_data_dir")


def values_of(row: Mapping[str, str], place: Path, output: Path) -> Values:
    """The settings of a row, with its places below one folder and its output below another."""
    chosen: Values = {
        "instance_prompt": "a sks toy", "output_dir": "toy", "a1": 4, "a2": 8,
        "max_train_steps": 3, "checkpointing_steps": 2, "learning_rate": 1e-2, "validation_inference_steps": 1,
    }  # fmt: skip
    for ability, choice in row.items():
        chosen.update(ABILITIES[ability][choice])
    if chosen.get("with_prior_preservation"):
        chosen["class_data_dir"] = f"class-{row['base']}"
    chosen = {name: str(place / value) if name in PLACES else value for name, value in chosen.items()}
    return {**chosen, "output_dir": output / chosen["output_dir"]}


@pytest.fixture
def trained_pipelines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that runs load, in which their adapters are when they are done."""
    loaded: list[Any] = []

    def load(*arguments: Any, **named: Any) -> Any:
        loaded.append(load_base(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr("diffusekrona.training.run.load_base", load)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(row.values()))
def test_whatever_is_chosen_a_run_is_sound(
    row: dict[str, str], place: Path, tmp_path: Path, trained_pipelines: list[Any]
) -> None:
    need(row["optimizer"])
    if row["images"] == "dataset":
        pytest.importorskip("datasets")
    chosen = values_of(row, place, tmp_path)
    settings = Settings.of(chosen)
    outcome = run(settings)
    (pipe,) = trained_pipelines
    assert len(outcome.result.losses) == 3
    assert outcome.result.images == {"one": 1}.get(row["images"], 3) * (2 if row["cut"] == "random" else 1)
    factors = factors_of(pipe)
    assert outcome.result.parameters == outcome.report.parameters == sum(one.numel() for one in factors.values())
    assert all(factor.isfinite().all() for factor in factors.values())
    everything_is_there(row, outcome)

    base = load_base(chosen["pretrained_model_name_or_path"], getattr(torch, settings.base_dtype))
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in weights(pipe).items() if "krona_" not in name}
    assert same(frozen, {name: one for name, one in weights(base).items() if name in frozen})
    assert any(name.startswith(("unet.", "transformer.")) for name in frozen)
    lend(base, pipe)

    plain, learnt = said(base), said(pipe)
    if row["precision"] != "bf16":  # a bfloat16 base may round the first steps' changes away
        assert not torch.equal(plain, learnt)
    for path in outcome.saved:
        load_krona(base, path)
        assert torch.equal(said(base), learnt), path.name
        unload_krona(base)
    assert torch.equal(said(base), plain)

    again = Settings.of({**read_settings(outcome.page.parent / "settings.yaml"), "output_dir": tmp_path / "again"})
    shutil.copytree(outcome.page.parent / "checkpoints", again.output.run_folder / "checkpoints")
    checkpoints = sorted((again.output.run_folder / "checkpoints").iterdir())
    assert [path.stem for path in checkpoints] == ["step-00000002", "step-00000003"]
    checkpoints[1].unlink()
    resumed = run(again.replace(output=again.output.replace(resume=True)))
    assert resumed.result.resumed_at == 2
    assert resumed.result.losses == outcome.result.losses
    assert same(factors_of(trained_pipelines[1]), factors)


def factors_of(pipe: Any) -> dict[str, Tensor]:
    """Copies of all factors of a pipeline by name."""
    return copies({name: tensor for name, tensor in weights(pipe).items() if "krona_" in name})


def lend(base: Any, pipe: Any) -> None:
    """Give a pipeline the encoders that the run took out of it, as they are in the base."""
    for name, module in base.components.items():
        if getattr(pipe, name) is None:
            setattr(pipe, name, module)


def said(pipe: Any) -> Tensor:
    """What the denoiser answers to one and the same noise and prompt."""
    family = family_of(pipe)
    family.denoiser.eval()
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(family.dtype)
    with torch.no_grad():
        text = {name: one.to(family.dtype) for name, one in family.encode(["a sks toy", "sand"], pipe.device).items()}
        return family.predict(noisy, torch.tensor([900, 300]), text, torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2))


def everything_is_there(row: Mapping[str, str], outcome: Outcome) -> None:
    """The files that a run leaves, and no others."""
    names = {"folder": ["toy", "toy.safetensors"], "file": ["toy.safetensors"]}
    lokr = ["toy", "toy.safetensors", "toy-lokr.safetensors"]
    assert [path.name for path in outcome.saved] == names.get(row["output"], lokr)
    folder = outcome.page.parent
    expected = {"report.html", "settings.yaml", "status.json", "written.json", "tensorboard", "checkpoints"}
    if row["cache"] == "disk":
        expected.add("cache")
    if row["seeing"] == "pictures":
        expected.add("validation")
        pictures = {f"step-{step:08d}-{number}.png" for step in (2, 3) for number in (0, 1)}
        assert {path.name for path in (folder / "validation").iterdir()} == {"sheet.png", *pictures}
    assert {path.name for path in folder.iterdir()} == expected
    assert any((folder / "tensorboard").iterdir())
    assert (outcome.saved[0] / "README.md").is_file() == (row["output"] != "file")


FORBIDDEN: list[tuple[Values, type[KronAError], str]] = [
    ({"mixed_precision": "fp16"}, TrainingConfigError, "mixed_precision='fp16' needs a GPU"),
    ({"pretrained_model_name_or_path": "sd3", "snr_gamma": 5.0}, UnsupportedPipelineError, "this base is a flow"),
    ({"pretrained_model_name_or_path": "sd3", "target_modules": "cross-attention"}, ConfigError, "no cross-attention"),
    ({"train_text_encoder": True, "target_modules": "cross-attention"}, ConfigError, "no cross-attention"),
    ({"train_text_encoder": True, "target_modules": ".*to_q"}, ConfigError, "fits no layer of the text_encoder"),
    ({"target_modules": ".*query"}, ConfigError, "fits no layer of the unet"),
    (
        {"train_text_encoder": True, "text_encoder_lr": 1e-4, "optimizer": "prodigy"},
        TrainingConfigError,
        "one learning",
    ),
    ({"text_encoder_lr": 1e-4}, TrainingConfigError, "train_text_encoder"),
    ({"num_terms": 2, "also": "lokr"}, TrainingConfigError, "LoKr holds one product"),
    ({"lr_warmup_steps": 1}, TrainingConfigError, "'constant' has no warm-up"),
    ({"a1": 3}, KronAError, "a1"),
    ({"instance_data_dir": "captioned"}, DatasetError, r"damaged\.png cannot be read"),
    ({"instance_prompt": None}, DatasetError, "has no prompt"),
    ({"with_prior_preservation": True}, TrainingConfigError, "class_prompt"),
    ({"resolution": 30}, TrainingConfigError, "not divisible"),
]


@pytest.mark.parametrize(("values", "kind", "said"), FORBIDDEN, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_said_before_the_first_step(
    values: Values, kind: type[KronAError], said: str, place: Path, tmp_path: Path
) -> None:
    chosen = {"pretrained_model_name_or_path": "sd1", "instance_data_dir": "images", "instance_prompt": "a sks toy"}
    chosen = {**chosen, "output_dir": tmp_path / "toy", "a1": 4, "a2": 8, **values}
    chosen = {name: str(place / value) if name in PLACES else value for name, value in chosen.items()}
    steps: list[Any] = []
    with pytest.raises(kind, match=said):
        run(Settings.of(chosen), steps.append)
    assert not steps
    assert not list(tmp_path.rglob("*.safetensors"))
