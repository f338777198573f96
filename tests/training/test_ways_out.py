"""What the trainer's errors tell users to do instead is done here, and works."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import nn

from diffusekrona import KronAConfig, inject_krona, merge_krona, unmerge_krona
from diffusekrona.errors import KronAError
from diffusekrona.training import (
    ImagePlan,
    TrainingConfig,
    accelerate_hooks,
    load_dataset,
    load_folder,
    prepare_images,
    training_resolution,
)
from diffusekrona.training.families import family_of
from diffusekrona.training.objective import objective_of
from diffusekrona.training.optimizers import optimizer_of
from diffusekrona.training.runtime import accelerator_for, sharding_of
from diffusekrona.training.settings import Settings, read_settings
from diffusekrona.training.zero import deepspeed_as_fsdp
from tests.pipelines import tiny_sd3_pipeline, tiny_sd_pipeline
from tests.refusals import refusal
from tests.training.processes import both
from tests.training.runs import QUICK, SMALL, adapted, pictures, train
from tests.training.test_loop import spoilt
from tests.training.test_script_hooks import ONE, Script, whole

PLAN = ImagePlan(8)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.fixture(autouse=True)
def environment():
    """What is set in a test is unset afterwards, and accelerate forgets its accelerator."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ |= before
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# Settings

NEEDED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "images", "output_dir": "toy"}


@pytest.mark.parametrize(
    ("wrong", "said", "right"),
    [
        ({"lr_warmup_steps": 5}, "Use 'constant_with_warmup'",
         {"lr_warmup_steps": 5, "lr_scheduler": "constant_with_warmup"}),
        ({"lr_warmup_steps": 5}, "or leave lr_warmup_steps out", {}),
        ({"lr_warmup_steps": 9, "max_train_steps": 9, "lr_scheduler": "cosine"}, "must be below max_train_steps (9)",
         {"lr_warmup_steps": 8, "max_train_steps": 9, "lr_scheduler": "cosine"}),
        ({"text_encoder_lr": 1e-4}, "turn train_text_encoder on",
         {"text_encoder_lr": 1e-4, "train_text_encoder": True}),
        ({"text_encoders_to_train": ["text_encoder_2"]}, "Set that",
         {"text_encoders_to_train": ["text_encoder_2"], "train_text_encoder": True}),
        ({"train_denoiser": False}, "Set that", {"train_denoiser": False, "train_text_encoder": True}),
        ({"text_encoders_to_train": [], "train_text_encoder": True}, "such as ['text_encoder_2']",
         {"text_encoders_to_train": ["text_encoder_2"], "train_text_encoder": True}),
        ({"text_encoders_to_train": ["text_encoder"], "train_text_encoder": True, "text_encoder_2_lr": 1e-4},
         "Name its text encoder there",
         {"text_encoders_to_train": ["text_encoder", "text_encoder_2"], "train_text_encoder": True,
          "text_encoder_2_lr": 1e-4}),
        ({"text_encoders_to_train": ["text_encoder"], "train_text_encoder": True, "text_encoder_2_lr": 1e-4},
         "or leave it out", {"text_encoders_to_train": ["text_encoder"], "train_text_encoder": True}),
        ({"instance_data_dir": None}, "Give either instance_data_dir", {}),
        ({"instance_data_dir": None}, "or dataset_dir", {"instance_data_dir": None, "dataset_dir": "rows"}),
        ({"instance_data_dir": None}, "or dataset_name", {"instance_data_dir": None, "dataset_name": "me/rows"}),
        ({"dataset_dir": "rows"}, "Give either instance_data_dir", {}),
        ({"dataset_config_name": "small"}, "Leave it out", {}),
        ({"with_prior_preservation": True}, "needs a class_prompt, such as 'a toy'",
         {"with_prior_preservation": True, "class_prompt": "a toy"}),
        ({"also": "lokr", "num_terms": 2}, "Leave one of them out", {"also": "lokr"}),
        ({"also": "lokr", "num_terms": 2}, "Leave one of them out", {"num_terms": 2}),
        ({"a1": "4"}, "a1 must be a whole number of at least 1", {"a1": 4}),
        ({"cache": "ram"}, "one of memory, disk, none", {"cache": "memory"}),
        ({"factors": 2}, "such as {'to_k|to_v': [2, 32]}", {"factors": {"to_k|to_v": [2, 32]}}),
        ({"seeds": 1}, "did you mean 'seed'?", {"seed": 1}),
    ],
)  # fmt: skip
def test_settings_that_are_changed_as_the_text_says_are_taken(wrong, said, right):
    assert said in refusal(Settings.of, {**NEEDED, **wrong})
    Settings.of({**NEEDED, **right})


