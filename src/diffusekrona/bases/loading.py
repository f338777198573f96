"""The base model: a Diffusers pipeline from a folder or the Hugging Face hub, or an error saying why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from ..errors import KronAError
from .quantization import Quantization, after_loading, index_of, on_loading


class BaseModelError(KronAError):
    """There is no such base model, or its folder is not a whole pipeline."""


def load_base(
    base: str | Path,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    *,
    variant: str | None = None,
    revision: str | None = None,
    vae: str | Path | None = None,
    configs: str | Path | None = None,
) -> Any:
    """Load a pipeline of any class, on the CPU; models that a GPU quantizes are on that.

    Args:
        base: a folder that `save_pretrained` wrote, the id of a model on the hub, such as "owner/name", or a single
            .safetensors file in the original layout of Stable Diffusion, SDXL, FLUX or alike.
        dtype: of the weights.
        quantization: what to make of the linear layers.
        variant: which of several files to read the weights from, such as "fp16"; a folder whose models are there in
            fp16 only needs no word.
        revision: branch, tag or commit of a model on the hub.
        vae: another autoencoder instead of the base's: a folder that holds one or a pipeline with one, or its id.
        configs: for a single file, the folder of any pipeline of its architecture, of which the configurations and
            tokenizers are taken; by default those of the original on the hub, or in its local cache.

    Raises:
        BaseModelError: no such model, a broken one, or options that are not for one of its kind.
        QuantizationError: a package is missing.
    """
    folder = Path(base).expanduser()
    _check_options(folder, variant, revision, configs)
    options: dict[str, Any] = {"vae": _autoencoder(vae, dtype)} if vae is not None else {}
    if folder.is_file():
        if quantization is not None and any(quantization):
            raise BaseModelError(f"{folder} is a single file, which is not quantized as it is loaded. {_CONVERT}")
        return _from_file(folder, dtype, configs, **options)
    options |= {} if revision is None else {"revision": revision}
    variant = variant or _only_variant(folder)
    options |= {} if variant is None else {"variant": variant}
    if quantization is not None and any(quantization):
        quantization.check()
        index = index_of(base_configs(base, revision))
        options["quantization_config"] = on_loading(quantization, index, dtype)
    if folder.is_dir():
        pipe = _from_folder(folder, dtype, **options)
    else:
        pipe = _from_hub(str(base), folder.absolute(), dtype, **options)
    if quantization is not None and any(quantization):
        after_loading(quantization, pipe, dtype)
    return pipe


_CONVERT = (
    "Convert it once with diffusers: StableDiffusionXLPipeline.from_single_file(file).save_pretrained(folder), or the "
    "same of StableDiffusionPipeline or another class, and give the folder."
)


def _check_options(folder: Path, variant: str | None, revision: str | None, configs: str | Path | None) -> None:
    local = folder.is_dir() or folder.is_file()
    for name, value, fits, kind in (
        ("variant", variant, not folder.is_file(), "a folder or a model on the hub"),
        ("revision", revision, not local, "a model on the hub"),
        ("configs", configs, folder.is_file(), "a single file"),
    ):
        if value is not None and not fits:
            raise BaseModelError(f"{name} is {str(value)!r}, which is for {kind}, and {folder} is none; leave it out.")


def _only_variant(folder: Path) -> str | None:
    """The variant "fp16" if some model of a pipeline's folder has weights in no other one."""
    for config in folder.glob("*/config.json"):
        names = [path.name for path in config.parent.iterdir() if _WEIGHTS.search(path.name)]
        if names and all(_FP16.search(name) for name in names):
            return "fp16"
    return None


_WEIGHTS = re.compile(r"\.(safetensors|bin)(\.index(\.\w+)?\.json)?$")
_FP16 = re.compile(r"\.fp16[.-]|\.index\.fp16\.json$")


def _autoencoder(vae: str | Path, dtype: torch.dtype) -> Any:
    folder = Path(vae).expanduser()
    if (folder / "model_index.json").is_file():
        folder /= "vae"
    variant = {"variant": "fp16"} if folder.is_dir() and _only_variant(folder.parent) else {}
    try:
        return AutoModel.from_pretrained(str(folder if folder.is_dir() else vae), torch_dtype=dtype, **variant)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BaseModelError(
            f"There is no autoencoder that can be loaded in {vae}; give a folder that vae.save_pretrained(folder) "
            f"wrote, or its id on the hub. {_first_sentence(error)}"
        ) from error


def _from_file(file: Path, dtype: torch.dtype, configs: str | Path | None, **options: Any) -> Any:
    if file.suffix != ".safetensors":
        raise BaseModelError(f"{file} is no .safetensors file; other files can hold code that runs. {_CONVERT}")
    folder = _configs_for(file) if configs is None else Path(configs).expanduser()
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        kind: Any = getattr(diffusers, name)
        load = kind.from_single_file
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"configs is {str(folder)!r}, which is not the folder of a pipeline whose models are loaded from single "
            f"files: {_first_sentence(error)}"
        ) from error
    try:
        return load(str(file), config=str(folder), torch_dtype=dtype, local_files_only=True, **options)
    except Exception as error:  # Diffusers raises whatever its converters meet
        raise BaseModelError(
            f"{file} cannot be loaded as a {name} with the configurations in {folder}: {_first_sentence(error)} "
            "Give the folder of a pipeline of the same architecture as configs."
        ) from error


def _configs_for(file: Path) -> Path:
    """A folder with the configurations of the original of a single file, which Diffusers tells by its tensors."""
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: torch.empty(opened.get_slice(key).get_shape(), device="meta") for key in opened.keys()}  # noqa: SIM118
        original = fetch_diffusers_config(shapes)["pretrained_model_name_or_path"]
    except (SafetensorError, OSError, KeyError) as error:
        raise BaseModelError(
            f"{file} is not a checkpoint that Diffusers knows: {_first_sentence(error)}. {_CONVERT}"
        ) from error
    try:
        return Path(snapshot_download(original, allow_patterns=["*.json", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{file} looks like a model of the architecture of {original}, and a single file does not hold the "
            "configurations that go with it, which the hub did not give and its local cache has not. Give the folder "
            "of any pipeline of this architecture as configs, or convert it once where there is a connection. "
            f"{_CONVERT}"
        ) from error


def base_configs(base: str | Path, revision: str | None = None) -> Path:
    """A folder with a pipeline's configurations; of a model on the hub, nothing else is fetched.

    Raises:
        BaseModelError: neither a folder nor a model that the hub or its local cache has.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(base), revision=revision, allow_patterns="*.json"))
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
