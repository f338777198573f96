"""Scripts of the form of Diffusers' own for LoRA, with one line more: they save, resume and finish with KronA."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_krona
from diffusekrona.errors import AdapterFileError, CheckpointError, TrainingConfigError
from diffusekrona.training import accelerate_hooks
from diffusekrona.tuner.components import unwrapped
from diffusekrona.tuner.injected import adapter_tensors
from tests.pipelines import TEXT_WIDTH, tiny_sd3_pipeline, tiny_sd_pipeline
from tests.training.processes import both
from tests.training.runs import SMALL, copies, same, weights

STEPS, SAVED_AT, EPOCH = 4, 2, 2
ONE = {"default": KronAConfig(**SMALL, dropout=0.2)}
TWO = {"first": KronAConfig(**SMALL), "second": KronAConfig(**{**SMALL, "a1": 2, "num_terms": 2})}
LORA = {"default": LoraConfig(target_modules=["to_q"])}


@pytest.fixture(autouse=True)
def no_accelerator_before():
    """accelerate keeps the settings of the first accelerator of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Script:
    """What a training script sets up: models with adapters, hooks, an optimizer, data; all prepared.

    `lora_hooks` says whether the script's own hooks for LoRA are registered "before" or "after" ours, or not at all.
    """

    adapters: dict[str, Any] = field(default_factory=lambda: ONE)
    text_encoder: bool = False
    compiled: bool = False
    lora_hooks: str | None = "before"
    ours: bool = True
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    called_with: list[list[str]] = field(default_factory=list)
    """The models that the script's own hooks were given, one list a call."""

    def __post_init__(self) -> None:
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=True, **self.options)
        torch.manual_seed(self.seed)
        self.pipe = tiny_sd_pipeline()
        for module in (self.pipe.unet, self.pipe.text_encoder, self.pipe.vae):
            module.requires_grad_(False)
        self.models = [self.pipe.unet, *([self.pipe.text_encoder] if self.text_encoder else [])]
        if self.accelerator.mixed_precision == "bf16":
            self.pipe.unet.to(torch.bfloat16)
        for model in self.models:
            for name, config in self.adapters.items():
                model.add_adapter(config, name)
        for parameter in self.factors().values():
            parameter.requires_grad_(True)
        if self.lora_hooks == "before":
            self.register_lora_hooks()
        if self.ours:
            self.krona = accelerate_hooks(self.accelerator, unet=self.pipe.unet, text_encoder=self.pipe.text_encoder)
        if self.lora_hooks == "after":
            self.register_lora_hooks()
        optimizer = torch.optim.AdamW([p for m in self.models for p in m.parameters() if p.requires_grad], lr=1e-2)
        if self.compiled:
            self.models[0] = torch.compile(self.models[0], backend="eager")
        data = DataLoader(torch.arange(EPOCH), shuffle=True)
        *self.models, self.optimizer, self.data = self.accelerator.prepare(*self.models, optimizer, data)
        if self.text_encoder:  # as Diffusers' scripts do, for gradient checkpointing
            unwrapped(self.models[1]).get_input_embeddings().requires_grad_(True)

    def register_lora_hooks(self) -> None:
        self.accelerator.register_save_state_pre_hook(self.save_lora)
        self.accelerator.register_load_state_pre_hook(self.load_lora)

    def save_lora(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        self.called_with.append([type(model).__name__ for model in models])
        layers = {}
        for model in models:
            part = "unet" if model is self.models[0] else "text_encoder"
            layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
            weights.pop()
        StableDiffusionPipeline.save_lora_weights(folder, **layers)

    def load_lora(self, models: list[nn.Module], folder: str) -> None:
        self.called_with.append([type(model).__name__ for model in models])
        models.clear()
        StableDiffusionPipeline.lora_state_dict(folder)

    def factors(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}.{key}": tensor
            for number, model in enumerate(self.models)
            for name in self.adapters
            for key, tensor in adapter_tensors(unwrapped(model), name).items()
        }

    def train(self, first: int = 0, last: int = STEPS, save_to: Path | None = None) -> None:
        for _ in range(first // EPOCH, last // EPOCH):
            for model in self.models:
                model.train()
            for number in self.data:
                first += 1
                with self.accelerator.accumulate(*self.models):
                    self.accelerator.backward(self.loss(number))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if save_to is not None and first == SAVED_AT and self.accelerator.is_main_process:
                    self.accelerator.save_state(str(save_to))

    def loss(self, number: Tensor) -> Tensor:
        noise = torch.randn(1, 4, 8, 8)
        text = torch.full((1, 7, TEXT_WIDTH), float(number))
        if self.text_encoder:
            text = self.models[1](number.view(1, 1).expand(1, 7))[0]
        predicted = self.models[0](noise.to(self.pipe.unet.dtype), 10, text.to(self.pipe.unet.dtype)).sample
        return functional.mse_loss(predicted.float(), noise)

    def state(self) -> dict[str, Tensor]:
        """The factors, and AdamW's moments."""
        moments = self.optimizer.state_dict()["state"]
        return copies(
            {**self.factors(), **{f"{p}.{key}": value for p, one in moments.items() for key, value in one.items()}}
        )


def whole(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """What an uninterrupted run has at its end; a checkpoint of its middle is in the folder."""
    script = Script(**settings)
    script.train(save_to=folder)
    return script.state()


def resumed(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """What a run has at its end that begins with other factors and other random numbers, and resumes."""
    script = Script(**settings, seed=1)
    script.accelerator.load_state(str(folder))
    script.train(first=SAVED_AT)
    return script.state()


RUNS = {
    "no other hooks": {"lora_hooks": None},
    "hooks for LoRA before ours": {"lora_hooks": "before"},
    "hooks for LoRA after ours": {"lora_hooks": "after"},
    "a text encoder, too": {"text_encoder": True},
    "two adapters": {"adapters": TWO, "text_encoder": True},
    "whole modules, too": {"adapters": {"default": KronAConfig(**SMALL, modules_to_save=["conv_out"])}},
    "in bf16": {"options": {"mixed_precision": "bf16"}},
}
COMPILED = {"compiled": True}


@pytest.mark.parametrize(
    "settings", [*RUNS.values(), pytest.param(COMPILED, marks=pytest.mark.slow)], ids=[*RUNS, "compiled"]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(settings, tmp_path):
    done = whole(tmp_path, **settings)
    assert any(key.endswith("krona_B") and bool(tensor.any()) for key, tensor in done.items())
    assert all(tensor.dtype == torch.float32 for tensor in done.values())
    assert same(resumed(tmp_path, **settings), done)
    assert not list(tmp_path.glob("model*")), "the frozen weights"


def test_hooks_for_lora_alone_stop_the_run_at_its_first_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="infer state dict type"):
        whole(tmp_path, ours=False)


@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_that_are_not_called_are_logged_once(order, tmp_path, caplog):
    caplog.set_level(logging.INFO, "diffusekrona")
    script = Script(lora_hooks=order)
    for number in range(2):
        script.accelerator.save_state(str(tmp_path / str(number)))
    script.accelerator.load_state(str(tmp_path / "1"))
    assert [record.message for record in caplog.records] == [
        f"Script.{name} is not called: each model that it would be given has a KronA adapter."
        for name in ("save_lora", "load_lora")
    ]
    assert not script.called_with


def pictures(pipe: Any) -> Tensor:
    numbers = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images: Tensor = pipe("a sks toy", num_inference_steps=2, latents=numbers, output_type="pt").images
    return images


def test_a_checkpoint_and_what_is_saved_at_the_end_draw_what_was_trained(tmp_path):
    script = Script(text_encoder=True)
    script.train(save_to=tmp_path / "checkpoint-2")
    trained = copies(script.factors())
    assert script.krona.save(tmp_path)
    for folder, equal in ((tmp_path, True), (tmp_path / "checkpoint-2", False)):
        pipe = tiny_sd_pipeline()
        krona = load_krona(pipe, folder)
        loaded = {key: tensor.detach() for key, tensor in krona.named_parameters()}
        assert len(loaded) == len(trained)
        assert same(dict(zip(loaded, trained.values(), strict=True)), loaded) is equal
        assert not torch.equal(pictures(pipe), pictures(tiny_sd_pipeline()))
    for model in script.models:
        model.eval()
    pipe = tiny_sd_pipeline()
    load_krona(pipe, tmp_path)
    assert torch.equal(pictures(pipe), pictures(script.pipe))


def test_a_transformer_is_saved_and_filled_like_a_unet(tmp_path):
    pipes = [tiny_sd3_pipeline(), tiny_sd3_pipeline()]
    for seed, pipe in enumerate(pipes):
        torch.manual_seed(seed)
        inject_krona(pipe, KronAConfig(init_weights=False), text_encoders=True)
    accelerator = Accelerator(cpu=True)
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    accelerate_hooks(accelerator, **{part: getattr(pipes[0], part) for part in parts})
    accelerator.prepare(pipes[0].transformer)
    accelerator.save_state(str(tmp_path))
    accelerator = Accelerator(cpu=True)
    accelerate_hooks(accelerator, **{part: getattr(pipes[1], part) for part in parts})
    accelerator.prepare(pipes[1].transformer)
    assert not same(weights(pipes[0]), weights(pipes[1]))
    accelerator.load_state(str(tmp_path))
    assert same(weights(pipes[0]), weights(pipes[1]))


def test_several_adapters_have_a_folder_each(tmp_path):
    script = Script(adapters=TWO)
    script.train(save_to=tmp_path)
    for name, config in TWO.items():
        pipe = tiny_sd_pipeline()
        load_krona(pipe, tmp_path / name, name)
        assert pipe.unet.peft_config[name].num_terms == config.num_terms


# Models without KronA


def test_without_krona_adapters_the_script_trains_lora_as_ever(tmp_path):
    script = Script(adapters=LORA)
    script.accelerator.save_state(str(tmp_path))
    script.accelerator.load_state(str(tmp_path))
    assert script.called_with == [["UNet2DConditionModel"]] * 2
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    assert not script.krona.save(tmp_path / "final")
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("first", [True, False])
def test_other_models_are_left_to_accelerate_and_to_the_scripts_hooks(first, tmp_path):
    scripts = [Script(lora_hooks=None), Script(lora_hooks=None, seed=1)]
    others, seen = [], []
    for script in scripts:
        other = script.accelerator.prepare(nn.Linear(2, 3))
        others.append(other)
        if first:  # prepared first
            script.accelerator._models.reverse()
        script.accelerator.register_save_state_pre_hook(lambda *given: seen.append((list(given[0]), list(given[1]))))
        script.accelerator.register_load_state_pre_hook(lambda *given: seen.append((list(given[0]), None)))
    scripts[0].accelerator.save_state(str(tmp_path))
    scripts[1].accelerator.load_state(str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}
    assert same(others[0].state_dict(), others[1].state_dict())
    assert same(scripts[0].factors(), scripts[1].factors())
    assert [models for models, _ in seen] == [[others[0]], [others[1]]]
    assert [given.keys() for given in seen[0][1]] == [others[0].state_dict().keys()]


# Checkpoints that cannot be resumed from


def overwrite(folder: Path, content: bytes = b"damaged") -> None:
    (folder / "unet" / "adapter_model.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    overwrite(folder, (folder / "unet" / "adapter_model.safetensors").read_bytes()[:-10])


def without(folder: Path, part: str = "unet") -> None:
    for file in (folder / part).iterdir():
        file.unlink()


def not_finite(folder: Path) -> None:
    path = folder / "text_encoder" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)


BROKEN = {
    "damaged": (overwrite, "is not a complete safetensors file"),
    "truncated": (truncate, "is not a complete safetensors file"),
    "one part missing": (without, "holds an adapter for text_encoder, but 'default' is one for unet, text_encoder"),
    "all missing": (lambda at: [without(at), without(at, "text_encoder")], "holds no adapter_model.safetensors"),
    "not finite": (not_finite, r"1 tensor\(s\) without finite values"),
}


def refused(script: Script, folder: Path, text: str) -> None:
    before = copies(weights(script.pipe))
    with pytest.raises(CheckpointError, match=f"(?s)no model has changed: .*{text}.* Resume from another checkpoint"):
        script.accelerator.load_state(str(folder))
    assert same(weights(script.pipe), before)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(kind, tmp_path):
    spoil, text = BROKEN[kind]
    whole(tmp_path, text_encoder=True)
    spoil(tmp_path)
    refused(Script(text_encoder=True, seed=1), tmp_path, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a1": 2}, r"misshapen: .*krona_A is 4 × 64, not 2 × 64"),
        ({"target_modules": ["to_q", "to_k", "q_proj"]}, r"missing from the file: .*to_k.krona_A"),
        ({"alpha": 2.0}, "has alpha 1 and the layout 'kron' in .*to_q, but 'default' has 2 and 'kron' there"),
        ({"layout": "transposed"}, "but 'default' has 1 and 'transposed' there"),
    ],
)
def test_another_adapters_checkpoint_is_refused_and_changes_nothing(change, text, tmp_path):
    whole(tmp_path)
    refused(Script(adapters={"default": KronAConfig(**{**SMALL, **change})}, seed=1), tmp_path, text)


def test_where_the_second_of_two_adapters_does_not_fit_the_first_is_not_filled(tmp_path):
    whole(tmp_path, adapters=TWO)
    others = {**TWO, "second": KronAConfig(**SMALL)}
    refused(Script(adapters=others, seed=1), tmp_path, "second.* does not fit")


def test_a_merged_adapter_is_not_filled(tmp_path):
    whole(tmp_path)
    script = Script(seed=1)
    merge_krona(script.pipe)
    refused(script, tmp_path, "'default' is merged into .*; unmerge it first")


# What cannot be saved


def test_factors_that_are_not_finite_are_not_saved(tmp_path):
    script = Script()
    with torch.no_grad():
        next(iter(script.factors().values()))[0, 0] = torch.nan
    with pytest.raises(AdapterFileError, match="NaN; nothing was saved"):
        script.accelerator.save_state(str(tmp_path))


def test_whatever_else_is_trained_is_an_error_that_names_it(tmp_path):
    script = Script()
    bias = script.pipe.unet.conv_in.bias.requires_grad_(True)
    script.optimizer.add_param_group({"params": [bias]})
    with pytest.raises(TrainingConfigError, match=r"also trains conv_in.bias of the unet.*modules_to_save"):
        script.accelerator.save_state(str(tmp_path))


def test_a_model_that_was_not_named_is_an_error(tmp_path):
    script = Script(text_encoder=True, ours=False)
    accelerate_hooks(script.accelerator, unet=script.pipe.unet, text_encoder=None)
    with pytest.raises(TrainingConfigError, match=r"prepared CLIPTextModel has a KronA adapter.*add it there"):
        script.accelerator.save_state(str(tmp_path))


def test_a_warning_says_once_that_factors_were_rounded(tmp_path, caplog):
    script = Script()
    script.accelerator.save_state(str(tmp_path))
    script.pipe.to(dtype=torch.bfloat16)
    script.accelerator.save_state(str(tmp_path))
    script.accelerator.save_state(str(tmp_path))
    warnings = [record.message for record in caplog.records if record.name.startswith("diffusekrona")]
    assert len(warnings) == 1
    assert "to_q.krona_A of the unet and 27 more of what is trained are in half precision" in warnings[0]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["unet", "vae"], "it was given unet, vae"),
        (["text_encoder"], "a unet or transformer among them; it was given text_encoder"),
        ([], "it was given none"),
    ],
)
def test_models_have_the_names_that_a_pipeline_has_for_them(given, text):
    pipe = tiny_sd_pipeline()
    with pytest.raises(TrainingConfigError, match=text):
        accelerate_hooks(Accelerator(cpu=True), **{part: getattr(pipe, part) for part in given})


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_models_that_are_split_over_processes_are_refused_at_once(kind):
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(TrainingConfigError, match=rf"{kind.value}, which splits models.*diffusekrona train"):
        accelerate_hooks(accelerator, unet=tiny_sd_pipeline().unet)


# Several processes


def one_of_two(rank, folder):
    """Both runs, one after the other; the main process alone saves, as in Diffusers' scripts."""
    checkpoint = folder / "checkpoint-2"
    done = whole(checkpoint, text_encoder=True)
    script = Script(text_encoder=True, seed=1)
    script.accelerator.wait_for_everyone()
    assert type(script.models[0]).__name__ == "DistributedDataParallel"
    script.accelerator.load_state(str(checkpoint))
    saved = load_file(checkpoint / "unet" / "adapter_model.safetensors")
    filled = adapter_tensors(script.pipe.unet, "default")
    assert same({f"base_model.model.{key}": tensor for key, tensor in filled.items()}, saved)
    assert script.krona.save(folder / f"final-{rank}")
    return copies(done)


@pytest.mark.slow
def test_two_processes_save_once_and_both_resume(tmp_path):
    first, second = both(one_of_two, tmp_path)
    assert same(first, second)
    load_krona(tiny_sd_pipeline(), tmp_path / "checkpoint-2")
    assert (tmp_path / "final-0").is_dir()
    assert not (tmp_path / "final-1").exists()
