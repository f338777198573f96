"""The scales that alphas and headers give, as the programs that wrote them meant."""

import json
import math
import re
import warnings
from typing import Any

import pytest
import torch
from lycoris import LoConModule, LohaModule, LokrModule
from torch import Tensor, nn

from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.scales import HEADER, Scales, from_header
from diffusekrona.files.formats.updates import Update
from diffusekrona.files.unused import Reading


def scales(**fields: Any) -> Scales:
    return from_header({"format": "pt", HEADER: json.dumps(fields)}, "dog.safetensors")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(name: str = "x", alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_up.weight": random(6, 4), f"{name}.lora_down.weight": random(4, 5)}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def whole(alpha: float | Tensor | None = None, name: str = "x") -> dict[str, Tensor]:
    tensors = {f"{name}.lokr_w1": random(2, 3), f"{name}.lokr_w2": random(4, 5)}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.as_tensor(alpha)}


def product(name: str = "y", rank: int = 4) -> dict[str, Tensor]:
    return {f"{name}.lokr_w1": random(2, 3), f"{name}.lokr_w2_a": random(6, rank), f"{name}.lokr_w2_b": random(rank, 5)}


def read(tensors: dict[str, Tensor], header: dict[str, str] | None = None, alpha_of_whole: Any = "ignored") -> Any:
    """Updates by layer, none of which may have given a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return foreign.parse(tensors, header, "dog.safetensors", Reading(alpha_of_whole=alpha_of_whole))


def kohya(args: dict[str, str], **header: str) -> dict[str, str]:
    return {"ss_network_args": json.dumps(args), **{f"ss_network_{key}": value for key, value in header.items()}}


# PEFT's configs


def test_lora_and_the_other_methods_call_alpha_differently() -> None:
    assert scales(r=4, lora_alpha=2).of("x", None) == 0.5
    assert scales(r=4, alpha=2).of("x", None) == 0.5


def test_a_pipelines_components_have_their_own() -> None:
    both = scales(**{"unet.r": 4, "unet.lora_alpha": 2, "text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 12})
    assert both.of("unet.mid.to_q", 4) == 0.5
    assert both.of("text_encoder_2.text_model.q_proj", 4) == 3.0
    assert both.of("text_encoder.text_model.q_proj", 4) == 1.0


def test_patterns_come_first_and_match_as_in_peft() -> None:
    found = scales(r=4, lora_alpha=2, alpha_pattern={"to_q": 8, r"mid\.\d+": 3}, rank_pattern={"^up.to_q": 16})
    assert found.of("base_model.model.down.to_q", None) == 2.0
    assert found.of("down.mid.11", None) == 0.75
    assert found.of("up.to_q", None) == found.of("base_model.model.up.to_q", None) == 0.5
    assert found.of("down.to_qq", None) == 0.5


def test_the_tensors_rank_counts_more_than_the_configs() -> None:
    assert scales(r=4, lora_alpha=2).of("x", 8) == 0.25


def test_rslora_divides_by_the_root() -> None:
    assert scales(r=16, lora_alpha=2, use_rslora=True).of("x", 16) == 0.5


def test_a_config_without_alpha_says_nothing() -> None:
    assert scales(r=4).of("x", 4) == 1.0


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "[" * 100000])
def test_a_damaged_header_is_named(text: str) -> None:
    with pytest.raises(AdapterFileError, match=r"dog\.safetensors has a damaged `lora_adapter_metadata`"):
        from_header({HEADER: text}, "dog.safetensors")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0, "alpha": 2}, "alpha 2 and rank 0"),
        ({"r": -4, "alpha": 2, "use_rslora": True}, "rank -4"),
        ({"alpha": 2}, "rank None"),
        ({"r": 4, "alpha": "two"}, "alpha 'two'"),
        ({"r": 4, "alpha": [2]}, re.escape("alpha [2]")),
        ({"r": 4, "alpha": float("inf")}, "alpha inf"),
        ({"r": 4, "alpha": 10**400}, "alpha 1000"),
        ({"r": 4, "alpha": 2, "alpha_pattern": ["x"]}, "alpha_pattern does not work"),
        ({"r": 4, "alpha": 2, "alpha_pattern": {"(": 1}}, "alpha_pattern does not work"),
    ],
)
def test_a_config_that_gives_no_scale_is_named(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(AdapterFileError, match=rf"^dog\.safetensors has .*{text}"):
        scales(**fields).of("x", None)


# Plain entries of a header


@pytest.mark.parametrize("name", ["alpha", "lora_alpha", "network_alpha"])
def test_an_alpha_in_the_header_is_of_all_layers_if_none_has_its_own(name: str) -> None:
    assert read(lora(), {name: "2"})["x"].scale == 0.5
    assert read(lora(), {name: "2", "use_rslora": "true"})["x"].scale == 1.0
    assert read(product(), {name: "2"})["y"].scale == 0.5
    assert read(whole(), {name: "2"})["x"].scale == 1.0
    both = read({**lora(alpha=4.0), **lora("y")}, {name: "2"})
    assert (both["x"].scale, both["y"].scale) == (1.0, 1.0)
    assert read(lora(), {name: "None"})["x"].scale == 1.0
    config = json.dumps({"r": 4, "lora_alpha": 12})
    assert read(lora(), {name: "2", HEADER: config})["x"].scale == 3.0
    for text in ("two", "[2]"):
        with pytest.raises(AdapterFileError, match=rf"^dog\.safetensors has {name} '{re.escape(text)}' in its header"):
            read(lora(), {name: text})
    for text in ("inf", "nan"):
        with pytest.raises(AdapterFileError, match=f"^dog.safetensors has alpha {text} and rank 4; both should be fin"):
            read(lora(), {name: text})


# Two whole factors

ANY_ALPHA = {
    "infinity in fp16": torch.tensor(1e10).half(),
    "minus infinity": torch.tensor(-math.inf),
    "NaN": torch.tensor(math.nan),
    "ten billion": torch.tensor(9999999999.0).bfloat16(),
    "zero": torch.tensor(0.0),
    "a whole number": torch.tensor([7]),
}


@pytest.mark.parametrize("alpha", ANY_ALPHA.values(), ids=ANY_ALPHA)
def test_the_alpha_of_two_whole_factors_may_be_anything(alpha: Tensor) -> None:
    update = read(whole(alpha))["x"]
    assert update.scale == 1.0
    assert torch.equal(update.delta(), torch.kron(random(2, 3), random(4, 5)))


@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("tensors", [lora(), product("x")], ids=["LoRA", "LoKr"])
def test_the_alpha_of_a_product_must_be_finite(tensors: dict[str, Tensor], alpha: float) -> None:
    with pytest.raises(AdapterFileError, match=f"^dog.safetensors: the layer x holds {alpha} as its alpha"):
        read({**tensors, "x.alpha": torch.tensor(alpha)})


RANKS = ["ss_network_dim", "network_dim", "lora_dim", "lora_rank", "rank", "dim", "r"]
DISPUTED = (
    r"^dog\.safetensors: 1 LoKr layers, such as x, have two whole factors and alpha 2 beside rank 16\..*taken as 1, as "
    r"LyCORIS, .*it is 0\.125\..*alpha_of_whole='applied' \(--alpha-of-whole applied on the command line\)"
)


@pytest.mark.parametrize("name", RANKS)
def test_an_alpha_beside_another_rank_is_ignored_with_a_warning_or_applied(name: str) -> None:
    with pytest.warns(UserWarning, match=DISPUTED):
        assert foreign.parse(whole(2.0), {name: "16"}, "dog.safetensors")["x"].scale == 1.0
    assert read(whole(2.0), {name: "16"}, "applied")["x"].scale == 0.125


def test_the_rank_may_be_that_of_the_files_other_layers() -> None:
    tensors = {**whole(2.0), **product(rank=16)}
    with pytest.warns(UserWarning, match=DISPUTED):
        foreign.parse(tensors, None, "dog.safetensors")
    assert read(tensors, None, "applied")["x"].scale == 0.125
    # Those of several ranks tell none, and those of LoHa are none of LoKr's.
    assert read({**tensors, **product("z", 2)}, None, "applied")["x"].scale == 1.0
    loha = {f"y.hada_{part}": random(16, 16) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    assert read({**whole(2.0), **loha})["x"].scale == 1.0


@pytest.mark.parametrize("alpha_of_whole", ["ignored", "applied"])
@pytest.mark.parametrize(
    ("alpha", "rank"),
    [(16, "16"), (2, "Dynamic"), (2, "inf"), (2, "nan"), (2, "0"), (math.inf, "16"), (0, "16")],
)
def test_nothing_is_disputed_where_alpha_is_the_rank_or_one_of_them_says_nothing(
    alpha: float, rank: str, alpha_of_whole: str
) -> None:
    assert read(whole(alpha), {"ss_network_dim": rank}, alpha_of_whole)["x"].scale == 1.0


# LyCORIS' rank stabilisation

BASES = {"linear": nn.Linear(48, 64), "convolution": nn.Conv2d(32, 48, 3, padding=1)}
MODULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LoConModule, {}),
    "LoHa": (LohaModule, {}),
    "LoKr": (LokrModule, {"factor": 4}),
    "LoKr of two products": (LokrModule, {"factor": 16, "decompose_both": True}),
    "LoKr of whole factors": (LokrModule, {"factor": 4, "full_matrix": True}),
}


def trained(cls: Any, base: nn.Module, **settings: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """LyCORIS' own layer with rs_lora: the tensors that it saves, what it multiplies, and what comes of that."""
    made = cls("x", base, 1.0, 2, 3.0, rs_lora=True, **settings)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = random(2, 48) if isinstance(base, nn.Linear) else random(1, 32, 5, 5)
    tensors = {f"x.{key}": tensor.detach().clone() for key, tensor in made.state_dict().items()}
    made.eval().apply_to()
    try:
        y = base(x).detach()
    finally:
        made.restore()
    return tensors, x, y


