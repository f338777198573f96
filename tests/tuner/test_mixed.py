"""KronA beside LoRA in one model, PEFT's mixed models among them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusekrona.errors import FactorShapeError, MergeError
from diffusekrona.tuner.injected import krona_layers
from tests.kinds import (
    CLIP,
    DECODER,
    MLP,
    Kind,
    assert_base,
    assert_computes,
    dense,
    factors,
    kinds,
    lora,
    output,
    quiet,
    same_factors,
    trainable,
    weights,
)
from tests.snapshots import unchanged

pytestmark = quiet


orders = pytest.mark.parametrize("order", [("krona", "lora"), ("lora", "krona")], ids=" ".join)


def mixed(kind: Kind, order: tuple[str, ...], seed: int = 4) -> Any:
    """A model in which LoRA and KronA are active on the same layers."""
    configs = {"krona": kind.config(), "lora": lora(kind)}
    torch.manual_seed(seed)
    model = get_peft_model(kind.base(), configs[order[0]], order[0], mixed=True)
    for name in order[1:]:
        model.add_adapter(name, configs[name])
    model.set_adapter(list(order))
    return model.eval()


def dense_with_lora(kind: Kind, model: nn.Module) -> Any:
    base = dense(kind, model, {"krona": 1.0})
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "lora_A"):
            path = name.replace(".base_layer", "").removeprefix("base_model.model.")
            base.get_submodule(path).weight.data += layer.get_delta_weight("lora").detach()
    return base


@kinds
@orders
def test_a_mixed_model_adds_krona_and_lora(kind: Kind, order: tuple[str, str]) -> None:
    model = mixed(kind, order)
    assert isinstance(model, PeftMixedModel)
    assert model.active_adapters == list(order)
    both = output(kind, model)
    torch.testing.assert_close(both.double(), output(kind, dense_with_lora(kind, model)), rtol=1e-3, atol=1e-4)
    model.set_adapter("krona")
    assert_computes(kind, model, krona=1.0)
    assert trainable(model) == {"krona"}
    model.set_adapter("lora")
    assert not torch.allclose(output(kind, model), both)
    with model.disable_adapter():
        assert_base(kind, model)


@kinds
@orders
def test_a_mixed_model_merges_and_unloads_all_of_both(kind: Kind, order: tuple[str, str]) -> None:
    model = mixed(kind, order)
    expected = output(kind, dense_with_lora(kind, model))
    plain = model.merge_and_unload()
    assert [type(module) for module in plain.modules()] == [type(module) for module in kind.base().modules()]
    torch.testing.assert_close(output(kind, plain).double(), expected, rtol=1e-3, atol=1e-4)
    assert weights(mixed(kind, order).unload()) == weights(kind.base())


@orders
def test_a_mixed_models_adapter_that_cannot_merge_is_found_first(order: tuple[str, str]) -> None:
    model = mixed(MLP, order)
    next(iter(factors(model, "krona").values())).data.view(-1)[0] = float("nan")
    with unchanged(model), pytest.raises(MergeError, match="Nothing was merged"):
        model.merge_and_unload()


@orders
@pytest.mark.parametrize("deleted", ["krona", "lora"])
def test_a_mixed_model_deletes_one_and_keeps_the_other(order: tuple[str, str], deleted: str) -> None:
    model, kept = mixed(DECODER, order), {"krona": "lora", "lora": "krona"}[deleted]
    model.set_adapter(kept)
    expected = output(DECODER, model)
    model.set_adapter(["krona", "lora"])
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept]
    torch.testing.assert_close(output(DECODER, model), expected, rtol=1e-4, atol=1e-5)


@orders
@pytest.mark.parametrize("lazily", [False, True], ids=["at once", "low_cpu_mem_usage"])
def test_a_mixed_model_loads_what_was_saved_alone(order: tuple[str, str], lazily: bool, tmp_path: Path) -> None:
    for name, config in (("krona", DECODER.config()), ("lora", lora(DECODER))):
        torch.manual_seed(6)
        get_peft_model(DECODER.base(), config).save_pretrained(tmp_path / name)
    model = PeftMixedModel.from_pretrained(DECODER.base(), tmp_path / order[0], order[0], low_cpu_mem_usage=lazily)
    model.load_adapter(tmp_path / order[1], order[1], low_cpu_mem_usage=lazily)
    for name in order:
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(DECODER.base(), tmp_path / name)
        torch.testing.assert_close(output(DECODER, model), output(DECODER, alone), rtol=1e-4, atol=1e-5)
    model.set_adapter(["krona", "lora"])
    expected = output(DECODER, dense_with_lora(DECODER, model))
    torch.testing.assert_close(output(DECODER, model).double(), expected, rtol=1e-3, atol=1e-4)


def test_a_mixed_model_still_takes_what_peft_does_and_refuses_the_rest() -> None:
    model = mixed(MLP, ("krona", "lora"))
    model.add_adapter("lokr", peft.LoKrConfig(target_modules=["lin0"], init_weights=False))
    model.set_adapter(["krona", "lora", "lokr"])
    assert bool(torch.isfinite(output(MLP, model.merge_and_unload())).all())
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(MLP.base(), peft.IA3Config(target_modules=["lin0"], feedforward_modules=[]), mixed=True)
    base = MLP.base()
    with unchanged(base), pytest.raises(FactorShapeError, match="a1=3"):
        get_peft_model(base, MLP.config(a1=3), mixed=True)


class Uncopyable(nn.Linear):
    """Fails late in an injection, when PEFT has already wrapped every targeted layer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Uncopyable":
        raise RuntimeError("this layer cannot be copied")


