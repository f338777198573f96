"""`make programs`: whether InvokeAI's own code recognizes our files, and adds exactly our updates to its models.

`python -m tests.programs.invokeai FLUX.2` tries those of FLUX.2 only.

A file goes the way that it goes there: `ModelConfigFactory` tells the base model, `LoRALoader` reads the layers, and
`LayerPatcher` adds them to a model, whose weights are zero here. Models have few blocks and the widths that InvokeAI
tells them by. The rest of InvokeAI is not installed: for libraries that it loads and adapters do not use, such as
those for pictures, there are stand-ins.
"""

import importlib.abc
import importlib.machinery
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import diffusers
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import is_torchvision_available

from diffusekrona.files.write import foreign_bytes
from tests.files.layouts.originals import EXAMPLES, originals, table_only, together
from tests.programs.adapters import ATTENTION, adapter, layers_of, updates
from tests.programs.report import Report, version

LARGEST = 1e-5
"""By how much of its largest number an update may differ. A LoRA is a product of rounded factors."""

Named = Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that take every name, for libraries that are not installed."""

    LIBRARIES = ("compel", "cv2", "onnx", "onnxruntime", "spandrel", "torchvision")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        known = fullname.partition(".")[0] in self.LIBRARIES
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module: Any = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@dataclass(frozen=True)
class Theirs:
    """A model that InvokeAI adds layers to.

    Attributes:
        prefix: which layers of a file it looks at.
        build: the model.
        names: our updates by the names of its layers.
    """

    prefix: str
    build: Callable[[], nn.Module]
    names: Named = lambda model, found: dict(found)


@dataclass(frozen=True)
class Case:
    """A file, and what InvokeAI makes of it.

    Attributes:
        title: what is printed.
        base: what InvokeAI calls the base model; None if it refuses the file.
        components: ours, by name.
        layers: what matches the names of the adapted layers, by component.
        theirs: InvokeAI's models, by component.
        format: of the file.
        left: matches the layers that it leaves out; a warning of ours names some.
        fields: of the adapter's config.
    """

    title: str
    base: str | None
    components: Mapping[str, nn.Module]
    layers: Mapping[str, str]
    theirs: Mapping[str, Theirs] = field(default_factory=dict)
    format: Any = "invokeai"
    left: str = "(?!)"
    fields: Mapping[str, Any] = field(default_factory=dict)


def meta(build: Callable[[], Any]) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = build()
    return module


def unet(**config: Any) -> nn.Module:
    narrow = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 768}
    return meta(lambda: diffusers.UNet2DConditionModel(**{**narrow, **config}))


def sdxl_unet() -> nn.Module:
    from diffusekrona.bases.architectures import _SDXL_UNET

    return unet(**{**_SDXL_UNET, "block_out_channels": (32, 64, 64), "attention_head_dim": 4})


def clip(width: int = 768, kind: str = "CLIPTextModel") -> nn.Module:
    shape = {"intermediate_size": 2 * width, "num_attention_heads": width // 64, "projection_dim": width}
    config = transformers.CLIPTextConfig(hidden_size=width, num_hidden_layers=2, **shape)
    return meta(lambda: getattr(transformers, kind)(config))


def clip_2() -> nn.Module:
    return clip(1280, "CLIPTextModelWithProjection")


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, feed_forward_proj="gated-gelu"
    )
    return meta(lambda: transformers.T5EncoderModel(config))


def qwen3(kind: str = "Qwen3Model") -> nn.Module:
    config = transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8
    )  # fmt: skip
    return meta(lambda: getattr(transformers, kind)(config))


def transformer(kind: str, **config: Any) -> nn.Module:
    return meta(lambda: getattr(diffusers, kind)(**config))


def within(name: str) -> Named:
    """The names of layers that have all been put into a module of that name."""
    return lambda model, found: {
        key if key.startswith((f"{name}.", "text_projection")) else f"{name}.{key}": x for key, x in found.items()
    }


def in_text_model(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """CLIP as transformers 5.5 has it, which InvokeAI asks for: newer versions have no `text_model` around it."""

    def wrapped() -> nn.Module:
        module = build()
        return module if hasattr(module, "text_model") else nn.ModuleDict({"text_model": module})

    return wrapped


def in_original(example: str) -> Named:
    """Updates of the layers of the original model, of which some have several of ours as their rows."""

    def named(model: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, parts in originals(table_only(EXAMPLES[example].layout), model):
            if any(part.module in found for part in parts):
                shapes = {part.module: model.get_submodule(part.module).weight.shape for part in parts}
                whole[name] = together(
                    parts, {own: found.get(own, torch.zeros(())).expand(s) for own, s in shapes.items()}
                )
        return whole

    return named


def flux() -> nn.Module:
    from invokeai.backend.flux.model import Flux, FluxParams

    return meta(
        lambda: Flux(
            FluxParams(
                in_channels=64, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24,
                depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10_000, qkv_bias=True, guidance_embed=True,
            )
        )
    )  # fmt: skip


def anima() -> nn.Module:
    from invokeai.backend.anima.anima_transformer import AnimaTransformer
    from invokeai.backend.model_manager.load.model_loaders.anima import ANIMA_TRANSFORMER_CONFIG

    return meta(lambda: AnimaTransformer(**{**ANIMA_TRANSFORMER_CONFIG, "num_blocks": 2}))


CLIP_LAYERS = r".*layers\..*"
MLP = r"|.*\.(ff|ffn|img_mlp|txt_mlp)\..*"
OUTPUTS = r".*(to_out\.0|to_add_out)"
IN_BLOCKS_OF_FLUX = r"(single_)?transformer_blocks\.(?!.*(_context|norm)).*"


def both(case: Case, lora: Mapping[str, str] | None = None) -> list[Case]:
    """A case, and the same as a LoRA."""
    fields = {**case.fields, "b_rank": 1}
    layers = case.layers if lora is None else lora
    return [case, Case(case.title, case.base, case.components, layers, case.theirs, "lora", case.left, fields)]


def cases() -> list[Case]:
    to_unet = "lora_unet_"
    to_transformer = "lora_transformer-"
    one = {"num_layers": 1}
    sd2 = {"cross_attention_dim": 1024, "use_linear_projection": True}
    found: list[Case] = []
    sd1 = {"unet": unet(), "text_encoder": clip()}
    of_sd1 = {
        "unet": Theirs(to_unet, unet),
        "text_encoder": Theirs("lora_te_", in_text_model(clip), within("text_model")),
    }
    found += both(Case("SD 1.x: UNet", "sd-1", sd1, {"unet": ".*"}, of_sd1))
    found += both(Case("SD 1.x: CLIP", "sd-1", sd1, {"text_encoder": CLIP_LAYERS}, of_sd1))
    found += both(Case("SD 1.x: UNet and CLIP", "sd-1", sd1, {"unet": ATTENTION, "text_encoder": CLIP_LAYERS}, of_sd1))
    found.append(Case("SD 1.x: products for B", None, sd1, {"unet": ATTENTION}, fields={"b_rank": 2}))
    found.append(Case("SD 1.x: without keys and values of attn2", None, sd1, {"unet": r".*attn1\..*"}))
    found += both(
        Case(
            "SD 2.x: UNet",
            "sd-2",
            {"unet": unet(**sd2)},
            {"unet": ".*"},
            {"unet": Theirs(to_unet, lambda: unet(**sd2))},
        )
    )
    sdxl = {"unet": sdxl_unet(), "text_encoder": clip(), "text_encoder_2": clip_2()}
    of_sdxl = {
        "unet": Theirs(to_unet, sdxl_unet),
        "text_encoder": Theirs("lora_te1_", in_text_model(clip), within("text_model")),
        "text_encoder_2": Theirs("lora_te2_", in_text_model(clip_2), within("text_model")),
    }
    every = {"unet": ".*", "text_encoder": CLIP_LAYERS, "text_encoder_2": CLIP_LAYERS}
    found += both(Case("SDXL: UNet and both CLIP", "sdxl", sdxl, every, of_sdxl))
    found.append(Case("SDXL: attn1", "sdxl", sdxl, {"unet": r".*attn1\..*"}, of_sdxl))
    of_flux = {
        "transformer": Theirs(to_transformer, flux, in_original("flux")),
        "text_encoder": Theirs("lora_clip-", in_text_model(clip), within("text_model")),
        "text_encoder_2": Theirs("lora_t5-", t5),
    }
    flux_1 = transformer("FluxTransformer2DModel", **one, num_single_layers=1, guidance_embeds=True)
    flux1 = {"transformer": flux_1, "text_encoder": clip(), "text_encoder_2": t5()}
    found += both(
        Case("FLUX.1: blocks", "flux", flux1, {"transformer": IN_BLOCKS_OF_FLUX}, of_flux),
        {"transformer": r"(single_)?transformer_blocks\.(?!.*norm).*"},
    )
    found.append(
        Case("FLUX.1: double blocks", "flux", flux1, {"transformer": r"transformer_blocks\..*attn\..*"}, of_flux)
    )
    encoders = {"text_encoder": CLIP_LAYERS, "text_encoder_2": ".*"}
    found.append(Case("FLUX.1: attention, CLIP, T5", "flux", flux1, {"transformer": ATTENTION, **encoders}, of_flux))
    for layer in (r".*ff_context\..*", r".*norm1_context\.linear", "norm_out.linear", r"transformer_blocks.*to_q"):
        found.append(Case(f"FLUX.1: {layer}", None, flux1, {"transformer": layer}))
    joined = r".*(to_qkv_mlp_proj|attn\.to_out|to_out\.0|to_add_out|linear_in|linear_out)"
    for title, heads in (("[klein] 4B", 24), ("[klein] 9B", 32), ("[dev]", 48)):
        shape = {**one, "num_single_layers": 1, "num_attention_heads": heads}
        theirs = {"transformer": Theirs(to_transformer, lambda s=shape: transformer("Flux2Transformer2DModel", **s))}
        ours = {"transformer": transformer("Flux2Transformer2DModel", **shape)}
        case = Case(f"FLUX.2 {title}", "flux2", ours, {"transformer": joined if heads < 48 else OUTPUTS}, theirs)
        found += both(case, {"transformer": ATTENTION + MLP}) if heads == 24 else [case]
    for title, base, kind, shape, left in (
        ("Qwen-Image", "qwen-image", "QwenImageTransformer2DModel", one, r"(?!transformer_blocks).*"),
        (
            "Wan 5B",
            "wan",
            "WanTransformer3DModel",
            {**one, "num_attention_heads": 24, "ffn_dim": 6144},
            r"(?!blocks).*",
        ),
        ("Wan 14B", "wan", "WanTransformer3DModel", {**one, "ffn_dim": 5120}, r"(?!blocks).*"),
    ):
        theirs = {"transformer": Theirs(to_transformer, lambda k=kind, s=shape: transformer(k, **s))}
        ours = {"transformer": transformer(kind, **shape)}
        layers = {"transformer": rf"{ATTENTION}{MLP}"}
        found += both(Case(title, base, ours, layers, theirs))
        found.append(
            Case(
                f"{title}, with a layer outside",
                base,
                ours,
                {"transformer": rf"{ATTENTION}|proj_out"},
                theirs,
                left=left,
            )
        )
    for title, base, kind, shape in (
        ("Z-Image", "z-image", "ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
        ("Krea 2", "krea-2", "Krea2Transformer2DModel", one),
    ):
        theirs = {"transformer": Theirs(to_transformer, lambda k=kind, s=shape: transformer(k, **s))}
        ours = {"transformer": transformer(kind, **shape)}
        found.append(Case(title, base, ours, {"transformer": ATTENTION}, theirs, "lora", fields={"b_rank": 1}))
    of_anima = {
        "transformer": transformer(
            "CosmosTransformer3DModel", num_layers=2, num_attention_heads=16, extra_pos_embed_type=None
        ),
        "text_conditioner": transformer("AnimaTextConditioner"),
        "text_encoder": qwen3(),
    }
    theirs = {
        "transformer": Theirs(to_transformer, anima, in_original("cosmos")),
        "text_conditioner": Theirs(to_transformer, anima, in_original("anima-text")),
        "text_encoder": Theirs("lora_qwen3-", lambda: qwen3("Qwen3ForCausalLM"), within("model")),
    }
    blocks = {"transformer": ATTENTION + MLP, "text_conditioner": ATTENTION, "text_encoder": CLIP_LAYERS}
    found.append(Case("Anima, its conditioner and Qwen3", "anima", of_anima, blocks, theirs))
    without = {"transformer": ATTENTION + MLP, "text_conditioner": ATTENTION}
    found.append(Case("Anima and its conditioner", "anima", of_anima, without, theirs, "lora", fields={"b_rank": 1}))
    return found


def blank(module: nn.Module) -> nn.Module:
    """The module with zeros for weights, which take no memory."""
    for name, values in list(module.named_parameters()):
        owner, _, own = name.rpartition(".")
        zeros = nn.Parameter(torch.zeros(()).expand(values.shape), requires_grad=False)
        setattr(module.get_submodule(owner), own, zeros)
    return module


def changed(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a `blank` module that something has been added to; a weight under a second name stays on meta."""
    return {
        name: values.detach()
        for name, values in module.named_parameters()
        if any(values.stride()) and not values.is_meta
    }


