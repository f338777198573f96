"""KronA adapters in training scripts that keep their state by `accelerator.save_state` and `accelerator.load_state`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..errors import AdapterFileError, CheckpointError, TrainingConfigError
from ..files.formats import krona as krona_format
from ..files.formats.krona import SavedAdapter
from ..files.read import check_fit, opened
from ..pipeline import save_krona
from ..tuner.compat import hooks_beside, prepared_optimizers
from ..tuner.components import adaptable_components, adapter_names, unwrapped
from ..tuner.injected import adapter_tensors, krona_layers
from ..tuner.names import DENOISERS, TEXT_ENCODERS, unwrapped_name
from ..tuner.targets import layer_scale

_log = logging.getLogger(__name__)

_UNFIT = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
"""What splits models over processes, and saves them itself."""


def accelerate_hooks(accelerator: Accelerator, **components: nn.Module | None) -> ScriptAdapters:
    """Let `accelerator.save_state` and `accelerator.load_state` keep the KronA adapters of a script's models.

    One line for a script that was written for LoRA:
    `krona = accelerate_hooks(accelerator, unet=unet, text_encoder=text_encoder)`. It goes anywhere after the models
    are loaded and before the first `save_state` or `load_state`: before or after `add_adapter`, `accelerator.prepare`
    and the script's own hooks. From then on

    - `save_state(folder)` writes the adapters as `ScriptAdapters.save` does, beside what accelerate writes itself, and
      leaves the frozen weights out;
    - `load_state(folder)` fills the adapters, or raises and leaves every model as it was;
    - the script's own hooks see only the models without KronA adapters. Where there are none they are not called,
      which is logged once. Without any KronA adapter they are called as ever, so the same script can train LoRA.

    Args:
        accelerator: the script's.
        **components: the models that may hold adapters, prepared or not, by their names in the pipeline: `unet` or
            `transformer`, and `text_encoder`, `text_encoder_2`, `text_encoder_3`. None is passed over.

    Returns:
        The adapters, to be saved at the end of the script.

    Raises:
        TrainingConfigError: no pipeline has a component of that name; no denoiser is given; or accelerate is set up
            for DeepSpeed, FSDP or Megatron-LM, which split models and save them in their own way.
    """
    _check_whole(accelerator)
    adapters = ScriptAdapters(accelerator, _named(components))
    _put_first(accelerator.register_save_state_pre_hook, adapters._on_save, adapters)
    _put_first(accelerator.register_load_state_pre_hook, adapters._on_load, adapters)
    return adapters


class ScriptAdapters:
    """The KronA adapters of a script's models, as `accelerate_hooks` gives them.

    Attributes:
        components: component name → model.
    """

    def __init__(self, accelerator: Accelerator, components: dict[str, nn.Module]) -> None:
        self.components = components
        self._accelerator = accelerator
        self._warned = False

    @property
    def names(self) -> list[str]:
        """Of the adapters, oldest first."""
        modules = adaptable_components(self).values()
        return list(dict.fromkeys(name for module in modules for name in adapter_names(module)))

    def save(self, folder: str | PathLike[str]) -> bool:
        """Write the adapters in the main process; the others return at once.

        A single adapter goes into `folder` itself, which `load_krona(pipe, folder)` reads. Several go into a folder
        each, `folder/NAME`. The factors keep their dtype, which is fp32 while they are trained.

        Returns:
            Whether there is an adapter to write.

        Raises:
            AdapterFileError: a factor is not finite.
            OSError: a file cannot be written; an older one there is as it was.
        """
        if self._accelerator.is_main_process:
            for name, place in self._places(folder).items():
                save_krona(self, place, name)
        return bool(self.names)

    def _on_save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        """Of `save_state`: write the adapters, and take their models out of `weights`.

        Args:
            models: all that were prepared.
            weights: their state dicts, in the same order.
            folder: of the checkpoint.

        Raises:
            TrainingConfigError: more than the adapters is trained, or they are in a model that was not named.
            AdapterFileError, OSError: as in `save`.
        """
        self._check_all_is_saved(models)
        self._warn_of_rounding()
        self.save(folder)
        weights[:] = [state for model, state in zip(models, weights, strict=True) if not self.holds(model)]

    def _on_load(self, models: list[nn.Module], folder: str) -> None:
        """Of `load_state`: fill the adapters, and take their models out of `models`.

        Args:
            models: those whose weights accelerate would load.
            folder: of the checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged, or of another adapter. No model has changed then.
        """
        try:
            adapters = [adapter for name, place in self._places(folder).items() for adapter in self._read(name, place)]
        except AdapterFileError as error:
            raise CheckpointError(
                f"The checkpoint {folder} cannot be resumed from, and no model has changed: {error} Resume from "
                "another checkpoint, or with the settings that this one was trained with."
            ) from error
        with torch.no_grad():
            for component, name, saved in adapters:
                for key, tensor in adapter_tensors(component, name).items():
                    tensor.copy_(saved.tensors[key])
        models[:] = [model for model in models if not self.holds(model)]

    def holds(self, model: nn.Module) -> bool:
        """Whether a model, prepared or not, is one of the components and has an adapter."""
        inner = unwrapped(model)
        return any(inner is component for component in adaptable_components(self).values()) and _has_adapter(inner)

    def _places(self, folder: str | PathLike[str]) -> dict[str, Path]:
        """Where each adapter is in a checkpoint."""
        names, root = self.names, Path(folder).expanduser()
        return {name: root if len(names) == 1 else root / name for name in names}

    def _read(self, name: str, place: Path) -> list[tuple[nn.Module, str, SavedAdapter]]:
        components = {part: one for part, one in adaptable_components(self).items() if name in adapter_names(one)}
        found = krona_format.read(opened(place))
        if set(found) != set(components):
            raise AdapterFileError(
                f"{place} holds an adapter for {', '.join(found)}, but {name!r} is one for {', '.join(components)}."
            )
        for part, saved in found.items():
            _check_same_adapter(components[part], name, saved)
        return [(components[part], name, saved) for part, saved in found.items()]

    def _check_all_is_saved(self, models: Iterable[nn.Module]) -> None:
        for model in models:
            if _has_adapter(unwrapped(model)) and not self.holds(model):
                raise TrainingConfigError(
                    f"A prepared {type(unwrapped(model)).__name__} has a KronA adapter, but accelerate_hooks was "
                    "not given it: add it there by its name in the pipeline, such as text_encoder=text_encoder."
                )
        # Not what requires gradients: scripts set that for embeddings that no optimizer has, so that gradient
        # checkpointing works.
        optimizers = prepared_optimizers(self._accelerator)
        trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for part, component in adaptable_components(self).items():
            own = {
                id(tensor) for name in adapter_names(component) for tensor in adapter_tensors(component, name).values()
            }
            for key, parameter in component.named_parameters():
                if own and id(parameter) in trained - own:
                    raise TrainingConfigError(
                        f"The optimizer also trains {key} of the {part}, which is no part of a KronA adapter and would "
                        "be lost: freeze it before the optimizer is made, or name its module in "
                        "KronAConfig(modules_to_save=[…])."
                    )

    def _warn_of_rounding(self) -> None:
        rounded = [
            f"{key} of the {part}"
            for part, component in adaptable_components(self).items()
            for name in adapter_names(component)
            for key, tensor in adapter_tensors(component, name).items()
            if tensor.requires_grad and tensor.dtype in (torch.float16, torch.bfloat16)
        ]
        if rounded and not self._warned:
            _log.warning(
                "%s and %d more of what is trained are in half precision, so small steps are lost. Something cast the "
                "model, such as pipeline.to(…, dtype=…) for a validation: call it without a dtype.",
                rounded[0],
                len(rounded) - 1,
            )
            self._warned = True


class _OthersOnly:
    """A script's hook, for the models that hold no KronA adapter."""

    def __init__(self, hook: Callable[..., None], adapters: ScriptAdapters) -> None:
        self._hook, self._adapters, self._logged = hook, adapters, False

    def __call__(self, models: list[nn.Module], *rest: Any) -> None:
        if not self._adapters.names:
            self._hook(models, *rest)
        elif others := [model for model in models if not self._adapters.holds(model)]:
            self._hook(others, *rest)
        elif not self._logged:
            name = getattr(self._hook, "__qualname__", repr(self._hook))
            _log.info("%s is not called: each model that it would be given has a KronA adapter.", name)
            self._logged = True