@orders
def test_a_failed_injection_leaves_a_mixed_model_as_it_was(order: tuple[str, str]) -> None:
    model = mixed(MLP, order)
    model.base_model.model.head = Uncopyable(16, 4)
    with unchanged(model), pytest.raises(RuntimeError, match="cannot be copied"):
        model.add_adapter("bad", MLP.config(modules_to_save=["head"]))


@pytest.mark.parametrize("word", ["attention", "all-linear"])
def test_a_mixed_model_knows_the_words_for_layers_and_trains_their_factors(word: str) -> None:
    model = get_peft_model(CLIP.base(), CLIP.config(target_modules=word), "krona", mixed=True)
    assert trainable(model) == {"krona"}
    assert len(krona_layers(model)) == (8 if word == "attention" else 12)


@kinds
@orders
def test_merging_krona_for_good_merges_a_lora_on_the_same_layers_too(kind: Kind, order: tuple[str, str]) -> None:
    base = kind.base()
    torch.manual_seed(4)
    if order[0] == "lora":
        inject_adapter_in_model(lora(kind), base, "lora")
    model = get_peft_model(base, kind.config(), "krona")
    if order[0] == "krona":
        inject_adapter_in_model(lora(kind), model.get_base_model(), "lora")
    expected = output(kind, dense_with_lora(kind, model))
    torch.testing.assert_close(output(kind, model).double(), expected, rtol=1e-3, atol=1e-4)
    plain = model.merge_and_unload()
    assert [type(module) for module in plain.modules()] == [type(module) for module in kind.base().modules()]
    torch.testing.assert_close(output(kind, plain).double(), expected, rtol=1e-3, atol=1e-4)


@orders
def test_an_adapter_beside_a_lora_saves_and_loads_through_peft_as_if_alone(
    order: tuple[str, str], tmp_path: Path
) -> None:
    alone = MLP.adapted()
    base = MLP.base()
    if order[0] == "lora":
        inject_adapter_in_model(lora(MLP), base, "lora")
    torch.manual_seed(1)
    model = get_peft_model(base, MLP.config())
    if order[0] == "krona":
        inject_adapter_in_model(lora(MLP), model.get_base_model(), "lora")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert same_factors(PeftModel.from_pretrained(MLP.base(), tmp_path), alone)
    model.load_adapter(tmp_path, "again")
    assert same_factors(model, model, "default", "again")


def test_peft_is_as_it_was_until_the_first_config_and_takes_one_beside_a_lora_then() -> None:
    program = """
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import mixed
from peft.tuners.mixed.model import PREFIXES, MixedModel
before = dict(vars(MixedModel)), mixed.COMPATIBLE_TUNER_TYPES, list(PREFIXES)
import diffusekrona
assert (dict(vars(MixedModel)), mixed.COMPATIBLE_TUNER_TYPES, list(PREFIXES)) == before
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"]), "lora", mixed=True)
model.add_adapter("krona", diffusekrona.KronAConfig(a1=2, a2=2, target_modules=["0"], init_b="normal"))
x = torch.ones(1, 8)
lora = model(x)
model.set_adapter(["lora", "krona"])
assert not torch.equal(model(x), lora)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
