"""All that can be chosen about a run, in one flat list of names: for flags, for a file, or for both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast, get_args

import yaml
from pydantic import Field, Strict, model_validator
from pydantic.fields import FieldInfo

from ..bases.quantization import Quantization
from ..errors import TrainingConfigError
from ..evaluation import CLIP, DINO
from ..schema import DType, FilePath, SettingsModel, TextList, read_mapping, short_name, unknown
from ..tuner.fields import FIELDS, Init, Scaling
from .config import ImageSettings, TrainingConfig, TrainingSettings
from .script_names import MEANT, answer, translated

if TYPE_CHECKING:
    from ..tuner.config import KronAConfig

Quantized = Literal["nf4", "int8", "fp8"]
ReportTo = Literal["tensorboard", "wandb"]

BASE_TYPES: dict[str, DType] = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Of the base, for each mixed precision."""


class DataSettings(TrainingSettings):
    """The base model and where the images are."""

    pretrained_model_name_or_path: str = Field(json_schema_extra={"short": "base"})
    """Base model: a Diffusers pipeline's folder, or its id on the hub."""
    dtype: DType | None = None
    """Type of the frozen base; by default that of mixed_precision. The 16-bit ones take half the memory."""
    quantize: Quantized | None = None
    """Quantize the linear layers of the frozen denoiser on loading: "nf4" (half a byte for each weight, needs
    bitsandbytes), "int8" or "fp8" (one byte, need torchao); by default they stay as they are."""
    quantize_text_encoders: Quantized | None = None
    """Quantize the linear layers of the text encoders on loading, too: "nf4", "int8" or "fp8"; by default they stay as
    they are."""
    variant: str | None = None
    """Which of several files the base's weights are read from, such as "fp16"."""
    revision: str | None = None
    """Branch, tag or commit of a base on the hub."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another autoencoder than the base's own: a folder or a hub id."""
    base_configs: str | None = None
    """For a base in a single file, the folder of a pipeline of its architecture, for configurations and tokenizers."""
    instance_data_dir: FilePath | None = Field(default=None, json_schema_extra={"short": "images"})
    """Folder of 3 to 5 images. A text file name.txt or name.caption beside an image holds its prompt, or metadata.jsonl
    or metadata.csv those of all; a subfolder 10_name holds images that are used 10 times as often."""
    dataset_dir: FilePath | None = None
    """Folder of a Hugging Face dataset that save_to_disk wrote, instead of a folder of images."""
    dataset_name: str | None = None
    """Hugging Face dataset, of whose split "train" the images are, instead of a folder of images: its id on the hub, or
    a folder that load_dataset reads, such as one of parquet files. By default there is none."""
    dataset_config_name: str | None = None
    """Configuration of the dataset of dataset_name, where it has several; by default its own."""
    image_column: str = "image"
    """Name of the dataset's column of images."""
    caption_column: str = "text"
    """Name of the dataset's column of prompts, which are used unless instance_prompt is given; or of the prompts in a
    folder's metadata.jsonl or metadata.csv."""
    validation_data_dir: FilePath | None = None
    """Folder of images of the subject that are not trained on. Their loss, over noise that is the same each time, can
    be compared between steps."""
    init_from: FilePath | None = None
    """Saved adapter, of the same layers and factors, that the training begins with, such as one of other images."""
    trigger_word: str | None = None
    """Word that is put before every prompt that does not have it, such as "sks"."""
    instance_prompt: str | None = Field(default=None, json_schema_extra={"short": "prompt"})
    """Name of the subject: a rare word and its class, such as "a sks toy"."""

    @model_validator(mode="after")
    def _check_source(self) -> DataSettings:
        if [self.instance_data_dir, self.dataset_dir, self.dataset_name].count(None) != 2:
            raise TrainingConfigError(
                "Give either instance_data_dir, a folder of images, or dataset_dir, a dataset that save_to_disk wrote, "
                "or dataset_name, a dataset of the hub."
            )
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise TrainingConfigError("dataset_config_name is given, but no dataset_name. Leave it out.")
        return self


def _adapter(name: str, **more: Any) -> Any:
    default, text = FIELDS[name]
    return Field(default, description=text, **more)


Pair = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Strict(False)]
"""a1 and a2, in a file as a list."""


