"""OFT, BOFT and (IA)³ change a weight as PEFT's own layers do, and OneTrainer's OFT as its formula says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, IA3Config, OFTConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusekrona import merge_file
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.library import LibraryUpdate
from diffusekrona.files.formats.scales import HEADER
from diffusekrona.files.formats.updates import Update
from diffusekrona.files.read import opened
from diffusekrona.tuner.compat import block_diagonals


class Block(nn.Module):
    """Layers without biases, as attention has them, of a kind and a size each."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 24, kernel, padding=kernel // 2, bias=False)
        self.attn = nn.ModuleDict({"to_k": nn.Linear(24, 36, bias=False), "to_v": nn.Linear(36, 24, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn["to_v"](self.attn["to_k"](self.conv(x).flatten(2).mT).tanh())
        return y


LAYERS = ["conv", "to_k", "to_v"]
OFT: dict[str, dict[str, Any]] = {
    "block size": {"oft_block_size": 4},
    "number of blocks": {"r": 3, "oft_block_size": 0},
    "a block size that PEFT has to adjust": {"oft_block_size": 7},
    "exact Cayley": {"oft_block_size": 4, "use_cayley_neumann": False},
    "three terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 3},
    "constrained": {"oft_block_size": 4, "coft": True, "eps": 0.3},
    "shared": {"oft_block_size": 4, "block_share": True},
}
BOFT: dict[str, dict[str, Any]] = {
    "block size": {"boft_block_size": 6, "boft_block_num": 0},
    "number of blocks": {"boft_block_size": 0, "boft_block_num": 2},
}
IA3: dict[str, dict[str, Any]] = {
    "outputs": {"feedforward_modules": []},
    "inputs": {"feedforward_modules": ["conv", "to_v"]},
    "inputs by a pattern": {"feedforward_modules": r"(conv|.*\.to_k)"},
}
CONFIGS: dict[str, tuple[PeftConfig, int]] = {
    **{f"OFT, {name}": (OFTConfig(target_modules=LAYERS, **own), 1) for name, own in OFT.items()},
    **{f"BOFT, {name}": (BOFTConfig(target_modules=LAYERS, **own), 3) for name, own in BOFT.items()},
    **{f"IA3, {name}": (IA3Config(target_modules=LAYERS, **own), 3) for name, own in IA3.items()},
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 5


def trained(model: nn.Module, config: PeftConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for seed, parameter in enumerate(adapted.parameters()):
            if parameter.requires_grad:
                parameter.add_(drawn(*parameter.shape, seed=seed))
    return adapted


def updates(folder: Path) -> dict[str, Update]:
    return foreign.read(opened(folder)[""])


def file_of(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_layer_computes_what_pefts_own_does(name: str, tmp_path: Path) -> None:
    config, kernel = CONFIGS[name]
    model, x = Block(kernel), drawn(2, 12, 5, 5)
    before = {key: layer.weight.detach().clone() for key, layer in model.named_modules() if hasattr(layer, "weight")}
    original, adapted = model(x), trained(model, config)
    adapted.save_pretrained(tmp_path)  # before a forward pass, which constrains OFT's tensors in their place
    expected = adapted(x)
    changes = {key.removeprefix("base_model.model."): one for key, one in updates(tmp_path).items()}
    assert {one.kind for one in changes.values()} == {name.partition(",")[0].lower()}
    assert sum(one.parameters for one in changes.values()) == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )
    peft, ours = adapted.merge_and_unload(), Block(kernel)
    with torch.no_grad():
        for key, weight in before.items():
            merged = weight + changes[key].change(weight)
            torch.testing.assert_close(merged, peft.get_submodule(key).weight, rtol=1e-5, atol=1e-6)
            ours.get_submodule(key).weight.copy_(merged)
    assert not torch.allclose(original, expected, atol=1e-2)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_bofts_rotations_in_a_row_need_no_cuda_extension(tmp_path: Path) -> None:
    config = BOFTConfig(target_modules=["to_k"], boft_block_size=6, boft_n_butterfly_factor=2)
    model, x = Block(), drawn(2, 12, 5, 5)
    weight = model.attn["to_k"].weight.detach().clone()
    with block_diagonals():
        adapted = trained(model, config)
        expected = adapted(x)
    adapted.save_pretrained(tmp_path)
    (change,) = (one.change(weight) for one in updates(tmp_path).values())
    scales = adapted.base_model.model.attn["to_k"].boft_s["default"].detach()
    rotated = (weight + change) / scales
    torch.testing.assert_close(rotated @ rotated.T, weight @ weight.T, rtol=1e-4, atol=1e-5)
    ours = adapted.unload()
    with torch.no_grad():
        ours.attn["to_k"].weight += change
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_a_pipelines_config_in_the_header_counts_for_its_component() -> None:
    weight, config = drawn(24, 12), {"peft_type": "IA3", "feedforward_modules": ["to_k"]}
    tensors = {"unet.to_k.ia3_l": drawn(1, 12), "unet.to_v.ia3_l": drawn(24, 1)}
    header = {HEADER: json.dumps({f"unet.{field}": value for field, value in config.items()})}
    found = foreign.parse(tensors, header)
    for name, update in found.items():
        torch.testing.assert_close(update.change(weight), weight * tensors[f"{name}.ia3_l"] - weight)


def test_ia3_beside_a_bias_is_refused_unless_it_multiplies_inputs(tmp_path: Path) -> None:
    model = nn.ModuleDict({"to_out": nn.Linear(4, 6)})
    config = {"peft_type": "IA3", "feedforward_modules": []}
    with pytest.raises(AdapterFileError, match=r"to_out is \(IA\)³ on the outputs of a layer with a bias"):
        merge_file(model, file_of(tmp_path, {"to_out.ia3_l": drawn(6, 1)}, **config))
    before, factors = model["to_out"].weight.detach().clone(), drawn(1, 4)
    config["feedforward_modules"] = ["to_out"]
    assert merge_file(model, file_of(tmp_path, {"to_out.ia3_l": factors}, **config)) == 1
    torch.testing.assert_close(model["to_out"].weight.detach(), before * factors)


def test_oft_on_a_kernel_is_refused_as_peft_computes_no_convolution_there(tmp_path: Path) -> None:
    conv, x = nn.Conv2d(12, 24, 3), drawn(1, 12, 7, 7)
    fresh = get_peft_model(nn.Sequential(conv), OFTConfig(target_modules=["0"], oft_block_size=4))
    assert not torch.allclose(fresh(x), conv(x), atol=1e-2), "PEFT has mended it: merge such layers"
    fresh.save_pretrained(tmp_path)
    (update,) = updates(tmp_path).values()
    with pytest.raises(AdapterFileError, match="PEFT's OFT on a convolution with a kernel of 3 × 3"):
        update.change(conv.weight)


VALID = {"peft_type": "OFT", "oft_block_size": 4, "r": 0, "peft_version": "0.21.2"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORA"}, "is of PEFT's OFT, but the config is for LORA"),
        ({"peft_version": "0.17.1"}, "was written by PEFT 0.17.1, which computed OFT's Neumann series"),
        ({"peft_version": None}, "was written by PEFT before 0.18"),
        ({"sideways": 3}, "has a config with sideways, which this version of PEFT does not know"),
        ({"r": 3}, "has a config that PEFT does not take"),
        ({"r": "many"}, "has a config that PEFT does not take"),
    ],
)
def test_a_config_that_cannot_be_obeyed_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=f"adapter_model.safetensors: the layer base_model.model.x {message}"):
        updates(file_of(tmp_path, {"x.oft_R.weight": drawn(3, 6)}, **{**VALID, **config}))


def test_a_field_that_the_layer_fails_on_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = file_of(tmp_path, {"x.oft_R.weight": drawn(3, 6)}, **{**VALID, "num_cayley_neumann_terms": "five"})
    with pytest.raises(AdapterFileError, match=r"base_model.model.x is nothing that PEFT can compute: "):
        updates(folder)["base_model.model.x"].change(drawn(24, 12))


def test_an_older_pefts_exact_cayley_and_a_later_ones_unused_field_are_read(tmp_path: Path) -> None:
    config = {**VALID, "peft_version": "0.17.0", "use_cayley_neumann": False, "sideways": None}
    assert list(updates(file_of(tmp_path, {"x.oft_R.weight": drawn(3, 6)}, **config)))


@pytest.mark.parametrize("part", ["oft_R.weight", "boft_R", "ia3_l"])
def test_without_its_config_a_file_of_pefts_says_nothing(part: str) -> None:
    tensors = {f"base_model.model.x.{part}": drawn(1, 3, 4, 4) if part == "boft_R" else drawn(3, 6)}
    tensors.update({"base_model.model.x.boft_s": drawn(24, 1)} if part == "boft_R" else {})
    with pytest.raises(AdapterFileError, match=r"nothing without its config: keep adapter_config\.json beside"):
        foreign.parse(tensors)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"x.oft_R.weight": drawn(3, 6)}, VALID),
        ({"x.oft_R.weight": drawn(4, 6)}, {**VALID, "oft_block_size": 8}),
        ({"x.boft_R": drawn(1, 3, 4, 4), "x.boft_s": drawn(24, 1)}, {"peft_type": "BOFT", "boft_block_size": 4}),
        ({"x.boft_R": drawn(1, 4, 4, 4), "x.boft_s": drawn(20, 1)}, {"peft_type": "BOFT", "boft_block_size": 4}),
        ({"x.ia3_l": drawn(16, 1)}, {"peft_type": "IA3", "feedforward_modules": []}),
        ({"x.ia3_l": drawn(24, 1)}, {"peft_type": "IA3", "feedforward_modules": ["x"]}),
    ],
)
def test_a_weight_of_another_shape_is_refused(
    tensors: dict[str, Tensor], config: dict[str, Any], tmp_path: Path
) -> None:
    (update,) = updates(file_of(tmp_path, tensors, **config)).values()
    with pytest.raises(AdapterFileError, match=r"base_model.model.x was made for a weight with .* here is 24 × 16;"):
        update.change(drawn(24, 16))