def bases(file: Path) -> list[str]:
    """What InvokeAI takes a file for; every match, of which it uses any."""
    return [str(found.base.value) for found in _classified(file).details.values() if not isinstance(found, Exception)]


def _classified(file: Path) -> Any:
    # First, as it is in the program: otherwise the imports are in a circle, and count as no match.
    from invokeai.backend.model_manager.load.model_loaders import lora  # noqa: F401, I001
    from invokeai.backend.model_manager.configs.factory import ModelConfigFactory

    return ModelConfigFactory.from_model_on_disk(file, {"hash": "not needed"}, allow_unknown=False)


def loaded(file: Path) -> Any:
    """A file's layers in InvokeAI."""
    from invokeai.app.services.config.config_default import get_config
    from invokeai.backend.model_manager.load.model_loaders.lora import LoRALoader

    config = _classified(file).config
    without_cache: Any = None
    loader = LoRALoader(get_config(), logging.getLogger("InvokeAI"), without_cache)
    loader._model_base = config.base
    return loader._load_model(config)


def patched(patch: Any, theirs: Theirs) -> dict[str, Tensor]:
    """What InvokeAI adds to the weights of a model."""
    from invokeai.backend.patches.layer_patcher import LayerPatcher

    model = blank(theirs.build())
    with LayerPatcher.apply_smart_model_patches(
        model, [(patch, 1.0)], theirs.prefix, torch.float32, force_direct_patching=True
    ):
        return changed(model)


