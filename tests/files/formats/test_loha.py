"""LoHa files: what is read agrees with LyCORIS and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lycoris import LohaModule
from peft import LoHaConfig
from torch import Tensor, nn

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.read import opened
from tests.pipelines import tiny_sdxl_pipeline

sides = st.integers(1, 5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def parts_of(d: int, h: int, r: int) -> dict[str, Tensor]:
    return {"w1_a": random(d, r), "w1_b": random(r, h), "w2_a": random(d, r, seed=9), "w2_b": random(r, h, seed=9)}


@given(sides, sides, sides, st.sampled_from([None, 0.5, 16.0]))
def test_the_update_multiplies_two_products_entry_by_entry(d: int, h: int, r: int, alpha: float | None) -> None:
    parts = parts_of(d, h, r)
    tensors = {f"x.hada_{part}": tensor for part, tensor in parts.items()}
    update = foreign.parse(tensors | ({"x.alpha": torch.tensor(alpha)} if alpha else {}))["x"]
    one, two = (torch.zeros(d, h, dtype=torch.float64) for _ in range(2))
    for i in range(d):
        for j in range(h):
            one[i, j] = sum(parts["w1_a"][i, m].double() * parts["w1_b"][m, j].double() for m in range(r))
            two[i, j] = sum(parts["w2_a"][i, m].double() * parts["w2_b"][m, j].double() for m in range(r))
    assert update.kind == "loha"
    assert update.parameters == 2 * r * (d + h)
    expected = one * two * (alpha / r if alpha else 1.0)
    torch.testing.assert_close(update.delta().double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "base", [nn.Linear(12, 18), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 1)], ids=["linear", "3x3", "1x1"]
)
@pytest.mark.parametrize("tucker", [False, True])
def test_the_update_is_that_of_lycoris_own_layer(base: nn.Module, tucker: bool) -> None:
    made = LohaModule("x", base, lora_dim=4, alpha=1.0, use_tucker=tucker).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    update = foreign.parse({f"x.{key}": tensor.detach() for key, tensor in made.state_dict().items()})["x"]
    torch.testing.assert_close(update.change(base.weight), made.get_weight(made.shape).detach(), atol=1e-4, rtol=1e-5)


def test_the_update_of_a_file_that_diffusers_wrote_is_pefts(tmp_path: Path) -> None:
    unet = tiny_sdxl_pipeline().unet
    settings: dict[str, Any] = {"target_modules": ["to_q", "conv1"], "use_effective_conv2d": True}
    unet.add_adapter(LoHaConfig(r=4, alpha=1, init_weights=False, **settings))
    unet.save_lora_adapter(tmp_path)
    updates = foreign.read(opened(tmp_path)[""])
    assert len(updates) == sum(name.endswith((".to_q", ".conv1")) for name, _ in unet.named_modules())
    for name, update in updates.items():
        layer = unet.get_submodule(name)
        torch.testing.assert_close(update.change(layer.weight), layer.get_delta_weight("default").detach())


FAULTS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "half": ("lacks w2_a", lambda: {"w1_a": random(4, 2), "w1_b": random(2, 3)}),
    "ranks": ("do not fit", lambda: parts_of(4, 3, 2) | {"w2_b": random(3, 3)}),
    "first ranks": ("do not fit", lambda: parts_of(4, 3, 2) | {"w1_b": random(3, 3)}),
    "outputs": ("do not fit", lambda: parts_of(4, 3, 2) | {"w2_a": random(5, 2)}),
    "inputs": ("do not fit", lambda: parts_of(4, 3, 2) | {"w2_b": random(2, 5)}),
    "one core": ("lacks t2", lambda: parts_of(2, 2, 2) | {"t1": random(2, 2, 3, 3)}),
    "other core": ("lacks t1", lambda: parts_of(2, 2, 2) | {"t2": random(2, 2, 3, 3)}),
    "first core": ("do not fit", lambda: parts_of(2, 2, 2) | {"t1": random(2, 3, 3, 3), "t2": random(2, 2, 3, 3)}),
    "outputs with cores": (
        "do not fit",
        lambda: parts_of(2, 2, 2) | {"t1": random(2, 2, 3, 3), "t2": random(2, 2, 3, 3), "w2_a": random(2, 5)},
    ),
    "kernels": ("do not fit", lambda: parts_of(2, 2, 2) | {"t1": random(2, 2, 3, 3), "t2": random(2, 2, 1, 1)}),
    "core": ("do not fit", lambda: parts_of(2, 2, 2) | {"t1": random(2, 2, 3, 3), "t2": random(2, 3, 3, 3)}),
    "NaN": ("NaN in w1_a", lambda: parts_of(4, 3, 2) | {"w1_a": random(4, 2) * torch.nan}),
}


@pytest.mark.parametrize(("text", "parts"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_the_file_and_the_layer(text: str, parts: Callable[[], dict[str, Tensor]]) -> None:
    tensors = {f"my_layer.hada_{part}": tensor for part, tensor in parts().items()}
    with pytest.raises(AdapterFileError, match=text) as error:
        foreign.parse(tensors, source="dog.safetensors")
    assert str(error.value).startswith("dog.safetensors: the layer my_layer ")