@pytest.mark.parametrize(
    ("part", "config"), [("oft_R.weight", VALID), ("ia3_l", {"peft_type": "IA3", "feedforward_modules": []})]
)
def test_a_damaged_tensor_names_the_layer(part: str, config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=f"model.x holds an infinity or a NaN in {part}"):
        updates(file_of(tmp_path, {f"x.{part}": torch.full((3, 6), float("inf"))}, **config))
    with pytest.raises(AdapterFileError, match=f"model.x holds {part} of shape 3, where"):
        updates(file_of(tmp_path, {f"x.{part}": torch.ones(3)}, **config))


def rotations(vectors: Tensor, b: int) -> Tensor:
    """n × b × b in float64: 1 + 2Q + 2Q² + 2Q³ + Q⁴ with the vectors above the diagonals of Q = −Qᵀ."""
    Q = torch.zeros(len(vectors), b, b, dtype=torch.float64)
    above = [(i, j) for i in range(b) for j in range(i + 1, b)]
    for entry, (i, j) in enumerate(above):
        Q[:, i, j], Q[:, j, i] = vectors[:, entry].double(), -vectors[:, entry].double()
    return torch.eye(b, dtype=torch.float64) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n", [9, 1])
def test_onetrainers_oft_follows_its_formula(n: int, scaled: bool) -> None:
    vectors, x = drawn(n, 6), drawn(2, 4, 5, 5).double()
    tensors = {
        "lora_unet_x.oft_R.weight": vectors,
        **({"lora_unet_x.oft_R.scaled_oft": torch.tensor(True)} if scaled else {}),
    }
    update = foreign.parse(tensors)["lora_unet_x"]
    assert (update.kind, update.parameters) == ("oft", 6 * n)
    R = torch.block_diag(*rotations(vectors / (2 * math.sqrt(3)) if scaled else vectors, 4).expand(9, 4, 4))
    linear, conv = drawn(10, 36), drawn(10, 4, 3, 3)
    # It rotates a linear layer's input, and a convolution's weight from the same side.
    turned = nn.functional.linear(x.reshape(-1, 4).repeat(1, 9) @ R, linear.double())
    merged = nn.functional.linear(x.reshape(-1, 4).repeat(1, 9), (linear + update.change(linear)).double())
    torch.testing.assert_close(merged, turned, rtol=1e-5, atol=1e-6)
    turned = nn.functional.conv2d(x, (conv.double().flatten(1) @ R).reshape(conv.shape))
    torch.testing.assert_close(
        nn.functional.conv2d(x, (conv + update.change(conv)).double()), turned, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(9, 5), (6,)])