def problems(case: Case, file: Path) -> str:
    """Write the file, let InvokeAI read it, and tell what is not as the case says; "" if nothing."""
    adapters = {part: adapter(case.components[part], names, **case.fields) for part, names in case.layers.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file.write_bytes(foreign_bytes(adapters, case.components, case.format))
    if case.base is None and not caught:
        return "we do not warn"
    if case.format != "lora" and caught and case.base is not None and case.left == "(?!)":
        return f"we warn: {caught[0].message}"
    try:
        found = bases(file)
        if case.base is None and not found:
            return ""
        if case.base is not None and found != [case.base]:
            return f"taken for {found or 'no model'}, which is {case.base}"
        patch = loaded(file)
    except Exception as error:
        return "" if case.base is None else f"{type(error).__name__}: {error}"
    if case.base is None:
        return f"is read after all, as {found}"
    wanted: dict[str, dict[str, Tensor]] = {}
    models: dict[str, Theirs] = {}
    for part, saved in adapters.items():
        theirs = case.theirs[part]
        own = updates(saved, case.components[part])
        names = theirs.names(case.components[part], own)
        left = [name for name in names if re.fullmatch(case.left, name)]
        if bool(left) != (case.left != "(?!)"):
            return "there is no layer to leave out"
        # Two parts of ours can be one model there.
        key = f"{theirs.prefix}{theirs.build.__name__}"
        models[key] = theirs
        wanted.setdefault(key, {}).update({f"{name}.weight": x for name, x in names.items() if name not in left})
    for key, theirs in models.items():
        try:
            found_weights = patched(patch, theirs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if text := _different(found_weights, wanted[key]):
            return text
    return ""


def _different(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    if missing := sorted(wanted.keys() - found.keys()):
        return f"{len(missing)} of {len(wanted)} layers not changed, such as {missing[0]}"
    if more := sorted(found.keys() - wanted.keys()):
        return f"{len(more)} layers changed that are not ours, such as {more[0]}"
    for name, update in wanted.items():
        far = float((found[name] - update).abs_().max() / update.abs().max())
        if not far <= LARGEST:
            return f"{name} is {far:.1e} of its largest number off"
    return ""


def main(words: list[str]) -> int:
    """Run the cases in whose titles all words are."""
    # As no library may find the stand-ins, what looks for them has looked before.
    is_torchvision_available()
    sys.meta_path.append(StandIns())
    report = Report(f"InvokeAI {version('InvokeAI')}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INVOKEAI_ROOT"] = folder
        logging.disable(logging.WARNING)
        for case in cases():
            if not all(word in case.title for word in words):
                continue
            text = problems(case, Path(folder) / "adapter.safetensors")
            layers = sum(len(layers_of(adapter(case.components[p], n, **case.fields))) for p, n in case.layers.items())
            kind = "LoRA" if case.format == "lora" else "LoKr"
            expected = "refused, as we warn" if case.base is None else f"{case.base}, equal updates"
            report.item(f"{kind} {case.title}: {expected}", not text, text or f"{layers} layers")
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