def test_a_setting_that_stands_twice_in_a_file_is_left_out_once(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("base: a\npretrained_model_name_or_path: b\n")
    text = refusal(read_settings, path)
    once = re.search(r"once as (\w+)\. Leave one of them out", text)[1]
    path.write_text("".join(line for line in path.open() if not line.startswith(f"{once}:")))
    assert read_settings(path) == {"pretrained_model_name_or_path": "a"}


@pytest.mark.parametrize("resolution", [30, 3])
def test_a_resolution_is_one_that_the_text_names(resolution):
    pipe = tiny_sd_pipeline()
    near = re.search(r"use ([\d or]+)\.$", refusal(training_resolution, pipe, resolution))[1]
    for side in near.split(" or "):
        assert training_resolution(pipe, int(side)) == int(side)


# Images


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "dog.png")
    return tmp_path


def test_a_prompt_is_given_for_all_images_or_written_beside_one(folder):
    text = refusal(load_folder, folder, None, PLAN)
    assert "give one for all images" in text
    load_folder(folder, "a sks dog", PLAN)
    (folder / re.search(r"or write (\S+\.txt)\.", text)[1]).write_text("a dog")
    assert load_folder(folder, None, PLAN)[0].prompt == "a dog"


def test_an_empty_prompt_is_as_in_the_text(folder):
    load_folder(folder, re.search(r'such as "(.*)"', refusal(load_folder, folder, " ", PLAN))[1], PLAN)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG"])
def test_an_image_that_cannot_be_read_is_saved_again_or_taken_out(folder, suffix):
    (folder / "cat.png").write_bytes(b"no image")
    text = refusal(load_folder, folder, "a toy", PLAN)
    assert "Save it again as PNG or JPEG, or take it out" in text
    Image.new("RGB", (8, 8)).save(folder / "cat.png", suffix)
    assert len(load_folder(folder, "a toy", PLAN)) == 2
    (folder / "cat.png").unlink()
    assert len(load_folder(folder, "a toy", PLAN)) == 1


def test_prompts_are_one_or_as_many_as_images():
    images = pictures(2)
    assert "give one prompt, or one for each" in refusal(prepare_images, images, ["a"] * 3, PLAN)
    for prompts in ("a", ["a", "b"]):
        prepare_images(images, prompts, PLAN)


def test_a_dataset_is_one_that_save_to_disk_wrote_and_has_the_columns_that_are_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    place, image = tmp_path / "rows", Image.new("RGB", (8, 8))
    assert "is no dataset that save_to_disk wrote" in refusal(load_dataset, place, "a toy", PLAN)
    rows = datasets.Dataset.from_dict({"picture": [image], "said": [None]}).cast_column("picture", datasets.Image())
    rows.save_to_disk(place)
    image_column, _ = re.search(r"there are: (\w+), (\w+)\.", refusal(load_dataset, place, "a toy", PLAN)).groups()
    text = refusal(load_dataset, place, None, PLAN, image_column, "said")
    assert "write one, or give one for all" in text
    assert load_dataset(place, "a toy", PLAN, image_column)[0].prompt == "a toy"
    rows = datasets.Dataset.from_dict({"picture": [image], "said": ["a dog"]}).cast_column("picture", datasets.Image())
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
    text = refusal(load_dataset, tmp_path / "splits", None, PLAN, image_column, "said")
    one = re.search(r"give the folder of one of its splits: (\w+)\.", text)[1]
    assert load_dataset(tmp_path / "splits" / one, None, PLAN, image_column, "said")[0].prompt == "a dog"


