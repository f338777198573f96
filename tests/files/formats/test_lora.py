"""LoRA files of kohya's scripts, LyCORIS, PEFT and Diffusers, old and new: one update under every name."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lycoris import LoConModule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.lora import LoRA
from diffusekrona.files.read import opened
from tests.modules import network
from tests.pipelines import tiny_sdxl_pipeline

sides = st.integers(1, 5)

NAMES = {
    "kohya": ("lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight"),
    "PEFT": ("x.lora_B.weight", "x.lora_A.weight"),
    "PEFT with its adapter's name": ("x.lora_B.default.weight", "x.lora_A.default.weight"),
    "attention processor": ("unet.attn1.processor.to_q_lora.up.weight", "unet.attn1.processor.to_q_lora.down.weight"),
    "Diffusers' linear layer": ("x.lora.up.weight", "x.lora.down.weight"),
    "Diffusers' feed-forward": ("x.lora_layer.up.weight", "x.lora_layer.down.weight"),
    "Diffusers' text encoder": ("x.lora_linear_layer.up.weight", "x.lora_linear_layer.down.weight"),
}
LAYERS = ["lora_unet_x", "x", "x", "unet.attn1.processor.to_q", "x", "x", "x"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def read(**parts: Tensor) -> LoRA:
    """The update of a kohya file with one layer."""
    update = foreign.parse({f"x.{'alpha' if p == 'alpha' else f'lora_{p}.weight'}": t for p, t in parts.items()})["x"]
    assert isinstance(update, LoRA)
    return update


def slow(up: Tensor, down: Tensor, scale: float, mid: Tensor | None = None) -> Tensor:
    """scale · Σ up[i, m] · mid[m, n, …] · down[n, j, …] entry by entry, in float64."""
    d, r = up.shape[:2]
    kernel = down.shape[2:] if mid is None else mid.shape[2:]
    out = torch.zeros(d, down.shape[1], *kernel, dtype=torch.float64)
    for i, j, m in itertools.product(range(d), range(down.shape[1]), range(r)):
        if mid is None:
            out[i, j] += up[i, m].double().squeeze() * down[m, j].double()
            continue
        for n in range(mid.shape[1]):
            out[i, j] += up[i, m].double().squeeze() * mid[m, n].double() * down[n, j].double().squeeze()
    return scale * out


@pytest.mark.parametrize(("names", "layer"), zip(NAMES.values(), LAYERS, strict=True), ids=NAMES.keys())
def test_a_layer_is_found_under_every_programs_names(names: tuple[str, str], layer: str) -> None:
    up, down = random(6, 2), random(2, 5)
    updates = foreign.parse({names[0]: up, names[1]: down})
    assert list(updates) == [layer]
    assert updates[layer].kind == "lora"
    assert updates[layer].parameters == up.numel() + down.numel()
    torch.testing.assert_close(updates[layer].delta().double(), slow(up, down, 1.0))


@given(sides, sides, sides, st.sampled_from([None, 0.5, 16.0]), st.sampled_from([(), (3,), (3, 2)]))
def test_the_update_is_up_times_down_times_alpha_over_rank(
    d: int, h: int, r: int, alpha: float | None, kernel: tuple[int, ...]
) -> None:
    up, down = random(d, r, *(1 for _ in kernel)), random(r, h, *kernel)
    update = read(up=up, down=down, **({"alpha": torch.tensor([alpha])} if alpha else {}))
    assert update.scale == (alpha / r if alpha else 1.0)
    torch.testing.assert_close(update.delta().double(), slow(up, down, update.scale), atol=1e-4, rtol=1e-5)


@given(sides, sides, st.integers(1, 3))
def test_a_tucker_core_lies_between_them(d: int, h: int, r: int) -> None:
    up, mid, down = random(d, r, 1, 1), random(r, r, 3, 2), random(r, h, 1, 1)
    expected = slow(up, down, 1.0, mid)
    torch.testing.assert_close(read(up=up, mid=mid, down=down).delta().double(), expected, atol=1e-5, rtol=1e-5)


def test_an_alpha_of_zero_stands_for_the_rank_as_in_kohyas_scripts() -> None:
    assert read(up=random(4, 2), down=random(2, 3), alpha=torch.tensor(0.0)).scale == 1.0


def test_half_precision_is_multiplied_in_full() -> None:
    up, down = random(6, 2).half(), random(2, 5).half()
    assert torch.equal(read(up=up, down=down).delta(), up.float() @ down.float())


@pytest.mark.parametrize(
    "base", [nn.Linear(12, 18), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 1)], ids=["linear", "3x3", "1x1"]
)
@pytest.mark.parametrize(
    "settings", [{}, {"use_tucker": True}, {"rs_lora": True}], ids=lambda s: next(iter(s), "plain")
)
def test_the_update_is_that_of_lycoris_own_layer(base: nn.Module, settings: dict[str, Any]) -> None:
    made = LoConModule("x", base, lora_dim=4, alpha=1.0, **settings).eval()
    nn.init.normal_(made.lora_up.weight)
    update = foreign.parse({f"x.{key}": tensor.detach() for key, tensor in made.state_dict().items()})["x"]
    expected = made.get_diff_weight(1.0, made.shape)[0].detach()
    torch.testing.assert_close(update.change(base.weight), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 2, "alpha_pattern": {"mid_block.resnets.0.conv1": 7, r"down_blocks\.\d.*to_q": 1}},
        {"lora_alpha": 2, "rank_pattern": {"conv1": 3}, "use_rslora": True},
        {"lora_alpha": 2, "use_dora": True},
    ],
    ids=["patterns", "rslora", "dora"],
)
def test_the_change_that_a_file_of_diffusers_makes_is_pefts(tmp_path: Path, settings: dict[str, Any]) -> None:
    unet = tiny_sdxl_pipeline().unet
    before = {name: parameter.clone() for name, parameter in unet.state_dict().items()}
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1"], init_lora_weights=False, **settings))
    unet.save_lora_adapter(tmp_path)
    unet.fuse_lora()
    updates = foreign.read(opened(tmp_path)[""])
    assert len(updates) == sum(name.endswith((".to_q", ".conv1")) for name, _ in unet.named_modules())
    for name, update in updates.items():
        weight = before[f"{name}.weight"]
        merged = unet.get_submodule(name).weight
        torch.testing.assert_close(weight + update.change(weight), merged.detach(), atol=1e-5, rtol=1e-5)


def test_the_scale_of_a_peft_folder_comes_from_the_config_beside(tmp_path: Path) -> None:
    model = get_peft_model(network(), LoraConfig(r=4, lora_alpha=1, target_modules=["to_q"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    updates = foreign.read(opened(tmp_path / "adapter_model.safetensors")[""])
    name = "base_model.model.blocks.1.to_q"
    layer = model.get_submodule(name)
    assert layer.scaling["default"] == 0.25
    torch.testing.assert_close(updates[name].delta(), layer.get_delta_weight("default").detach())


FAULTS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "no down": ("lacks down", lambda: {"up": random(4, 2)}),
    "ranks": ("up of 4 × 2, down of 3 × 5", lambda: {"up": random(4, 2), "down": random(3, 5)}),
    "a kernel in up": ("do not fit", lambda: {"up": random(4, 2, 3, 3), "down": random(2, 5, 1, 1)}),
    "core": ("do not fit", lambda: {"up": random(4, 2), "mid": random(2, 3, 3, 3), "down": random(2, 5)}),
    "a kernel in down beside a core": (
        "do not fit",
        lambda: {"up": random(4, 2), "mid": random(2, 2, 3, 3), "down": random(2, 5, 3, 3)},
    ),
    "vector": ("shape 4", lambda: {"up": random(4), "down": random(2, 5)}),
    "NaN": ("NaN in down", lambda: {"up": random(4, 2), "down": random(2, 5) * torch.nan}),
}


@pytest.mark.parametrize(("text", "parts"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_the_file_and_the_layer(text: str, parts: Callable[[], dict[str, Tensor]]) -> None:
    tensors = {f"my_layer.lora_{part}.weight": tensor for part, tensor in parts().items()}
    with pytest.raises(AdapterFileError, match=text) as error:
        foreign.parse(tensors, source="dog.safetensors")
    assert str(error.value).startswith("dog.safetensors: the layer my_layer ")
