"""What a model or pipeline is, down to the bits, for tests that something left it as it was."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a module or pipeline is: structure, identities, bits, modes, hooks and adapters."""
    if isinstance(model, nn.Module):
        return _module(model)
    parts = {name: part for name, part in model.components.items() if isinstance(part, nn.Module)}
    seen = {f"{part}.{key}": seen for part, module in parts.items() for key, seen in _module(module).items()}
    return {**seen, "attributes": sorted(vars(model))}


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The block must leave the model as it was."""
    before = snapshot(model)
    yield
    assert_same(before, snapshot(model))


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    different = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    shown = {key: (before.get(key), after.get(key)) for key in sorted(different)[:3]}
    assert not different, f"{len(different)} differences, such as {shown}"


def bits(model: nn.Module) -> dict[str, str]:
    """A checksum of each parameter and buffer, under the names they have without adapters."""
    return {
        key.replace(".base_layer.", "."): _checksum(tensor)
        for key, tensor in model.state_dict().items()
        if ".krona_" not in key and ".lora_" not in key
    }


def _module(model: nn.Module) -> dict[str, Any]:
    seen: dict[str, Any] = {"state_dict": list(model.state_dict())}
    for name, module in model.named_modules():
        seen[f"{name} module"] = (type(module), id(module))
        seen[f"{name} attributes"] = {key: _plain(key, value) for key, value in vars(module).items()}
        seen[f"{name} hooks"] = [list(vars(module)[hooks]) for hooks in HOOKS]
    for name, parameter in model.named_parameters():
        seen[f"{name} parameter"] = (id(parameter), parameter.requires_grad, _checksum(parameter))
    for name, buffer in model.named_buffers():
        seen[f"{name} buffer"] = (id(buffer), _checksum(buffer))
    seen["peft_config"] = [(name, str(config)) for name, config in getattr(model, "peft_config", {}).items()]
    return seen


def _plain(key: str, value: Any) -> Any:
    """A value that can be compared, for an object its type. One active adapter may be a name or a list."""
    if key == "_active_adapter":
        return [value] if isinstance(value, str) else list(value)
    if isinstance(value, dict) and not key.startswith("_"):
        return {inner: _plain("", element) for inner, element in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain("", element) for element in value]
    return value if isinstance(value, PLAIN) else type(value)


def _checksum(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha1(data.numpy()).hexdigest()