# Optimizers


def parameters(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(2)) for name in names}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"loraplus_lr_ratio": 4}, "nothing that is trained is a B"),
        ({"text_encoder_2_lr": 1e-4, "train_text_encoder": True}, "no text_encoder_2 that is trained"),
    ],
)
def test_a_learning_rate_is_of_what_the_text_misses_or_left_out(wrong, said):
    found = parameters("unet.a.krona_A")
    assert said in refusal(optimizer_of, found, TrainingConfig(**wrong))
    optimizer_of(parameters("unet.a.krona_A", "unet.a.krona_B", "text_encoder_2.a.krona_A"), TrainingConfig(**wrong))
    optimizer_of(found, TrainingConfig())


@pytest.mark.parametrize("wrong", [{"text_encoder_lr": 0.5, "train_text_encoder": True}, {"loraplus_lr_ratio": 4}])
def test_prodigy_gets_no_other_learning_rates(wrong):
    pytest.importorskip("prodigyopt")
    found = parameters("unet.a.krona_A", "unet.a.krona_B", "text_encoder.a.krona_A")
    config = TrainingConfig(optimizer="prodigy", learning_rate=1.0, **wrong)
    assert "leave those of text encoders and of B out" in refusal(optimizer_of, found, config)
    optimizer_of(found, TrainingConfig(optimizer="prodigy", learning_rate=1.0, train_text_encoder=True))


# Processes and devices


@ON_CPU
def test_half_precision_without_a_gpu_is_another_that_the_text_names():
    def start(precision: str) -> None:
        with accelerator_for(precision):
            pass

    found = re.search(r"use '(\w+)' or '(\w+)'\.", refusal(start, "fp16")).groups()
    for precision in found:
        start(precision)


def of_both(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    del os.environ["ACCELERATE_USE_CPU"]

    def start() -> int:
        with accelerator_for("no") as accelerator:
            return accelerator.num_processes

    try:
        return {"processes": torch.tensor(start())}  # accelerate's first versions know of each other anyway
    except KronAError as error:
        text = str(error)
    PartialState._reset_state()  # a new process has none
    name, value = re.search(r"set (\w+)=(\w+) in the environment", text).groups()
    os.environ[name] = value
    return {"processes": torch.tensor(start())}


@ON_CPU
@pytest.mark.slow
def test_processes_on_cpus_know_of_each_other_by_the_variable_in_the_text(tmp_path):
    assert [int(found["processes"]) for found in both(of_both, tmp_path)] == [2, 2]


def sharding() -> Any:
    state: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin())
    return sharding_of(state)


def environment_of(text: str) -> dict[str, str]:
    """Entries of accelerate's configuration that a text names, as its launcher passes them on."""
    return {name.upper(): value for name, value in re.findall(r"\b(fsdp_\w+): (\w+)", text)}


