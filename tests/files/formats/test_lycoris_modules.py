"""Diag-OFT, BOFT, GLoRA and (IA)³ change a weight as LyCORIS' own layers do, and kohya's OFT as its formula says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import create_lycoris
from lycoris.modules import ButterflyOFTModule, DiagOFTModule, GLoRAModule, IA3Module
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusekrona import merge_file
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.library import LibraryUpdate
from diffusekrona.files.formats.updates import Update

LAYERS = {
    "linear": (lambda: nn.Linear(12, 24), (5, 12)),
    "conv2d": (lambda: nn.Conv2d(12, 24, 3, stride=2, padding=1), (2, 12, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(12, 24, 3, padding=1), (2, 12, 7)),
}
METHODS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "diag-oft": (DiagOFTModule, {"lora_dim": 4}),
    "diag-oft, small blocks": (DiagOFTModule, {"lora_dim": 2}),
    "diag-oft, constrained": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}),
    "diag-oft, rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    "boft": (ButterflyOFTModule, {"lora_dim": 6}),
    "boft, large blocks": (ButterflyOFTModule, {"lora_dim": 12}),
    "boft, constrained": (ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.01}),
    "boft, rescaled": (ButterflyOFTModule, {"lora_dim": 6, "rescaled": True}),
    "glora": (GLoRAModule, {"lora_dim": 4, "alpha": 3}),
    "glora, alpha 0": (GLoRAModule, {"lora_dim": 4, "alpha": 0}),
    "ia3": (IA3Module, {}),
    "ia3, on input": (IA3Module, {"train_on_input": True}),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 2


def trained(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.add_(drawn(*parameter.shape, seed=seed))
    return module


def read(tensors: dict[str, Tensor], name: str = "lora_unet_x") -> Update:
    return foreign.parse({f"{name}.{part}": tensor for part, tensor in tensors.items()}, source="dog")[name]


def with_change(layer: nn.Module, update: Update) -> nn.Module:
    with torch.no_grad():
        layer.weight += update.change(layer.weight)
    return layer


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_merged_layer_computes_what_lycoris_own_does(method: str, layer: str) -> None:
    make, size = LAYERS[layer]
    base, (kind, settings) = make(), METHODS[method]
    x, module = drawn(*size), trained(kind("x", base, **settings))
    update = read(dict(module.state_dict()))
    assert update.kind == method.partition(",")[0]
    assert update.parameters == sum(parameter.numel() for parameter in module.parameters())
    module.apply_to()
    expected = base(x)
    module.restore()
    assert not torch.allclose(base(x), expected, atol=1e-2)
    torch.testing.assert_close(with_change(base, update)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algo", ["diag-oft", "boft", "glora", "ia3"])
def test_a_whole_file_of_lycoris_merges(algo: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 16))
    network = create_lycoris(model, 1.0, linear_dim=6, linear_alpha=2, algo=algo)
    network.apply_to()
    trained(network)
    save_file(network.state_dict(), tmp_path / "dog.safetensors")
    x = drawn(3, 12)
    expected = model(x)
    network.restore()
    assert merge_file(model, tmp_path / "dog.safetensors") == 2
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [24, 12])
def test_the_older_order_of_gloras_factors_is_known(outputs: int) -> None:
    weight, module = drawn(outputs, 12), trained(GLoRAModule("x", nn.Linear(12, outputs), lora_dim=4, alpha=3))
    tensors = dict(module.state_dict())
    other = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    before = {f"{other.get(key[:2], key[:2])}{key[2:]}" if "." in key else key: tensors[key] for key in tensors}
    assert before["a1.weight"].shape == (4, 12)
    torch.testing.assert_close(read(before).change(weight), read(tensors).change(weight), rtol=0, atol=0)
    square = {key: drawn(4, 4) for key in tensors if key != "alpha"}
    with pytest.raises(AdapterFileError, match="holds square factors only"):
        read(square)


def rotated(weight: Tensor, blocks: Tensor, constraint: float) -> Tensor:
    """Kohya's OFT in float64, block by block: Rᵀ · W with R = (1 + Q)(1 − Q)⁻¹ and ‖Q‖ at most the constraint."""
    n, b, _ = blocks.shape
    Q = blocks.double() - blocks.double().mT
    Q *= min(1.0, constraint / float(Q.norm()))
    eye = torch.eye(b, dtype=torch.float64)
    rows = weight.double().reshape(n, b, -1)
    return torch.cat([((eye + q) @ torch.linalg.inv(eye - q)).T @ own for q, own in zip(Q, rows, strict=True)])


