"""`make programs`: whether stable-diffusion.cpp draws with our LoKr files what it draws with merged checkpoints.

The checkpoint is one of Stable Diffusion 1.5 in its original layout and full width, as its sizes are fixed there, with
random weights in float16. The program comes in the wheel of cyllama. It takes some 5 GB on disk, as much memory, and a
few minutes.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusekrona.bases.architectures import build, build_pipeline
from diffusekrona.files.formats.krona import SavedAdapter
from diffusekrona.files.layouts.unet import original_names
from diffusekrona.files.merge_base import merge_into_files
from diffusekrona.files.write import foreign_bytes
from tests.programs.adapters import ATTENTION, adapter
from tests.programs.report import Report, version

SIDE = 64  # pixels
STEPS = 2
LARGEST = 2
"""Steps of 255 by which two pictures may differ: the file's numbers and the merged weights are rounded otherwise."""
SEEN = 20
"""Steps of 255 by which some pixel has to differ between pictures with and without the adapter."""

# Parts of the autoencoder's names in Diffusers, and in the original.
_IN_AUTOENCODER: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_([qkv])$", r"\1"),
    (r"to_out\.0", "proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def checkpoint() -> dict[str, Tensor]:
    """A random Stable Diffusion 1.5 by the names of its original single file."""
    torch.manual_seed(0)
    unet, encoder = build("sd15"), build("sd15-text-encoder")
    names = original_names(unet, _own(unet))
    tensors = {f"model.diffusion_model.{names[key]}.{kind}": x for key, kind, x in _random(unet)}
    for key, kind, x in _random(encoder):
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}.{kind}"] = x
    for key, kind, x in _random(_autoencoder()):
        name = _autoencoder_name(key)
        # Linear layers of its attention are convolutions in the original.
        x = x[:, :, None, None] if ".attn_1." in name and x.dim() == 2 else x
        tensors[f"first_stage_model.{name}.{kind}"] = x
    return tensors


def _autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(
            latent_channels=4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )


def _autoencoder_name(name: str) -> str:
    for pattern, original in _IN_AUTOENCODER:
        name = re.sub(pattern, original, name)
    return name


def _own(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if dict(layer.named_parameters(recurse=False))]


def _random(module: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Each layer's name, "weight" or "bias", and numbers that keep the size of what goes through."""
    return [
        (name, kind, _numbers(module.get_submodule(name), kind, values.shape).half())
        for name in _own(module)
        for kind, values in module.get_submodule(name).named_parameters(recurse=False)
    ]


def _numbers(layer: nn.Module, kind: str, shape: torch.Size) -> Tensor:
    if kind == "bias":
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    size = 0.5 if isinstance(layer, nn.Embedding) else shape[1:].numel() ** -0.5
    return torch.randn(shape) * size


def small(saved: SavedAdapter) -> SavedAdapter:
    """An adapter whose updates are about a third of the weights that they are added to."""
    tensors = {key: x if key.endswith(".krona_A") else x * 0.5 / x.shape[-1] ** 0.5 for key, x in saved.tensors.items()}
    return SavedAdapter(saved.config, {key: x.half().float() for key, x in tensors.items()})


def picture(checkpoint: Path, lora: Path | None = None, mode: str = "AUTO") -> np.ndarray:
    """What the program draws: SIDE × SIDE × 3 numbers up to 255.

    Args:
        checkpoint: a single file.
        lora: an adapter's.
        mode: when the program applies it: IMMEDIATELY, to the weights; AT_RUNTIME, beside them; or as it likes.
    """
    from cyllama import sd

    sd.set_progress_callback(lambda *_: None)
    settings: Any = sd.SDContextParams(model_path=str(checkpoint), n_threads=2)
    settings.lora_apply_mode = sd.LoraApplyMode[mode]
    with sd.SDContext(settings) as context:
        asked = sd.SDImageGenParams(
            prompt="a dog", width=SIDE, height=SIDE, seed=1, sample_steps=STEPS, cfg_scale=1.0,
            sample_method=sd.SampleMethod.EULER,
        )  # fmt: skip
        if lora is not None:
            asked.set_loras([{"path": str(lora), "multiplier": 1.0}])
        drawn: np.ndarray = context.generate_with_params(asked)[0].to_numpy().astype(int)
    return drawn


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def main() -> int:
    report = Report(f"stable-diffusion.cpp {program_version()} of cyllama {version('cyllama')}")
    components = build_pipeline("sd15")
    with tempfile.TemporaryDirectory() as folder:
        base, merged, file = (Path(folder) / f"{name}.safetensors" for name in ("base", "merged", "adapter"))
        save_file(checkpoint(), base)
        without = picture(base)
        report.item(
            "a random checkpoint draws a picture", without.std() > SEEN, f"deviation {without.std():.0f} of 255"
        )
        for title, layers, modes in CASES:
            adapters = {part: small(adapter(components[part], names, a1=4, a2=4)) for part, names in layers.items()}
            file.write_bytes(foreign_bytes(adapters, components, "lokr"))
            merge_into_files(base, file, merged)
            expected = picture(merged)
            merged.unlink()
            seen = difference(expected, without)
            report.item(f"{title}: the merged checkpoint draws another picture", seen >= SEEN, f"{seen} of 255")
            for mode in modes:
                far = difference(picture(base, file, mode), expected)
                report.item(f"{title}, {mode}: the picture of the merged checkpoint", far <= LARGEST, f"{far} of 255")
    return report.end()


CASES: list[tuple[str, dict[str, str], tuple[str, ...]]] = [
    ("attention of the UNet", {"unet": ATTENTION}, ("AUTO", "AT_RUNTIME")),
    ("attention and MLPs of CLIP", {"text_encoder": r".*layers\..*"}, ("AUTO", "AT_RUNTIME")),
]
"""What is adapted, and how the program is told to apply it."""


def program_version() -> str:
    import json
    from importlib.resources import files

    versions = json.loads((files("cyllama") / "build_config.json").read_text())["versions"]
    return str(versions["stable_diffusion_cpp_version"])


if __name__ == "__main__":
    sys.exit(main())
