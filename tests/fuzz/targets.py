"""What is fuzzed: each target reads a file of one kind and does with it all that a user could."""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from diffusekrona.errors import KronAError
from diffusekrona.files import merge_base
from diffusekrona.files.convert import Target as Nearest
from diffusekrona.files.convert import approximated
from diffusekrona.files.formats.krona import CONFIG_NAME, WEIGHTS_NAME
from diffusekrona.files.formats.scales import HEADER as PEFT_HEADER
from diffusekrona.files.inspect import inspect_file
from diffusekrona.files.layouts.names import layer_names
from diffusekrona.files.layouts.unet import original_names
from diffusekrona.files.read import read_adapters, updates_in
from diffusekrona.storage import read_names, read_safetensors
from tests.fuzz import files
from tests.pipelines import tiny_sd_pipeline

LONGEST_TEXT = 100_000
"""Characters of an error's text, which names what is wrong with a file of 64 KiB."""


class Target(NamedTuple):
    """A reader, and small valid files for it; it raises nothing but our own errors."""

    seeds: Callable[[], Iterable[bytes]]
    read: Callable[[bytes, Path], None]


@cache
def _model() -> dict[str, torch.nn.Module]:
    return {"": files.Model()}


@torch.no_grad()
def adapter(content: bytes, folder: Path) -> None:
    """Load it, merge it and look for the nearest products, with a model."""
    path = folder / "x.safetensors"
    path.write_bytes(content)
    _adapter(path)


def _adapter(path: Path) -> None:
    for saved in _ours(read_adapters, path, _model(), otherwise={}).values():
        assert all(bool(tensor.float().isfinite().all()) for tensor in saved.tensors.values())
    for (part, name), update in _ours(updates_in, path, _model(), otherwise={}).items():
        layer = _model()[part].get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        change = None if update.bias_only else _ours(update.change, weight)
        assert change is None or change.shape == weight.shape
        if update.dora_scale is None:
            _ours(approximated, {(part, name): update}, Nearest(factors=(1, 1), num_terms=1))


@torch.no_grad()
def peft_folder(content: bytes, folder: Path) -> None:
    """A folder as PEFT writes it, with the config in a file of its own."""
    try:
        tensors, metadata = read_safetensors(_written(folder / "x.safetensors", content))
    except KronAError:
        return
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(metadata.pop(PEFT_HEADER, "{}"), encoding="utf-8")
    (folder / "x.safetensors").unlink()
    _adapter(folder)
    _ours(inspect_file, folder)


def inspection(content: bytes, folder: Path) -> None:
    """All that `diffusekrona inspect` prints."""
    found = _ours(inspect_file, _written(folder / "x.safetensors", content))
    if found is not None:
        assert bool(found.table().row_count) == bool(found.layers)
        assert found.table(every_layer=True).row_count == len(found.layers)
        json.dumps([found.parameters, found.norm, found.metadata])


def opening(content: bytes, folder: Path) -> None:
    """Names, metadata and every tensor."""
    path = _written(folder / "x.safetensors", content)
    tensors, metadata = _ours(read_safetensors, path, otherwise=({}, {}))
    assert all(isinstance(value, str) for value in metadata.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
    names, _ = _ours(read_names, path, otherwise=([], {}))
    assert set(tensors) <= set(names)


@cache
def _base() -> tuple[dict[str, torch.nn.Module], bytes, bytes]:
    """A tiny pipeline's models, some of its weights as a single file in the original layout, and an adapter for it."""
    pipe = tiny_sd_pipeline()
    layers = [name for name in layer_names(pipe.unet) if name.endswith("attn1.to_q")][:3]
    weights, factors = {"cond_stage_model.transformer.text_model.x": torch.ones(3)}, {}
    for name, original in original_names(pipe.unet, layers).items():
        weight = pipe.unet.get_submodule(name).weight.detach()
        weights[f"model.diffusion_model.{original}.weight"] = weight.half().clone()
        factors[f"unet.{name}.lora_A.weight"] = torch.ones(1, weight.shape[1])
        factors[f"unet.{name}.lora_B.weight"] = torch.ones(weight.shape[0], 1)
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return models, save(weights, {"format": "pt"}), save(factors)


def bases() -> Iterable[bytes]:
    yield _base()[1]


def base(content: bytes, folder: Path) -> None:
    """A single file of a base, with an adapter merged into it."""
    models, _, adapter = _base()
    path, output = _written(folder / "base.safetensors", content), folder / "merged.safetensors"
    of_it = _written(folder / "adapter.safetensors", adapter)
    with mock.patch.object(merge_base, "build_pipeline", return_value=models):
        if _ours(merge_base.merge_into_files, path, of_it, output) is not None:
            assert output.stat().st_size == len(content)
    assert {one.name for one in folder.iterdir()} <= {path.name, of_it.name, output.name}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _ours(call, *arguments, otherwise=None):  # type: ignore[no-untyped-def]
    """The result, or `otherwise` where it raises one of our errors, which has a text."""
    try:
        return call(*arguments)
    except KronAError as error:
        if not 0 < len(str(error)) < LONGEST_TEXT:
            raise AssertionError(f"an error of {len(str(error))} characters") from error
        return otherwise


def every_adapter() -> Iterable[bytes]:
    for target in ("krona", "lokr", "lora", "loha", "full", "reference", "multiplying", "peft"):
        yield from TARGETS[target].seeds()


TARGETS = {
    "krona": Target(files.krona, adapter),
    "lokr": Target(files.lokr, adapter),
    "lora": Target(files.lora, adapter),
    "loha": Target(files.loha, adapter),
    "full": Target(files.full, adapter),
    "reference": Target(files.reference, adapter),
    "multiplying": Target(files.multiplying, adapter),
    "peft": Target(files.peft, adapter),
    "peft_folder": Target(files.peft, peft_folder),
    "inspect": Target(every_adapter, inspection),
    "merge": Target(bases, base),
    "safetensors": Target(every_adapter, opening),
}


def run(target: Target, content: bytes) -> None:
    """Read one file, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target.read(content, Path(folder))
