"""The base model: a Diffusers pipeline from a folder or the Hugging Face hub, or an error saying why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from .errors import KronAError
from .quantization import Quantization, after_loading, index_of, on_loading


class BaseModelError(KronAError):
    """There is no such base model, or its folder is not a whole pipeline."""


def load_base(base: str | Path, dtype: torch.dtype = torch.float32, quantization: Quantization | None = None) -> Any:
    """Load a pipeline of any class, on the CPU; models that a GPU quantizes are on that.

    Args:
        base: a folder that `save_pretrained` wrote, or the id of a model on the hub, such as "owner/name".
        dtype: of the weights.
        quantization: what to make of the linear layers.

    Raises:
        BaseModelError: neither a folder nor a model that the hub or its local cache has, or a broken folder.
        QuantizationError: a package is missing.
    """
    folder = Path(base).expanduser()
    if quantization is not None and any(quantization):
        return _quantized(base, dtype, quantization)
    if folder.is_dir():
        return _from_folder(folder, dtype)
    if folder.is_file():
        raise BaseModelError(
            f"{folder} is a file, but a base model is a folder in Diffusers' layout. Convert it once with "
            "StableDiffusionXLPipeline.from_single_file(file).save_pretrained(folder), or the same of "
            "StableDiffusionPipeline."
        )
    return _from_hub(str(base), folder.absolute(), dtype)


def _quantized(base: str | Path, dtype: torch.dtype, quantization: Quantization) -> Any:
    quantization.check()
    options = {"quantization_config": on_loading(quantization, index_of(base_configs(base)), dtype)}
    folder = Path(base).expanduser()
    if folder.is_dir():
        pipe = _from_folder(folder, dtype, **options)
    else:
        pipe = _from_hub(str(base), folder.absolute(), dtype, **options)
    after_loading(quantization, pipe, dtype)
    return pipe


def base_configs(base: str | Path) -> Path:
    """A folder with a pipeline's configurations; of a model on the hub, nothing else is fetched.

    Raises:
        BaseModelError: neither a folder nor a model that the hub or its local cache has.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(base), allow_patterns="*.json"))
    except (OSError, ValueError) as error:
        raise _no_such_base(str(base), folder.absolute(), error) from error


def config_in_float32(path: Path) -> str:
    """A model's config.json, changed so that a plain `from_pretrained` of its folder gives float32.

    Without a dtype, transformers takes the one in config.json, or that of the stored weights, while Diffusers takes
    float32. A pipeline of both then fails at its first picture. Configurations of Diffusers' models and of quantized
    ones stay as they are.

    Raises:
        BaseModelError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        config = dict(json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"{path} is not a model's configuration that can be read: {error}") from error
    found = config.get("dtype", config.get("torch_dtype"))
    if found == "float32" or "_class_name" in config or "quantization_config" in config:
        return text
    config.pop("torch_dtype", None)
    return json.dumps({**config, "dtype": "float32"}, indent=2) + "\n"


def default_device() -> torch.device:
    """CUDA where there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _from_folder(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"The folder {folder} has no model_index.json, so it is not a pipeline. "
            "Give the folder that pipe.save_pretrained(folder) wrote."
        )
    try:
        return DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BaseModelError(f"The pipeline in {folder} cannot be loaded: {error}") from error


def _from_hub(name: str, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype, **options)
    except HFValidationError as error:
        raise BaseModelError(
            f"There is no base model {name!r}: no folder {folder}, and it cannot be the id of a model on the "
            'Hugging Face hub, which looks like "owner/name". Check the path.'
        ) from error
    except (OSError, ValueError) as error:
        raise _no_such_base(name, folder, error) from error


def _no_such_base(name: str, folder: Path, error: Exception) -> BaseModelError:
    return BaseModelError(
        f"There is no base model {name!r}: no folder {folder}, and the Hugging Face hub did not give one "
        "of that name (it could not be reached, has no such model, or wants you to log in), nor did its "
        "local cache. Check the spelling and the connection, or give a folder that "
        "pipe.save_pretrained(folder) wrote. "
        f"The hub's client said: {_first_sentence(error)}"
    )


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