@pytest.mark.parametrize(
    "settings",
    [
        {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
        {"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
    ],
)
def test_sharding_is_set_as_the_text_says(settings):
    os.environ |= {"ACCELERATE_USE_FSDP": "true", **settings}
    text = refusal(sharding)
    assert environment_of(text)
    os.environ |= environment_of(text)
    assert sharding() is not None
    if "ACTIVATION" in str(settings):
        assert re.search(r"gradient_checkpointing: set that", text)
        TrainingConfig(gradient_checkpointing=True)


def test_frozen_weights_are_kept_where_the_text_says():
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}
    name, *devices = re.search(r"set (\w+) to (\w+) or (\w+) in", refusal(deepspeed_as_fsdp)).groups()
    for device in devices:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", f"ACCELERATE_DEEPSPEED_{name.upper()}": device}
        deepspeed_as_fsdp()
        assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false"


def test_weights_that_cannot_be_split_are_loaded_unquantized_and_without_offloading():
    from diffusekrona.training.sharded import _check_splittable

    for bad in (torch.zeros(2, dtype=torch.int8), torch.zeros(2, device="meta")):
        text = refusal(_check_splittable, {"weight": nn.Parameter(bad, requires_grad=False)})
        assert "load the base unquantized and without offloading, or train without FSDP" in text
    _check_splittable({"weight": nn.Parameter(torch.zeros(2))})


# The loop


def test_what_diverges_goes_on_with_the_settings_in_the_text():
    config = QUICK.replace(max_train_steps=3)
    pipe, factors = adapted(**SMALL)
    spoilt(pipe, {2})
    text = refusal(train, pipe, factors, config)
    name, value = re.search(r'let such steps be skipped: (\w+) "(\w+)"', text).groups()
    pipe, factors = adapted(**SMALL)
    spoilt(pipe, {2})
    assert len(train(pipe, factors, config.replace(**{name: value})).losses) == 3
    assert "Try a learning rate below 0.01" in text
    wider = re.search(
        r'or (mixed_precision) "(\w+)"', refusal(train, *diverging(), config.replace(mixed_precision="bf16"))
    )
    assert train(*adapted(**SMALL), config.replace(**{wider[1]: wider[2]})).steps == 3


def diverging() -> tuple[Any, dict[str, nn.Parameter]]:
    pipe, factors = adapted(**SMALL)
    spoilt(pipe, {1})
    return pipe, factors


def test_a_checkpoint_of_another_run_is_resumed_with_its_settings_or_another_folder_is_chosen(tmp_path):
    train(*adapted(**SMALL), QUICK, folder=tmp_path / "one")
    other = QUICK.replace(learning_rate=0.5)
    text = refusal(train, *adapted(**SMALL), other, folder=tmp_path / "one", resume=True)
    assert "Resume with the settings that it was begun with, or start anew in another folder" in text
    before = float(re.search(r"learning_rate was (\S+) and is", text)[1])
    train(*adapted(**SMALL), other.replace(learning_rate=before), folder=tmp_path / "one", resume=True)
    train(*adapted(**SMALL), other, folder=tmp_path / "two", resume=True)


def test_a_cache_on_disk_gets_a_folder(tmp_path):
    config = QUICK.replace(cache="disk")
    assert "cache 'disk' needs a folder" in refusal(train, *adapted(**SMALL), config)
    train(*adapted(**SMALL), config, folder=tmp_path)


# Bases


@pytest.mark.parametrize(
    ("build", "wrong", "other"),
    [
        (tiny_sd_pipeline, {"weighting": "cosmap"}, {"snr_gamma": 5.0}),
        (tiny_sd3_pipeline, {"snr_gamma": 5.0}, {"weighting": "cosmap"}),
    ],
)
def test_a_weighting_of_the_other_kind_is_left_out_or_exchanged(build, wrong, other):
    scheduler, device = build().scheduler, torch.device("cpu")
    text = refusal(objective_of, scheduler, device, **wrong)
    name = re.search(r"Leave it out, or use (\w+)\.", text)[1]
    assert name.removeprefix("loss_") == next(iter(other))
    objective_of(scheduler, device)
    objective_of(scheduler, device, **other)
    TrainingConfig(**{name: next(iter(other.values()))})


def test_a_base_predicts_what_the_text_names():
    device = torch.device("cpu")
    kinds = re.search(
        r"that predicts ([\w, ]+)\.", refusal(objective_of, EulerDiscreteScheduler(prediction_type="x"), device)
    )
    for kind in kinds[1].split(", "):
        objective_of(DDPMScheduler(prediction_type=kind), device)


def test_a_base_that_fills_in_pictures_is_the_one_from_text_to_image():
    pipe = tiny_sd_pipeline()
    pipe.unet.register_to_config(in_channels=9)
    assert "Inpainting, depth and upscaling models are not supported; use the text-to-image model" in refusal(
        family_of, pipe
    )
    family_of(tiny_sd_pipeline())


# Scripts


def test_a_model_that_was_forgotten_is_named_as_in_the_text(tmp_path):
    script = Script(text_encoder=True, ours=False)
    given = {"unet": script.pipe.unet}
    accelerate_hooks(script.accelerator, **given)
    name, value = re.search(r"such as (\w+)=(\w+)\.", refusal(script.accelerator.save_state, str(tmp_path))).groups()
    script = Script(text_encoder=True, ours=False)
    accelerate_hooks(script.accelerator, unet=script.pipe.unet, **{name: getattr(script.pipe, value)})
    script.accelerator.save_state(str(tmp_path))


def test_models_are_named_as_in_the_text():
    pipe = tiny_sd_pipeline()
    text = refusal(accelerate_hooks, Accelerator(cpu=True), encoder=pipe.text_encoder)
    names = re.search(r"by their names, ([\w, ]+), and a (unet) or (transformer)", text)
    for denoiser in names.groups()[1:]:
        given = {name: pipe.text_encoder for name in names[1].split(", ") if name.startswith("text_encoder")}
        accelerate_hooks(Accelerator(cpu=True), **given, **{denoiser: pipe.unet})


def test_whatever_else_is_trained_is_frozen_before_the_optimizer_is_made_or_saved_with_the_adapter(tmp_path):
    def script(trained: bool, **fields: Any) -> Script:
        class Training(Script):
            def factors(self) -> Any:  # is asked for before the optimizer is made
                self.pipe.unet.conv_out.bias.requires_grad_(trained)
                return super().factors()

        return Training(adapters={"default": KronAConfig(**SMALL, **fields)})

    text = refusal(script(True).accelerator.save_state, str(tmp_path))
    assert "conv_out.bias of the unet" in text
    assert "freeze it before the optimizer is made" in text
    script(False).accelerator.save_state(str(tmp_path))
    field = re.search(r"KronAConfig\((\w+)=\[…\]\)", text)[1]
    saved = Script(adapters={"default": KronAConfig(**SMALL, **{field: ["conv_out"]})})
    saved.accelerator.save_state(str(tmp_path))


def test_factors_stay_what_they_are_where_a_pipeline_is_moved_without_a_dtype(tmp_path, caplog):
    script = Script()
    script.pipe.to("cpu")
    script.accelerator.save_state(str(tmp_path))
    assert not [record for record in caplog.records if "half precision" in record.message]
    script.pipe.to("cpu", dtype=torch.bfloat16)
    script.accelerator.save_state(str(tmp_path))
    assert "such as pipeline.to(…, dtype=…) for a validation: call it without a dtype" in caplog.text


def test_a_checkpoint_is_resumed_from_with_its_settings_or_another_one_is(tmp_path):
    whole(tmp_path / "first")
    other = {"default": KronAConfig(**{**SMALL, "a1": 2})}
    whole(tmp_path / "second", adapters=other)
    script = Script(adapters=other, seed=1)
    text = refusal(script.accelerator.load_state, str(tmp_path / "first"))
    assert "Resume from another checkpoint, or with the settings that this one was trained with" in text
    script.accelerator.load_state(str(tmp_path / "second"))
    Script(adapters=ONE, seed=1).accelerator.load_state(str(tmp_path / "first"))


def test_a_merged_adapter_is_unmerged_before_a_checkpoint_is_loaded(tmp_path):
    whole(tmp_path)
    script = Script(seed=1)
    merge_krona(script.pipe)
    assert "unmerge it first" in refusal(script.accelerator.load_state, str(tmp_path))
    unmerge_krona(script.pipe)
    script.accelerator.load_state(str(tmp_path))


def test_models_that_are_split_are_not_by_another_choice():
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    pipe = tiny_sd_pipeline()
    inject_krona(pipe)
    text = refusal(accelerate_hooks, accelerator, unet=pipe.unet)
    assert "choose multi-GPU without it in `accelerate config`, or train with `diffusekrona train`" in text
    accelerator.state.distributed_type = DistributedType.MULTI_GPU
    accelerate_hooks(accelerator, unet=pipe.unet)


def test_what_cannot_be_started_here_is_multi_gpu_or_fsdp(monkeypatch):
    def start() -> None:
        with accelerator_for("no"):
            pass

    monkeypatch.setattr("diffusekrona.training.runtime._POSSIBLE", ())
    assert "choose multi-GPU or FSDP in `accelerate config`, or start without it" in refusal(start)
    monkeypatch.undo()
    from diffusekrona.training.runtime import _POSSIBLE

    assert {DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.NO} <= set(_POSSIBLE)
    start()
