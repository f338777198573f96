"""All that can be chosen about a run, in one flat list of names: for flags, for a file, or for both."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml

from ..errors import TrainingConfigError
from ..tuner.config import ATTENTION, Init, KronAConfig
from .config import TrainingConfig, check_choice, check_flag
from .data import OnBadImage
from .reports import ReportTo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DType = Literal["float32", "float16", "bfloat16"]

BASE_TYPES: dict[str, DType] = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Of the base, for each mixed precision."""


@dataclass(frozen=True)
class DataSettings:
    """The base model and the images.

    Args:
        pretrained_model_name_or_path: Base model: a Diffusers pipeline folder, or its id on the hub.
        dtype: Type of the frozen base; by default that of mixed_precision, and the 16-bit ones take half the memory.
        instance_data_dir: Folder of 3 to 5 images; name.txt beside an image is its prompt.
        dataset_dir: In place of a folder of images, a Hugging Face dataset that save_to_disk wrote.
        image_column: The dataset's column of images.
        caption_column: Its column of prompts, which are used unless instance_prompt is given.
        instance_prompt: The subject: a rare word and its class, such as "a sks toy".
        resolution: Side of the images in pixels; by default the base's own.
        center_crop: Cut out the middle; with --no-center-crop a random part, another one for each repeat.
        repeats: How often each image is there.
        aspect_ratio_buckets: Cut each image to the nearest of several sizes of the same area, in place of squares.
        on_bad_image: "stop" at an image that cannot be read, or "skip" it with a warning.
    """

    pretrained_model_name_or_path: str
    dtype: DType | None = None
    instance_data_dir: Path | None = None
    dataset_dir: Path | None = None
    image_column: str = "image"
    caption_column: str = "text"
    instance_prompt: str | None = None
    resolution: int | None = None
    center_crop: bool = True
    repeats: int = 1
    aspect_ratio_buckets: bool = False
    on_bad_image: OnBadImage = "stop"

    def __post_init__(self) -> None:
        if (self.instance_data_dir is None) == (self.dataset_dir is None):
            raise TrainingConfigError("Give either instance_data_dir, a folder of images, or dataset_dir, a dataset.")


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter; `KronAConfig` says more of each.

    Args:
        a1: Rows of A; must divide every layer's outputs.
        a2: Columns of A; must divide every layer's inputs.
        factors: Other factors for some layers; on the command line repeatable.
        alpha: Scale of the update.
        num_terms: Products that are summed.
        b_rank: Rank of a B that is itself a product, as in LoKr.
        target_modules: Layers: "attention", "attention+ff", "cross-attention", or a regular expression.
        dropout: Dropout on the adapter's input.
        init_a: How A starts.
        init_b: How B starts.
    """

    a1: int = 4
    a2: int = 64
    factors: dict[str, tuple[int, int]] = field(default_factory=dict)
    alpha: float = 1.0
    num_terms: int = 1
    b_rank: int | None = None
    target_modules: str = ATTENTION
    dropout: float = 0.0
    init_a: Init = "normal"
    init_b: Init = "zeros"

    def config(self) -> KronAConfig:
        """The adapter's config."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return KronAConfig(factor_pattern=values.pop("factors"), **values)


