"""What our texts tell users to type exists: commands, flags, arguments, functions, packages."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer.main
from accelerate.commands.launch import launch_command_parser
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig, PeftModel
from prodigyopt import Prodigy

import diffusekrona
from diffusekrona import evaluation, training
from diffusekrona.cli import app
from diffusekrona.serving.endpoint import ImagesRequest
from diffusekrona.training.script_names import MEANT
from diffusekrona.training.settings import NAMES
from diffusekrona.tuner.names import DENOISERS, TEXT_ENCODERS

SOURCE = Path(diffusekrona.__file__).parent
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


class Text(NamedTuple):
    """A text of the source that has several words and is no docstring; `…` stands for what is put in."""

    place: str
    words: str


def texts_of(source: str, place: str) -> Iterator[Text]:
    tree = ast.parse(source)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        words = ""
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            words = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value
        if " " in words.strip():
            yield Text(f"{place}:{node.lineno}", words)


TEXTS = [
    text
    for path in sorted(SOURCE.rglob("*.py"))
    for text in texts_of(path.read_text(encoding="utf-8"), str(path.relative_to(SOURCE)))
]
COMMANDS = {
    name: {option for parameter in command.params for option in parameter.opts}
    for name, command in typer.main.get_command(app).commands.items()
}


def parameters_of(public: Any) -> set[str]:
    found = set(inspect.signature(public).parameters)
    if inspect.isclass(public):
        for name, member in inspect.getmembers(public, inspect.isfunction):
            if not name.startswith("_") and member.__module__.startswith("diffusekrona"):
                found |= {name, *inspect.signature(member).parameters}
    return found


def our_names() -> set[str]:
    """What a user can write: public names, their arguments and methods, settings, also by Diffusers' names, and
    components of pipelines."""
    found = {*NAMES, *MEANT, *DENOISERS, *TEXT_ENCODERS}
    for package in (diffusekrona, training, evaluation):
        for name in package.__all__:
            public = getattr(package, name)
            plain = not callable(public) or (inspect.isclass(public) and issubclass(public, BaseException))
            found |= {name} | (set() if plain else parameters_of(public))
    return found


THEIRS = {
    "from_unet": ControlNetModel.from_unet,
    "fuse_qkv_projections": StableDiffusionPipeline.fuse_qkv_projections,
    "from_pretrained": DiffusionPipeline.from_pretrained,
    "from_single_file": StableDiffusionPipeline.from_single_file,
    "load_textual_inversion": StableDiffusionPipeline.load_textual_inversion,
    "save_pretrained": DiffusionPipeline.save_pretrained,
}
"""Names of other libraries, and what they name."""

THEIR_ARGUMENTS = {
    "dtype": DiffusionPipeline.to,
    "init_lora_weights": LoraConfig,
    "path_initial_model_for_weight_conversion": PeftModel.save_pretrained,
    "safeguard_warmup": Prodigy,
    "use_bias_correction": Prodigy,
    "weight_decay": torch.optim.AdamW,
}
"""Arguments of other libraries, and what takes them."""

OF_ACCELERATE = {"fsdp_version", "fsdp_reshard_after_forward", "fsdp_activation_checkpointing", "offload_param_device"}
"""Keys of `accelerate config`, which its launcher has as flags."""

IN_FILES = {
    "feedforward_modules", "file_name", "hada_w1_a", "ia3_l", "lokr_w1", "lora_up", "model_index",
    "num_cayley_neumann_terms", "oft_blocks", "on_input", "peft_config", "rs_lora", "scaled_oft", "ss_network_args",
    "ss_network_dim",
    "to_k", "to_q", "to_v", "use_cayley_neumann",
}  # fmt: skip
"""Names of layers, and of what files hold: nothing that a user types."""

OTHERS = {"allow_tf32", "constant_with_warmup", "logit_normal", "save_to_disk"}
"""A switch of PyTorch, a schedule, a kind of sampling, and a method of the package datasets."""

OF_ENDPOINT = {*ImagesRequest.model_fields, "b64_json"}
"""What a request to the server may hold."""

KNOWN = our_names() | OF_ENDPOINT | THEIRS.keys() | THEIR_ARGUMENTS.keys() | OF_ACCELERATE | IN_FILES | OTHERS


def unknown_names(text: Text) -> set[str]:
    """Of `name_with_underscores`, but not where texts speak of other people's models."""
    if text.place.startswith(("files/layouts/", "training/families/")):
        return set()
    return set(re.findall(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b", text.words)) - KNOWN


def unknown_arguments(text: Text) -> set[str]:
    """Of `name=value`, but not of what looks so in HTML."""
    return set() if "<" in text.words else set(re.findall(r"(?<![\w|])([a-z]\w+)=(?!=)", text.words)) - KNOWN


def unknown_flags(text: Text) -> set[str]:
    """Flags that no command has, or not the one that they stand behind."""
    found = set()
    for part in re.split(r"[`;)]|\. |(?=\bdiffusekrona )", text.words):
        command = re.match(r"diffusekrona (\w+)", part)
        allowed = COMMANDS.get(command[1] if command else "", set().union(*COMMANDS.values()))
        found |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", part)) - allowed
    return found


def unknown_commands(text: Text) -> set[str]:
    found = set(re.findall(r"\bdiffusekrona ([a-z]+)\b", text.words)) - {"import"}
    return found - COMMANDS.keys()


def unknown_packages(text: Text) -> set[str]:
    """Of `pip install …`, where pyproject.toml does not name them, nor the extra."""
    project = PROJECT.read_text(encoding="utf-8")
    found = set()
    for package, extra in re.findall(r"pip install '?([\w-]+)(?:\[(\w+)\])?", text.words):
        declared = f"\n{extra} = [" if extra else f'"{package}>='
        if declared not in project and package != "wandb":
            found.add(package)
    return found


CHECKS = [unknown_names, unknown_arguments, unknown_flags, unknown_commands, unknown_packages]


@pytest.mark.parametrize("check", CHECKS)
def test_what_a_text_tells_to_type_exists(check):
    assert {text.place: found for text in TEXTS if (found := check(text))} == {}


@pytest.mark.parametrize(
    ("check", "words", "found"),
    [
        (unknown_names, "leave them out with exclude_module", "exclude_module"),
        (unknown_arguments, "the nearest is combination='svd'", "combination"),
        (unknown_flags, "Give --prompts, or nothing", "--prompts"),
        (unknown_flags, "needs `diffusekrona convert --prompt`", "--prompt"),
        (unknown_flags, "Give --prompt to diffusekrona convert --steps", "--steps"),
        (unknown_commands, "use `diffusekrona approximate` for that", "approximate"),
        (unknown_packages, "needs it: pip install dataset", "dataset"),
        (unknown_packages, "needs it: pip install 'diffusekrona[trains]'", "diffusekrona"),
    ],
)
def test_a_name_that_does_not_exist_is_found(check, words, found):
    assert {one for text in texts_of(f"raise KronAError(f'''{words} {{x}}''')", "here") for one in check(text)} == {
        found
    }


def test_names_of_others_are_theirs():
    for name, owner in THEIRS.items():
        assert callable(owner)
        assert owner.__name__ == name
    for name, owner in THEIR_ARGUMENTS.items():
        assert name in inspect.signature(owner).parameters or f"{name} (" in (inspect.getdoc(owner) or "")
    flags = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    assert {f"--{name}" for name in OF_ACCELERATE} <= flags


def test_every_exception_of_the_list_is_needed():
    used = {name for text in TEXTS for name in re.findall(r"\b[a-z][a-z0-9_]*\b", text.words)}
    assert {*THEIRS, *THEIR_ARGUMENTS, *OF_ACCELERATE, *IN_FILES, *OTHERS} <= used