def test_onetrainers_vectors_have_the_length_of_some_block(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterFileError, match=r"The file: the layer x holds oft_R\.weight of "):
        foreign.parse({"x.oft_R.weight": drawn(*shape)})


@pytest.mark.parametrize("shape", [(10, 40), (10, 40, 1, 1)])
def test_onetrainers_oft_of_another_model_is_refused(shape: tuple[int, ...]) -> None:
    update = foreign.parse({"x.oft_R.weight": drawn(9, 6)})["x"]
    with pytest.raises(AdapterFileError, match=r"the layer x was made for a weight with oft_R\.weight of 9 × 6, where"):
        update.change(drawn(*shape))


ROWS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "OFT": ({"x.oft_R.weight": drawn(4, 6)}, VALID),
    "BOFT": ({"x.boft_R": drawn(1, 4, 4, 4), "x.boft_s": drawn(24, 1)}, {"peft_type": "BOFT", "boft_block_size": 4}),
    "IA3 on outputs": ({"x.ia3_l": drawn(24, 1)}, {"peft_type": "IA3", "feedforward_modules": []}),
    "IA3 on inputs": ({"x.ia3_l": drawn(1, 16)}, {"peft_type": "IA3", "feedforward_modules": ["x"]}),
}


@pytest.mark.parametrize(("tensors", "config"), ROWS.values(), ids=ROWS)
def test_rows_of_a_layer_change_as_in_the_whole_layer(
    tensors: dict[str, Tensor], config: dict[str, Any], tmp_path: Path
) -> None:
    weight = drawn(24, 16)
    (update,) = updates(file_of(tmp_path, tensors, **config)).values()
    assert isinstance(update, LibraryUpdate)
    change = update.of_rows(4, 12).change(weight[4:12])
    torch.testing.assert_close(change, update.change(weight)[4:12], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["BOFT, block size", "IA3, outputs"])
def test_rows_of_a_convolution_are_refused(name: str, tmp_path: Path) -> None:
    trained(Block(3), CONFIGS[name][0]).save_pretrained(tmp_path)
    update = updates(tmp_path)["base_model.model.conv"]
    assert isinstance(update, LibraryUpdate)
    with pytest.raises(AdapterFileError, match=r"model\.conv is .* on a layer that is several in this model"):
        update.of_rows(0, 12)
