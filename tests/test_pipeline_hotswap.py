"""Saved adapters in the place of those of a model, compiled or not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter

from diffusekrona import KronAConfig, inject_krona, save_krona
from diffusekrona.errors import AdapterFileError, AdapterNameError, MergeError
from diffusekrona.pipeline import hotswap_krona
from diffusekrona.tuner.injected import krona_layers
from tests.kinds import DECODER, MLP, UNET, Kind, delta, factors, forms, kinds, lora, output, quiet, same_factors
from tests.modules import network
from tests.snapshots import assert_same, snapshot, unchanged

pytestmark = quiet


def saved(kind: Kind, folder: Path, seed: int = 5, **fields: Any) -> Path:
    kind.adapted(seed=seed, **fields).save_pretrained(folder)
    return folder


@pytest.fixture
def no_recompiling() -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:It is not known whether ComfyUI")
def test_a_lokr_file_takes_the_place_of_an_equal_adapter(tmp_path: Path) -> None:
    trained = network()
    for parameter in inject_krona(trained, KronAConfig(a1=2, a2=8)).parameters():
        torch.nn.init.normal_(parameter)
    file = save_krona(trained, tmp_path / "dog.safetensors", format="lokr")
    model = network()
    inject_krona(model, KronAConfig(a1=2, a2=8))
    hotswap_krona(model, file)
    for one, other in zip(krona_layers(trained).values(), krona_layers(model).values(), strict=True):
        torch.testing.assert_close(other.get_delta_weight("default"), one.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [(MLP, 1.0), (MLP, 0.3), (DECODER, 0.3), (UNET, 0.3)],
    ids=["mlp", "mlp scaled", "decoder", "unet"],
)
def test_a_compiled_model_takes_another_adapter_without_compiling_anew(
    kind: Kind, alpha: float, tmp_path: Path, no_recompiling: None
) -> None:
    other = saved(kind, tmp_path, num_terms=2, alpha=alpha)
    model = kind.adapted(num_terms=2)
    compiled = torch.compile(model, backend="eager")
    first = output(kind, compiled)
    assert torch.allclose(first, output(kind, model))
    hotswap_krona(compiled, other)
    expected = output(kind, PeftModel.from_pretrained(kind.base(), other))
    found = output(kind, compiled)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, first)


def test_a_new_scale_would_have_the_model_compiled_anew(no_recompiling: None) -> None:
    # Why A takes the quotient of the scales. Shows, too, that the test above would notice.
    model = MLP.adapted()
    compiled = torch.compile(model, backend="eager")
    output(MLP, compiled)
    for layer in krona_layers(model).values():
        layer.scaling["default"] = 0.3
    with pytest.raises(torch._dynamo.exc.RecompileError):
        output(MLP, compiled)


@kinds
@forms
def test_a_swapped_adapter_is_the_saved_one(kind: Kind, form: dict[str, Any], tmp_path: Path) -> None:
    expected = kind.adapted(seed=5, modules_to_save=[kind.copied], **form)
    expected.save_pretrained(tmp_path)
    model = kind.adapted("mine", modules_to_save=[kind.copied], **form)
    model.add_adapter("other", kind.config())
    kept = copy.deepcopy(factors(model, "other"))
    places = [(id(factor), factor.data_ptr()) for factor in factors(model, "mine").values()]
    hotswap_krona(model, tmp_path, "mine")
    assert same_factors(model, expected, "mine")
    assert [(id(factor), factor.data_ptr()) for factor in factors(model, "mine").values()] == places
    assert all(torch.equal(kept[key], factor) for key, factor in factors(model, "other").items())
    assert torch.equal(output(kind, model), output(kind, expected))


def test_a_swapped_adapter_keeps_its_weight_and_its_alpha(tmp_path: Path) -> None:
    source = saved(MLP, tmp_path, alpha=0.5, alpha_pattern={"lin0": -8.0})
    model = MLP.adapted(alpha=4.0)
    for layer in krona_layers(model).values():
        layer.set_scale("default", 0.25)
    hotswap_krona(model, source)
    assert {layer.alpha["default"] for layer in krona_layers(model).values()} == {4.0}
    assert {layer.scaling["default"] for layer in krona_layers(model).values()} == {1.0}
    expected = PeftModel.from_pretrained(MLP.base(), source)
    for layer, other in zip(krona_layers(model).values(), krona_layers(expected).values(), strict=True):
        torch.testing.assert_close(delta(layer, "default"), 0.25 * delta(other, "default"), rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path / "again")
    for layer in krona_layers(model).values():
        layer.set_scale("default", 1.0)
    again = PeftModel.from_pretrained(MLP.base(), tmp_path / "again")
    assert torch.equal(output(MLP, again), output(MLP, model))


def test_a_pipelines_file_and_a_lora_beside_do_not_hinder_a_swap(tmp_path: Path) -> None:
    other = UNET.base()
    torch.manual_seed(7)
    inject_krona(other, UNET.config(alpha_pattern={"to_q": 4.0}))
    path = save_krona(other, tmp_path / "other.safetensors")
    model = UNET.base()
    inject_krona(model, UNET.config(), "mine")
    inject_adapter_in_model(lora(UNET), model, "lora")
    hotswap_krona(model, path)
    found = {name.replace(".base_layer", ""): layer for name, layer in krona_layers(model).items()}
    for name, layer in krona_layers(other).items():
        torch.testing.assert_close(delta(found[name], "mine"), delta(layer, "default"), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"a1": 4}, AdapterFileError, "differ in shape"),
        ({"num_terms": 2}, AdapterFileError, "differ in shape"),
        ({"b_rank": 1}, AdapterFileError, "in one only"),
        ({"target_modules": ["lin0"]}, AdapterFileError, "in one only"),
        ({"modules_to_save": ["head"]}, AdapterFileError, "in one only"),
        ({"layout": "transposed"}, AdapterFileError, "has the layout 'kron', not 'transposed'"),
    ],
    ids=str,
)
def test_an_adapter_of_another_form_is_not_swapped_in(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    linear = ["lin0", "lin1_default"]
    source = saved(MLP, tmp_path, **{"target_modules": linear, **fields})
    model = MLP.adapted(target_modules=linear)
    with unchanged(model), pytest.raises(error, match=message):
        hotswap_krona(model, source)


def test_a_swap_into_what_is_merged_scaled_to_zero_or_unknown_is_an_error(tmp_path: Path) -> None:
    source, model = saved(MLP, tmp_path), MLP.adapted()
    model.add_adapter("nothing", MLP.config(alpha=0.0))
    with unchanged(model), pytest.raises(AdapterNameError, match="'unknown'"):
        hotswap_krona(model, source, "unknown")
    with unchanged(model), pytest.raises(AdapterFileError, match="scale 0"):
        hotswap_krona(model, source, "nothing")
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"merged into .*; unmerge it"):
        hotswap_krona(model, source, "default")
    assert_same(before, snapshot(model))


def test_pefts_own_hotswap_refuses_krona_and_says_so(tmp_path: Path) -> None:
    model = MLP.adapted()
    with unchanged(model), pytest.raises(ValueError, match=r"Hotswapping only supports .*LORA but KRONA"):
        hotswap_adapter(model, str(saved(MLP, tmp_path)), "default")
