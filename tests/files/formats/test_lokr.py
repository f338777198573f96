"""LoKr files: what is read agrees with LyCORIS and PEFT, and what is written loads in them with the same bits."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris import LokrModule, create_lycoris_from_weights
from lycoris.functional.lokr import diff_weight
from peft import LoKrConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign, lokr
from diffusekrona.files.formats.updates import KroneckerUpdate
from diffusekrona.files.read import opened
from diffusekrona.storage import read_safetensors
from tests.pipelines import tiny_sdxl_pipeline

sides = st.integers(1, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def read(**parts: Tensor) -> KroneckerUpdate:
    """The update of a file with one layer."""
    name = {"alpha": "x.alpha", "dora_scale": "x.dora_scale"}
    update = foreign.parse({name.get(part, f"x.lokr_{part}"): tensor for part, tensor in parts.items()})["x"]
    assert isinstance(update, KroneckerUpdate)
    return update


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right entry by entry, in float64."""
    entries = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in right.T.tolist()] for row in left.tolist()
    ]
    return torch.tensor(entries, dtype=torch.float64)


def kron(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale · A ⊗ B entry by entry, in float64; B may carry a kernel."""
    (a1, a2), (b1, b2, *kernel) = A.shape, B.shape
    out = torch.zeros(a1 * b1, a2 * b2, *kernel, dtype=torch.float64)
    for i, j, k, m in itertools.product(range(a1), range(a2), range(b1), range(b2)):
        out[i * b1 + k, j * b2 + m] = scale * A[i, j].double() * B[k, m].double()
    return out


def module(base: nn.Module, **settings: Any) -> LokrModule:
    """LyCORIS' own layer, with random factors."""
    made = LokrModule("x", base, **settings)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(made.named_parameters()):
            if "dora" not in name:
                parameter.copy_(random(*parameter.shape, seed=index))
    return made.eval()


def saved(made: nn.Module) -> dict[str, Tensor]:
    return {f"x.{key}": tensor.detach().clone() for key, tensor in made.state_dict().items()}


# Reading


@given(sides, sides, sides, sides, st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([None, 0.5, 3.0]))
def test_the_update_is_the_kronecker_product_scaled_by_alpha_over_rank_where_a_factor_is_a_product(
    a1: int, a2: int, b1: int, b2: int, r: int, first: bool, second: bool, alpha: float | None
) -> None:
    parts, scale = {}, 1.0
    for name, (rows, columns), decomposed in (("w1", (a1, a2), first), ("w2", (b1, b2), second)):
        if decomposed:
            parts |= {f"{name}_a": random(rows, r), f"{name}_b": random(r, columns, seed=1)}
            scale = alpha / r if alpha else 1.0
        else:
            parts[name] = random(rows, columns)
    w1, w2 = (parts[n] if n in parts else product(parts[f"{n}_a"], parts[f"{n}_b"]) for n in ("w1", "w2"))
    update = read(**parts, **({"alpha": torch.tensor(alpha)} if alpha else {}))
    assert update.scale == scale
    assert update.parameters == sum(tensor.numel() for tensor in parts.values())
    assert update.delta().dtype == torch.float32
    torch.testing.assert_close(update.delta().double(), kron(w1, w2, scale), atol=1e-5, rtol=1e-5)


@given(sides, sides, sides, sides, st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_the_second_factor_of_a_convolution_carries_the_kernel(
    a1: int, a2: int, b1: int, b2: int, kernel: list[int]
) -> None:
    w1, w2 = random(a1, a2), random(b1, b2, *kernel)
    torch.testing.assert_close(read(w1=w1, w2=w2).delta().double(), kron(w1, w2, 1.0).flatten(1))


def test_whole_factors_come_out_bit_for_bit() -> None:
    w1, w2 = random(3, 2), random(4, 5).bfloat16()
    update = read(w1=w1, w2=w2, alpha=torch.tensor(7.0))
    assert torch.equal(update.A, w1)
    assert torch.equal(update.B, w2.float())
    assert update.scale == 1.0
    assert torch.equal(update.delta(), torch.kron(w1, w2.float()))
    assert update.b_parts is None
    assert update.kind == "lokr"


def test_the_parts_of_a_product_are_kept_and_multiplied_in_full_precision() -> None:
    left, right = random(5, 2).half(), random(2, 7).half()
    update = read(w1=random(3, 2), w2_a=left, w2_b=right)
    assert update.b_parts is not None
    assert all(map(torch.equal, update.b_parts, (left.float(), right.float())))
    assert torch.equal(update.B, left.float() @ right.float())


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dim": 2, "alpha": 1.0, "factor": 2},
        {"lora_dim": 2, "alpha": 1.0, "factor": 4, "decompose_both": True},
        {"lora_dim": 100, "alpha": 3.0, "factor": 4},
        {"lora_dim": 2, "alpha": 1.0, "factor": 4, "use_tucker": True},
        {"lora_dim": 3, "alpha": 1.0, "factor": 2, "rs_lora": True},
        {"lora_dim": 2, "alpha": 1.0, "factor": 4, "unbalanced_factorization": True},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
@pytest.mark.parametrize(
    "base", [nn.Linear(24, 36), nn.Conv2d(16, 24, 3), nn.Conv2d(16, 24, 1)], ids=["linear", "3x3", "1x1"]
)
def test_the_update_is_that_of_lycoris_own_layer(base: nn.Module, settings: dict[str, Any]) -> None:
    made = module(base, **settings)
    update = foreign.parse(saved(made))["x"]
    torch.testing.assert_close(update.change(base.weight), made.get_weight(made.shape).detach())


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("base", [nn.Linear(24, 36), nn.Conv2d(16, 24, 3)], ids=["linear", "3x3"])
def test_doras_change_is_that_of_lycoris_own_layer(base: nn.Module, on_out: bool) -> None:
    made = module(base, lora_dim=2, alpha=2.0, factor=4, weight_decompose=True, wd_on_out=on_out)
    with torch.no_grad():
        made.dora_scale.mul_(random(*made.dora_scale.shape).abs() + 0.5)
    update = foreign.parse(saved(made))["x"]
    expected = made.get_merged_weight(shape=made.shape)[0].detach() - base.weight.detach()
    torch.testing.assert_close(update.change(base.weight), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(update.delta().reshape(expected.shape), expected)


@pytest.mark.parametrize("decompose_both", [False, True])
def test_the_update_of_a_file_that_diffusers_wrote_is_pefts(tmp_path: Path, decompose_both: bool) -> None:
    unet = tiny_sdxl_pipeline().unet
    unet.add_adapter(
        LoKrConfig(
            r=3,
            alpha=2,
            alpha_pattern={"mid_block.resnets.0.conv1": 7},
            target_modules=["to_q", "conv1"],
            init_weights=False,
            use_effective_conv2d=True,
            decompose_both=decompose_both,
        )
    )
    unet.save_lora_adapter(tmp_path)
    updates = foreign.read(opened(tmp_path)[""])
    assert len(updates) == sum(name.endswith((".to_q", ".conv1")) for name, _ in unet.named_modules())
    for name, update in updates.items():
        layer = unet.get_submodule(name)
        torch.testing.assert_close(update.change(layer.weight), layer.get_delta_weight("default").detach())


# Writing


@settings(max_examples=50)
@given(sides, sides, sides, sides, st.sampled_from([1.0, -0.3, 7.7]), st.sampled_from([None, 1, 2]), st.booleans())
def test_what_is_written_is_read_bit_for_bit_whether_alpha_counts_or_not(
    a1: int, a2: int, b1: int, b2: int, scale: float, rank: int | None, conv: bool
) -> None:
    kernel = (3, 2) if conv else ()
    A = random(a1, a2)
    if rank:
        parts = random(4 * b1, rank), random(rank, b2, *kernel, seed=1)
        B, whole = parts, (parts[0] @ parts[1].flatten(1)).reshape(4 * b1, b2, *kernel)
    else:
        B = whole = random(b1, b2, *kernel)
    tensors = lokr.tensors({"x": (A, B, scale)})
    update = foreign.parse(tensors)["x"]
    expected = torch.kron((scale * A).reshape(a1, a2, *(1 for _ in kernel)), whole)
    assert torch.equal(update.change(expected), expected)
    without_alpha = foreign.parse({key: t for key, t in tensors.items() if key != "x.alpha"})["x"]
    assert torch.equal(without_alpha.change(expected), expected)
    assert float(tensors["x.alpha"]) == (tensors["x.lokr_w2_b"].shape[0] if "x.lokr_w2_b" in tensors else 1)


def test_what_is_written_can_be_saved_and_shares_nothing_with_the_layers(tmp_path: Path) -> None:
    A, B = random(2, 3).T.requires_grad_(), random(4, 5)[:, ::2].bfloat16()
    shared = random(4, 3).requires_grad_()
    tensors = lokr.tensors({"x": (A, B, 1.0), "y": (A, shared, 1.0), "z": (A, shared, 1.0)})
    save_file(tensors, tmp_path / "x.safetensors")
    found, _ = read_safetensors(tmp_path / "x.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    with torch.no_grad():
        A.zero_()
        shared.zero_()
    assert tensors["x.lokr_w1"].abs().min() > 0
    assert tensors["y.lokr_w2"].abs().min() > 0


NETWORK_FACTORS = {
    "whole": (random(4, 4), random(6, 9), 1.0),
    "scaled": (random(4, 4), random(6, 9), -0.7),
    "product": (random(4, 4), (random(10, 2), random(2, 12)), 2.5),
    "product of high rank": (random(4, 4), (random(6, 4), random(4, 8)), 2.5),
    "small factor second": (random(2, 2), random(40, 30), 0.3),
    "convolution": (random(4, 4), random(6, 9, 3, 2), 0.3),
    "product for a convolution": (random(4, 4), (random(8, 3), random(3, 8, 3, 3)), 0.3),
    "product of high rank for a convolution": (random(4, 4), (random(8, 4), random(4, 8, 3, 3)), 0.3),
}


@pytest.mark.parametrize("factors", NETWORK_FACTORS.values(), ids=NETWORK_FACTORS.keys())
def test_lycoris_own_network_merges_the_same_bits(factors: Any) -> None:
    A, B, scale = factors
    tensors = lokr.tensors({"lycoris_x": factors})
    whole = (B[0] @ B[1].flatten(1)).reshape(-1, *B[1].shape[1:]) if isinstance(B, tuple) else B
    kernel = whole.shape[2:]
    expected = torch.kron((scale * A).reshape(*A.shape, *(1 for _ in kernel)), whole)
    (d, h), conv = expected.shape[:2], bool(kernel)
    base = nn.ModuleDict({"x": nn.Conv2d(h, d, kernel, bias=False) if conv else nn.Linear(h, d, bias=False)})
    nn.init.zeros_(base["x"].weight)
    network, _ = create_lycoris_from_weights(1.0, "x.safetensors", base, weights_sd=tensors)
    (layer,) = network.loras
    assert torch.equal(layer.get_weight(layer.shape), expected)
    network.merge_to(1.0)
    assert torch.equal(base["x"].weight.detach(), expected)


@pytest.mark.parametrize("B", [random(320, 20), (random(320, 4), random(4, 20))], ids=["whole", "product"])
def test_lycoris_function_gives_the_same_bits_for_the_papers_factors(B: Any) -> None:
    A = random(4, 64)
    written = {key.removeprefix("x.lokr_"): t for key, t in lokr.tensors({"x": (A, B, 0.9)}).items()}
    weights = (written.get(part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
    expected = torch.kron(0.9 * A, B if isinstance(B, Tensor) else B[0] @ B[1])
    assert torch.equal(diff_weight(*weights, gamma=float(written["x.alpha"])), expected)


# Faults


FAULTS: dict[str, tuple[str, Callable[[], dict[str, Tensor]]]] = {
    "no w2": ("lacks w2_a", lambda: {"w1": random(2, 2)}),
    "half of a product": ("lacks w2_b", lambda: {"w1": random(2, 2), "w2_a": random(3, 1)}),
    "both forms": ("do not fit", lambda: {"w1": random(2, 2), "w2": random(2, 2), "w2_a": random(2, 1)}),
    "a core without its product": (
        "do not fit",
        lambda: {"w1": random(2, 2), "w2": random(2, 2), "t2": random(1, 1, 3, 3)},
    ),
    "ranks": ("w2_a of 3 × 2, w2_b of 1 × 3", lambda: {"w1": random(2, 2), "w2_a": random(3, 2), "w2_b": random(1, 3)}),
    "core": (
        "do not fit",
        lambda: {"w1": random(2, 2), "t2": random(2, 2, 3, 3), "w2_a": random(2, 4), "w2_b": random(3, 4)},
    ),
    "w1 with a kernel": ("shape 2 × 2 × 1 × 1", lambda: {"w1": random(2, 2, 1, 1), "w2": random(2, 2)}),
    "empty": ("shape 0 × 2", lambda: {"w1": random(0, 2), "w2": random(2, 2)}),
    "NaN": ("NaN in w2", lambda: {"w1": random(2, 2), "w2": random(2, 2) / 0 * 0}),
    "infinity": ("infinity or a NaN in w1", lambda: {"w1": random(2, 2) / 0, "w2": random(2, 2)}),
    "alpha NaN": (
        "holds nan as its alpha",
        lambda: {"w1": random(2, 2), "w2_a": random(2, 1), "w2_b": random(1, 2), "alpha": torch.tensor(torch.nan)},
    ),
    "alpha of two": ("an alpha of shape 2", lambda: {"w1": random(2, 2), "w2": random(2, 2), "alpha": torch.ones(2)}),
    "integers": ("torch.int8", lambda: {"w1": random(2, 2), "w2": torch.ones(2, 2, dtype=torch.int8)}),
}


@pytest.mark.parametrize(("text", "parts"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_name_the_file_and_the_layer(text: str, parts: Callable[[], dict[str, Tensor]]) -> None:
    tensors = {f"my_layer.{'' if part == 'alpha' else 'lokr_'}{part}": tensor for part, tensor in parts().items()}
    with pytest.raises(AdapterFileError, match=text) as error:
        foreign.parse(tensors, source="dog.safetensors")
    assert str(error.value).startswith("dog.safetensors: the layer my_layer ")