def applied(base: nn.Module, update: Update, x: Tensor) -> Tensor:
    before = base.weight.detach().clone()
    base.weight.data += update.change(before)
    try:
        return base(x).detach()
    finally:
        base.weight.data.copy_(before)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("cls", "settings"), MODULES.values(), ids=MODULES)
def test_rs_lora_computes_what_lycoris_own_layer_does(cls: Any, settings: dict[str, Any], base: nn.Module) -> None:
    tensors, x, y = trained(cls, base, **settings)
    header = kohya({"algo": "lokr", "rs_lora": "True"}, dim="2", alpha="3")
    torch.testing.assert_close(applied(base, read(tensors, header)["x"], x), y, rtol=1e-4, atol=1e-5)
    if {"x.lokr_w1", "x.lokr_w2"} <= tensors.keys():
        return
    # A program that writes the user's alpha as it is, and that of convolutions.
    tensors["x.alpha"] = torch.tensor(3.0)
    headers = [header, kohya({"rs_lora": "True", "conv_alpha": "3", "conv_dim": "2"}, dim="2", alpha="7")]
    for given in headers:
        torch.testing.assert_close(applied(base, read(tensors, given)["x"], x), y, rtol=1e-4, atol=1e-5)


def test_an_alpha_of_zero_stands_for_the_rank_with_rs_lora_too() -> None:
    header = kohya({"rs_lora": "True"}, dim="4", alpha="0")
    assert read(lora(alpha=0.0), header)["x"].scale == read(lora(alpha=4.0), header)["x"].scale == 2.0
    assert read(lora(alpha=8.0), header)["x"].scale == 2.0