class AdapterSettings(TrainingSettings):
    """The adapter, as `KronAConfig` has it."""

    a1: int | None = _adapter("a1", ge=1)
    a2: int = _adapter("a2", ge=1)
    b1: int | None = _adapter("b1", ge=1)
    factors: dict[str, Pair] = Field(default_factory=dict, examples=[{"to_k|to_v": [2, 32]}])
    """Other factors for the layers whose names match a regular expression; as a flag it is repeatable."""
    alpha: float = _adapter("alpha")
    scaling: Scaling = _adapter("scaling")
    num_terms: int = _adapter("num_terms", ge=1)
    b_rank: int | None = _adapter("b_rank", ge=1)
    target_modules: str = _adapter("target_modules")
    dropout: float = _adapter("dropout", ge=0, lt=1)
    init_a: Init = _adapter("init_a")
    init_b: Init = _adapter("init_b")

    def config(self) -> KronAConfig:
        """The adapter's config.

        Raises:
            ConfigError: a value that no layer could use.
        """
        from ..tuner.config import KronAConfig

        values = dict(self)
        return KronAConfig(factor_pattern=values.pop("factors"), **values)


class PriorSettings(TrainingSettings):
    """Prior preservation: images of others of the class, so that these stay what they were."""

    with_prior_preservation: bool = False
    """Train on images of the whole class, too, so that the base keeps drawing it as before."""
    class_prompt: str | None = None
    """Prompt of the class images, such as "a toy"."""
    class_data_dir: FilePath | None = None
    """Folder of the class images. Missing ones are first drawn by the base; by default into a folder of the run."""
    num_class_images: int = Field(default=100, ge=1)
    """Number of class images to train on."""
    sample_batch_size: int = Field(default=4, ge=1)
    """Number of class images that are drawn in one pass."""

    @model_validator(mode="after")
    def _check_prompt(self) -> PriorSettings:
        if self.with_prior_preservation and not (self.class_prompt or "").strip():
            raise TrainingConfigError("with_prior_preservation needs a class_prompt, such as 'a toy'.")
        for name in ("class_prompt", "class_data_dir"):
            if getattr(self, name) is not None and not self.with_prior_preservation:
                raise TrainingConfigError(
                    f"{name} is given, but the class is not preserved: turn with_prior_preservation on, "
                    "or leave it out."
                )
        return self


class OutputSettings(TrainingSettings):
    """What comes out, and where it goes."""

    output_dir: FilePath = Field(json_schema_extra={"short": "output"})
    """Where the adapter goes: a folder, or a file that ends in .safetensors. Everything else goes into the folder `run`
    in it, or beside the file: checkpoints, pictures, TensorBoard's files, report.html."""
    resume: bool = False
    """Continue from the newest checkpoint in the run's folder."""
    overwrite: bool = False
    """Start anew where an earlier run has left checkpoints, or other files are in the way, and replace them."""
    also: Literal["lokr"] | None = None
    """Write another copy of the adapter: "lokr" for ComfyUI and kohya's scripts."""
    validation_prompt: TextList = Field(default_factory=list)
    """Prompt of a picture that is drawn every validation_steps steps; as a flag it is repeatable."""
    validation_steps: int = Field(default=100, ge=1)
    """Number of optimizer steps between two pictures of a validation prompt."""
    validation_inference_steps: int = Field(default=30, ge=1)
    """Denoising steps of the validation pictures."""
    validation_guidance_scale: float | None = None
    """Guidance scale of the validation pictures: how closely they follow the prompt; by default 7.5 for Stable
    Diffusion 1.x, 2.x and SDXL, and the pipeline's own for others."""
    report_to: ReportTo = "tensorboard"
    """Where the progress is written: "tensorboard" for files in the run's folder, "wandb" for Weights & Biases, too."""
    save_every: int | None = Field(default=None, ge=1)
    """Number of optimizer steps after which the adapter is saved each time, as a file in the run's folder `steps`."""
    score: bool = False
    """Score each saved adapter at the end by pictures of the validation prompts, as the command evaluate does, and mark
    the best one in the report."""
    clip: str = CLIP
    """Encoder for CLIP-I and CLIP-T of score: a folder, a hub id, or hub-id@revision."""
    dino: str = DINO
    """Encoder for DINO of score: a folder, a hub id, or hub-id@revision."""
    push_to_hub: bool = False
    """Push the adapter to the Hugging Face hub at the end."""
    hub_model_id: str | None = None
    """Repository of yours on the hub, such as "me/my-dog"; by default it is called as the output."""

    @model_validator(mode="after")
    def _check_score(self) -> OutputSettings:
        if self.score and not self.validation_prompt:
            raise TrainingConfigError("score needs pictures to look at: give validation_prompt.")
        return self

    @property
    def run_folder(self) -> Path:
        """Of all that is not the adapter."""
        single = self.output_dir.suffix == ".safetensors"
        return (self.output_dir.with_suffix("") if single else self.output_dir) / "run"