@pytest.mark.parametrize("alpha", [1e-3, 0.02, 10.0])
@pytest.mark.parametrize("n", [2, 8])
def test_kohyas_oft_follows_its_formula(alpha: float, n: int) -> None:
    weight, blocks = drawn(24, 12), drawn(n, 24 // n, 24 // n)
    update = read({"oft_blocks": blocks, "alpha": torch.tensor(alpha)}, "oft_unet_x")
    assert update.kind == "oft"
    expected = rotated(weight, blocks, alpha * 24) - weight
    torch.testing.assert_close(update.change(weight).double(), expected, rtol=1e-5, atol=1e-6)


def test_kohyas_oft_of_a_fused_layer_takes_its_rows_apart() -> None:
    weight, blocks = drawn(32, 6), [drawn(4, b, b) for b in (2, 3, 3)]
    tensors = {f"oft_blocks.{number}": own for number, own in enumerate(blocks)}
    change = read({**tensors, "alpha": torch.tensor(0.05)}, "oft_unet_x").change(weight)
    expected = [
        rotated(rows, own, 0.05 * len(rows)) for rows, own in zip(weight.split([8, 12, 12]), blocks, strict=True)
    ]
    torch.testing.assert_close(change.double(), torch.cat(expected) - weight, rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterFileError, match=r"holds oft_blocks\.1, where one set of blocks or several in a row"):
        read({"oft_blocks.1": blocks[0], "alpha": torch.tensor(0.05)}, "oft_unet_x")


def test_a_file_without_a_constraint_has_none() -> None:
    weight, blocks = drawn(24, 12), drawn(6, 4, 4)
    free = read({"oft_blocks": blocks, "alpha": torch.tensor(0)}).change(weight)
    torch.testing.assert_close(read({"oft_blocks": blocks}).change(weight), free, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [{}, {"alpha": torch.tensor(0.0)}])
def test_kohyas_oft_without_a_constraint_is_refused(alpha: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterFileError, match=r"oft_unet_x holds an alpha of 0, or none, .*more than 0 in the OFT of"):
        read({"oft_blocks": drawn(6, 4, 4), **alpha}, "oft_unet_x")


FILES: dict[str, dict[str, Tensor]] = {
    "diag-oft": {"oft_blocks": drawn(6, 4, 4), "rescale": drawn(24, 1), "alpha": torch.tensor(0.0)},
    "boft": {"oft_blocks": drawn(3, 4, 6, 6), "alpha": torch.tensor(0.0)},
    "glora": {
        "a1.weight": drawn(12, 4),
        "a2.weight": drawn(4, 12),
        "b1.weight": drawn(24, 4),
        "b2.weight": drawn(4, 12),
    },
    "ia3": {"weight": drawn(24), "on_input": torch.tensor(0)},
}


@pytest.mark.parametrize("tensors", FILES.values(), ids=FILES)
def test_a_damaged_number_names_the_layer_and_the_tensor(tensors: dict[str, Tensor]) -> None:
    for part in tensors.keys() - {"alpha", "on_input"}:
        damaged = {**tensors, part: tensors[part].clone().index_fill_(0, torch.tensor(0), float("nan"))}
        name = part.removesuffix(".weight")
        with pytest.raises(AdapterFileError, match=f"dog: the layer lora_unet_x holds an infinity or a NaN in {name}:"):
            read(damaged)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("diag-oft", {"oft_blocks": drawn(6, 4, 3)}),
        ("diag-oft", {"oft_blocks": drawn(4, 4)}),
        ("diag-oft", {"alpha": torch.tensor(-1.0)}),
        ("diag-oft", {"alpha": torch.tensor(float("nan"))}),
        ("diag-oft", {"alpha": torch.zeros(2)}),
        ("diag-oft", {"dora_scale": drawn(24, 1)}),
        ("boft", {"oft_blocks": drawn(3, 4, 3, 3)}),
        ("boft", {"oft_blocks": drawn(4, 4, 6, 6)}),
        ("glora", {"a1.weight": drawn(12, 3)}),
        ("glora", {"b2.weight": drawn(4, 11)}),
        ("glora", {"b2.weight": drawn(4, 12, 3, 3)}),
        ("glora", {"alpha": torch.zeros(2)}),
        ("ia3", {"weight": drawn(2, 12)}),
        ("ia3", {"on_input": torch.zeros(2)}),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(kind: str, damage: dict[str, Tensor]) -> None:
    with pytest.raises(AdapterFileError, match="dog: the layer lora_unet_x holds "):
        read({**FILES[kind], **damage})


@pytest.mark.parametrize(
    ("tensors", "weight", "made_for"),
    [
        ({"oft_blocks": drawn(6, 4, 4)}, (20, 12), "with 24 outputs"),
        (FILES["diag-oft"], (24, 12, 3, 3), "that a rescale of 24 × 1 fits"),
        (FILES["boft"], (20, 12), "with 24 outputs"),
        (FILES["glora"], (24, 13), "of 24 × 12"),
        (FILES["glora"], (24, 12, 1, 1), "of 24 × 12"),
        (FILES["ia3"], (12, 24), "with 24 outputs"),
        ({**FILES["ia3"], "on_input": torch.tensor(1)}, (24, 12), "with 24 inputs"),
        (FILES["ia3"], (24,), "of a linear layer or a convolution"),
    ],
)
def test_a_weight_of_another_shape_is_refused(
    tensors: dict[str, Tensor], weight: tuple[int, ...], made_for: str
) -> None:
    found = " × ".join(map(str, weight))
    with pytest.raises(
        AdapterFileError, match=f"dog: the layer lora_unet_x was made for a weight {made_for}, .*{found};"
    ):
        read(tensors).change(drawn(*weight))


@pytest.mark.parametrize("kind", ["glora", "ia3"])
def test_a_name_that_says_nothing_counts_only_with_all_others(kind: str) -> None:
    for missing in FILES[kind]:
        rest = {part: tensor for part, tensor in FILES[kind].items() if part != missing}
        with pytest.raises(AdapterFileError, match=f"of a kind that cannot be read here, {len(rest)} of {len(rest)}"):
            read(rest)


def test_rows_of_a_layer_change_as_in_the_whole_layer() -> None:
    weight = drawn(24, 12)
    blocks = {f"oft_blocks.{number}": drawn(4, b, b) for number, b in enumerate((2, 3, 1))}
    for tensors in (
        FILES["glora"],
        FILES["ia3"],
        {**FILES["ia3"], "weight": drawn(12), "on_input": torch.tensor(1)},
        blocks,
    ):
        update = read({**tensors, **({"alpha": torch.tensor(0.02)} if tensors is blocks else {})})
        assert isinstance(update, LibraryUpdate)
        for first, last in ((0, 8), (8, 20), (8, 24)):
            change = update.of_rows(first, last).change(weight[first:last])
            torch.testing.assert_close(change, update.change(weight)[first:last], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tensors", [FILES["diag-oft"], FILES["boft"], {"oft_blocks": drawn(6, 4, 4)}])
def test_rows_that_depend_on_others_are_refused(tensors: dict[str, Tensor]) -> None:
    update = read(tensors)
    assert isinstance(update, LibraryUpdate)
    with pytest.raises(AdapterFileError, match=r"lora_unet_x is .* on a layer that is several in this model"):
        update.of_rows(0, 12)
    assert update.of_rows(0, 24) is update