@pytest.mark.parametrize(
    ("header", "users"),
    [
        (kohya({"rs_lora": "True"}, dim="4"), "not known"),
        (kohya({"rs_lora": "True"}, dim="4", alpha="3"), "3"),
        (kohya({"rs_lora": "True", "conv_alpha": "2.5"}, dim="4", alpha="5"), "5 or 2.5"),
    ],
    ids=["no alpha", "another", "both"],
)
def test_where_rs_lora_cannot_be_told_the_layer_is_named(header: dict[str, str], users: str) -> None:
    text = rf"rs_lora, and the layer x has alpha 5 at rank 4\..*user's alpha \({users}\) or √4 times as large"
    with pytest.raises(AdapterFileError, match=text):
        read(lora(alpha=5.0), header)


WHOLE = {"x.lokr_w1": random(2, 3), "x.lokr_w2": random(4, 5)}


@pytest.mark.parametrize("alpha", [8.0, 1.0, float("inf")])
def test_whole_factors_with_rs_lora_and_no_rank_are_named(alpha: float) -> None:
    with pytest.raises(AdapterFileError, match=r"rs_lora, and the layer x has two whole factors.*ss_network_dim"):
        read({**WHOLE, "x.alpha": torch.tensor(alpha)}, kohya({"rs_lora": "True"}, dim="Dynamic"))


def test_an_alpha_beyond_fp16_of_whole_factors_with_rs_lora_is_scaled_by_the_root_of_the_rank() -> None:
    """LyCORIS' alpha there is r·√r, and its scale √r."""
    header = kohya({"rs_lora": "True"}, dim="2500")
    assert read({**WHOLE, "x.alpha": torch.tensor(2500.0**1.5).half()}, header)["x"].scale == 50.0
    assert read({**WHOLE, "x.alpha": torch.tensor(2500.0**1.5)}, header)["x"].scale == 50.0


def test_without_rs_lora_or_rank_the_users_alpha_is_not_asked_for() -> None:
    assert read(lora(alpha=5.0), kohya({"rs_lora": "False"}, dim="4"))["x"].scale == 1.25
    one = {"x.lora_up.weight": random(6, 1), "x.lora_down.weight": random(1, 5), "x.alpha": torch.tensor(5.0)}
    assert read(one, kohya({"rs_lora": "True"}, dim="1"))["x"].scale == 5.0


@pytest.mark.parametrize("text", ["{", "[" * 100000])
def test_damaged_arguments_are_named(text: str) -> None:
    with pytest.raises(AdapterFileError, match=r"^dog\.safetensors has damaged `ss_network_args` in its header"):
        read(lora(), {"ss_network_args": text})
    assert read(lora(), {"ss_network_args": "None"})["x"].scale == 1.0