@dataclass(frozen=True)
class PriorSettings:
    """Prior preservation: images of others of the class, so that these stay what they were.

    Args:
        with_prior_preservation: Train on class images, too.
        class_prompt: What they show, such as "a toy".
        class_data_dir: Where they are; missing ones are drawn by the base first. By default a folder of the run's.
        num_class_images: How many there shall be.
        sample_batch_size: How many are drawn in a pass.
    """

    with_prior_preservation: bool = False
    class_prompt: str | None = None
    class_data_dir: Path | None = None
    num_class_images: int = 100
    sample_batch_size: int = 4

    def __post_init__(self) -> None:
        if self.with_prior_preservation and not (self.class_prompt or "").strip():
            raise TrainingConfigError("with_prior_preservation needs a class_prompt, such as 'a toy'.")
        for name in ("num_class_images", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise TrainingConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class OutputSettings:
    """What comes out, and where it goes.

    Args:
        output_dir: Where the adapter goes, a folder or a file that ends in .safetensors. Everything else goes into the
            folder `run` in it, or beside the file: checkpoints, pictures, TensorBoard's files, report.html.
        resume: Go on from the newest checkpoint there, if there is one.
        overwrite: Begin anew where there are checkpoints of an earlier run, which are replaced.
        also: Another copy of the adapter: "lokr" for ComfyUI and its kin.
        validation_prompt: Draw this every so many steps; on the command line repeatable.
        validation_steps: How many.
        validation_inference_steps: Denoising steps of these pictures.
        validation_guidance_scale: How closely they follow the prompt.
        report_to: "wandb" writes to Weights & Biases, too; TensorBoard has its files always.
        push_to_hub: Push the adapter to this repository of yours on the hub at the end.
    """

    output_dir: Path
    resume: bool = False
    overwrite: bool = False
    also: Literal["lokr"] | None = None
    validation_prompt: list[str] = field(default_factory=list)
    validation_steps: int = 100
    validation_inference_steps: int = 30
    validation_guidance_scale: float = 7.5
    report_to: ReportTo = "tensorboard"
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for name in ("validation_steps", "validation_inference_steps"):
            if getattr(self, name) < 1:
                raise TrainingConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def run_folder(self) -> Path:
        """Of all that is not the adapter."""
        single = self.output_dir.suffix == ".safetensors"
        return (self.output_dir.with_suffix("") if single else self.output_dir) / "run"


SHORTER = {
    "base": "pretrained_model_name_or_path",
    "images": "instance_data_dir",
    "prompt": "instance_prompt",
    "output": "output_dir",
}
"""Other names of some settings, in a file and as flags."""

GROUPS: dict[str, type] = {
    "Base and images": DataSettings,
    "Adapter": AdapterSettings,
    "Training": TrainingConfig,
    "Prior preservation": PriorSettings,
    "Output": OutputSettings,
}
"""What settings there are, by the heading they stand under."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    data: DataSettings
    adapter: AdapterSettings
    training: TrainingConfig
    prior: PriorSettings
    output: OutputSettings

    def __post_init__(self) -> None:
        if self.output.also == "lokr" and self.adapter.num_terms > 1:
            raise TrainingConfigError(
                f"also 'lokr' cannot be: LoKr holds one product for each layer, and num_terms is "
                f"{self.adapter.num_terms}. Leave one of them out."
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From a flat list.

        Raises:
            TrainingConfigError: a name is unknown, something has to be given, or a value cannot be used.
        """
        known = [one.name for group in GROUPS.values() for one in fields(group)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise TrainingConfigError(
                    f"There is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
                )
        missing = [
            one.name
            for group in GROUPS.values()
            for one in fields(group)
            if one.default is MISSING and one.default_factory is MISSING and values.get(one.name) is None
        ]
        if missing:
            raise TrainingConfigError(f"Still to be given: {', '.join(missing)}.")
        return cls(*(_group(group, values) for group in GROUPS.values()))

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the frozen base: in another type than products are computed in, it would be rounded in each step."""
        dtype: torch.dtype = getattr(torch, self.data.dtype or BASE_TYPES[self.training.mixed_precision])
        return dtype

    def flat(self) -> dict[str, Any]:
        """All of them in one list, for a file that `read_settings` takes."""
        values = {name: value for part in vars(self).values() for name, value in asdict(part).items()}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        return {**plain, "factors": {name: list(pair) for name, pair in self.adapter.factors.items()}}


def _group(group: type, values: Mapping[str, Any]) -> Any:
    kinds = get_type_hints(group)
    chosen = {one.name: values[one.name] for one in fields(group) if values.get(one.name) is not None}
    return group(**{name: _value(name, kinds[name], value) for name, value in chosen.items()})


def _value(name: str, kind: Any, value: Any) -> Any:
    """What a setting is in Python: paths and factors are plain text in a file, and YAML takes 1e-4 for a text."""
    kind = next(one for one in get_args(kind) if one is not NoneType) if NoneType in get_args(kind) else kind
    if get_origin(kind) is list and isinstance(value, str):
        return [value]
    if get_origin(kind) is Literal:
        check_choice(name, value, get_args(kind))
    elif kind is bool:
        check_flag(name, value)
    elif kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TrainingConfigError(f"{name} must be a whole number, not {value!r}.")
    elif kind is float and isinstance(value, bool):
        raise TrainingConfigError(f"{name} must be a number, not {value!r}.")
    elif kind is str and not isinstance(value, str):
        raise TrainingConfigError(f"{name} must be a text, not {value!r}.")
    elif get_origin(kind) is list and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise TrainingConfigError(f"{name} must be a text or a list of texts, not {value!r}.")
    try:
        if kind is float:
            return float(value)
        if name == "factors":
            return {str(pattern): (int(a1), int(a2)) for pattern, (a1, a2) in dict(value).items()}
        return Path(value).expanduser() if kind is Path else value
    except (TypeError, ValueError) as error:
        raise TrainingConfigError(f"{name} cannot be {value!r}.") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a YAML or TOML file gives, in one flat list; names with dashes are those with underscores.

    Raises:
        TrainingConfigError: there is no such file, or it is no such list.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TrainingConfigError(f"The settings {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise TrainingConfigError(f"The settings {path} should be a list of names and values, such as `a1: 4`.")
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    return {SHORTER.get(name, name): value for name, value in named.items()}


def settings_text(settings: Settings) -> str:
    """All settings as YAML, but for those that say what to do with an earlier run's checkpoints."""
    values = {name: value for name, value in settings.flat().items() if name not in ("resume", "overwrite")}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def help_texts(group: type) -> dict[str, str]:
    """What a dataclass's docstring says of each of its fields, under "Args"."""
    text = (group.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", text, re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}