def _put_first(register: Callable[..., Any], own: Callable[..., None], adapters: ScriptAdapters) -> None:
    """Register a hook before all others, and leave to those the models without KronA adapters."""

    def hook(models: list[nn.Module], *rest: Any) -> None:
        own(models, *rest)
        # Only now are all hooks known. Their number stays, so accelerate can be going through them.
        for key, other in hooks.items():
            if other is not hook and not isinstance(other, _OthersOnly):
                hooks[key] = _OthersOnly(other, adapters)

    handle = register(hook)
    hooks = hooks_beside(handle)
    hooks.move_to_end(handle.id, last=False)


def _check_whole(accelerator: Accelerator) -> None:
    if accelerator.distributed_type in _UNFIT:
        raise TrainingConfigError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which splits models over processes and "
            "saves them in its own way. accelerate_hooks needs whole models: choose multi-GPU without it in "
            "`accelerate config`, or train with `diffusekrona train`, which can split."
        )


def _named(components: Mapping[str, nn.Module | None]) -> dict[str, nn.Module]:
    names = (*DENOISERS, *TEXT_ENCODERS)
    unknown = [name for name in components if name not in names]
    given = {name: module for name, module in components.items() if module is not None}
    if unknown or not any(name in DENOISERS for name in given):
        raise TrainingConfigError(
            f"accelerate_hooks takes a pipeline's models by their names, {', '.join(names)}, and a unet or transformer "
            f"among them; it was given {', '.join(components) or 'none'}."
        )
    return given


def _has_adapter(module: nn.Module) -> bool:
    return bool(adapter_names(module))


def _check_same_adapter(component: Any, name: str, saved: SavedAdapter) -> None:
    """Raise `AdapterFileError` unless a saved adapter is an earlier state of this one."""
    # By the config of the one that is trained: the saved one only says what the file should hold.
    check_fit(component, SavedAdapter(component.peft_config[name], saved.tensors, saved.source))
    for key, layer in krona_layers(component).items():
        if name not in layer.krona_A:
            continue
        place = unwrapped_name(key)
        before, now = layer_scale(saved.config, place), layer.alpha[name]
        if before != now or saved.config.layout != layer.layout[name]:
            raise AdapterFileError(
                f"{saved.source} has alpha {before:g} and the layout {saved.config.layout!r} in {place}, but {name!r} "
                f"has {now:g} and {layer.layout[name]!r} there."
            )
        if name in layer.merged_adapters:
            raise AdapterFileError(f"The adapter {name!r} is merged into {place}; unmerge it first.")