class Settings(TrainingSettings):
    """All settings of a run, in groups."""

    data: Annotated[DataSettings, Strict(False)] = Field(title="Base model and data")
    images: Annotated[ImageSettings, Strict(False)] = Field(title="Images")
    adapter: Annotated[AdapterSettings, Strict(False)] = Field(title="Adapter")
    training: Annotated[TrainingConfig, Strict(False)] = Field(title="Training")
    prior: Annotated[PriorSettings, Strict(False)] = Field(title="Prior preservation")
    output: Annotated[OutputSettings, Strict(False)] = Field(title="Output")

    @model_validator(mode="after")
    def _check_copy(self) -> Settings:
        if self.output.also == "lokr" and self.adapter.num_terms > 1:
            raise TrainingConfigError(
                f"also 'lokr' cannot be: LoKr holds one product for each layer, and num_terms is "
                f"{self.adapter.num_terms}. Leave one of them out."
            )
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> Settings:
        if self.training.offload != "none" and self.data.quantize is not None:
            raise TrainingConfigError(
                f"offload {self.training.offload!r} cannot move weights that quantize has made {self.data.quantize}. "
                "Leave one of them out."
            )
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From a flat list; a value of None counts as not given.

        Raises:
            TrainingConfigError: a name is unknown, something has to be given, or a value cannot be used.
        """
        strange = [name for name in values if name not in NAMES and name not in MEANT]
        if strange:
            raise TrainingConfigError(" ".join(f"{unknown(name, NAMES)}{answer(name)}" for name in strange))
        given = {name: value for name, value in translated(values).items() if value is not None}
        groups: dict[str, Any] = {
            group.name: {name: given[name] for name in group.fields if name in given} for group in GROUPS
        }
        return cls(**groups)

    @property
    def quantization(self) -> Quantization:
        """Of the frozen base."""
        return Quantization(self.data.quantize, self.data.quantize_text_encoders)

    @property
    def base_dtype(self) -> DType:
        """Of the frozen base: in another type than products are computed in, it would be rounded in each step."""
        return self.data.dtype or BASE_TYPES[self.training.mixed_precision]

    def flat(self) -> dict[str, Any]:
        """All of them in one list of plain values, for a file that `read_settings` takes."""
        return {name: value for group in self.model_dump(mode="json").values() for name, value in group.items()}


class Group(NamedTuple):
    """A group of settings.

    Attributes:
        name: its attribute of `Settings`.
        heading: what it is called on a page.
        model: its settings.
    """

    name: str
    heading: str
    model: type[SettingsModel]

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """Its settings by their names."""
        return self.model.model_fields


GROUPS = [Group(name, str(field.title), cast(Any, field.annotation)) for name, field in Settings.model_fields.items()]
"""What settings there are."""

NAMES = {name: field for group in GROUPS for name, field in group.fields.items()}
"""All settings of a run."""

SHORT_NAMES = {short: name for name, field in NAMES.items() if (short := short_name(field)) is not None}
"""Other names of some settings, in a file and as flags."""


HERE = "{here}"
"""At the start of a path in a settings file: the folder that the file is in."""

_FOLDERS_OR_IDS = ("pretrained_model_name_or_path", "dataset_name")
"""Settings that are a folder where there is one of that name, and else an id on the hub."""


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a YAML or TOML file gives, in one flat list; names with dashes are those with underscores.

    A path that starts with `{here}` starts in the folder of the file.

    Raises:
        TrainingConfigError: there is no such file, it is no such list, or it has a setting twice.
    """
    found: dict[str, Any] = {}
    for name, value in read_mapping(path, TrainingConfigError).items():
        if isinstance(value, str) and value.startswith(HERE):
            value = str((path.parent / value.removeprefix(HERE).lstrip("/")).absolute().resolve())
        plain = str(name).replace("-", "_")
        long = SHORT_NAMES.get(plain, plain)
        if long in found:
            raise TrainingConfigError(f"The settings {path} give {long} twice, once as {name}. Leave one of them out.")
        found[long] = value
    return found


def settings_text(settings: Settings) -> str:
    """All settings as YAML for the run's folder, but for those that say what to do with an earlier run's checkpoints.

    The output is where the file is, so that the folder can be renamed; other folders are given in full.
    """
    values = {name: value for name, value in settings.flat().items() if name not in ("resume", "overwrite")}
    for name, field in NAMES.items():
        if values.get(name) is not None and (name in _FOLDERS_OR_IDS or _is_path(field.annotation)):
            path = Path(values[name]).expanduser()
            values[name] = str(path.absolute()) if path.exists() or name not in _FOLDERS_OR_IDS else values[name]
    output = settings.output.output_dir
    values["output_dir"] = f"{HERE}/../../{output.name}" if output.suffix == ".safetensors" else f"{HERE}/.."
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _is_path(annotation: Any) -> bool:
    return annotation is Path or any(_is_path(part) for part in get_args(annotation))
