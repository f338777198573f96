"""What our errors tell users to do instead is done here, and works."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_file, save_krona
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.convert import Target, convert
from diffusekrona.tuner.injected import krona_layers
from tests import transformers
from tests.pipelines import tiny_sd_pipeline

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def sides() -> tuple[int, int]:
    return tuple(tiny_sd_pipeline().unet.get_submodule(NAME).weight.shape)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora() -> dict[str, Tensor]:
    d, h = sides()
    return {f"{LAYER}.lora_up.weight": random(d, 2), f"{LAYER}.lora_down.weight": random(2, h)}


def loha() -> dict[str, Tensor]:
    d, h = sides()
    shapes = {"w1_a": (d, 2), "w1_b": (2, h), "w2_a": (d, 2), "w2_b": (2, h)}
    return {f"{LAYER}.hada_{part}": random(*shape) for part, shape in shapes.items()}


def dora() -> dict[str, Tensor]:
    return {**lora(), f"{LAYER}.dora_scale": random(sides()[0], 1)}


def whole() -> dict[str, Tensor]:
    return {f"{LAYER}.diff": random(*sides())}


def ia3() -> dict[str, Tensor]:
    return {f"{LAYER}.weight": random(sides()[0], 1), f"{LAYER}.on_input": torch.tensor(0)}


def refusal(run, *parts) -> str:
    with pytest.raises(AdapterFileError) as caught:
        run(*parts)
    return str(caught.value)


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("tensors", [lora, loha, whole, dora, ia3])
def test_what_cannot_stay_an_adapter_merges_and_is_approximated_where_that_is_said(tensors, base, tmp_path):
    path = tmp_path / "dog.safetensors"
    save_file(tensors(), path)
    text = refusal(load_krona, tiny_sd_pipeline(), path)
    assert "merge_file(pipe, path)" in text
    assert merge_file(tiny_sd_pipeline(), path) == 1
    target = Target(budget=0.9)
    assert ("diffusekrona convert --budget" in text) == (tensors in (lora, loha, whole))
    if "convert" in text:
        assert convert(path, tmp_path / "out.safetensors", model=base, target=target).layers == 1
        load_krona(tiny_sd_pipeline(), tmp_path / "out.safetensors")
    else:
        assert "diffusekrona merge" in refusal(convert, path, tmp_path / "out.safetensors", "krona", base, target)


def test_a_file_for_no_known_model_is_converted_when_its_base_is_named(base, tmp_path):
    path = tmp_path / "dog.safetensors"
    d, h = sides()
    save_file({f"{LAYER}.lokr_w1": random(2, 2), f"{LAYER}.lokr_w2": random(d // 2, h // 2)}, path)
    assert "the folder of its base model" in refusal(convert, path, tmp_path / "out.safetensors")
    assert convert(path, tmp_path / "out.safetensors", model=base).layers == 1


@pytest.mark.parametrize("settings", [{"num_terms": 2}, {"layout": "transposed"}])
def test_what_lokr_cannot_hold_is_written_as_a_lora_approximated_or_merged(settings, base, tmp_path):
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(a1=2, a2=2, **settings))
    with torch.no_grad():
        for layer in krona_layers(pipe.unet).values():
            for factor in layer.parameters_of("default").values():
                factor.normal_(std=0.1)
    text = refusal(lambda: save_krona(pipe, tmp_path / "dog.safetensors", format="lokr"))
    assert "LoRA" in text
    save_krona(pipe, tmp_path / "lora.safetensors", format="lora")
    assert merge_file(tiny_sd_pipeline(), tmp_path / "lora.safetensors") == len(krona_layers(pipe.unet))
    save_krona(pipe, tmp_path / "own.safetensors")
    if "--factors" in text:
        target = Target(factors=(2, 2))
        convert(tmp_path / "own.safetensors", tmp_path / "one.safetensors", "lokr", base, target)
        load_krona(tiny_sd_pipeline(), tmp_path / "one.safetensors")
    else:
        assert "merge it" in text
        assert merge_file(tiny_sd_pipeline(), tmp_path / "own.safetensors") == len(krona_layers(pipe.unet))


def test_layers_that_are_one_elsewhere_go_there_as_a_lora(tmp_path):
    model = transformers.flux()
    inject_krona(model, KronAConfig(a1=2, a2=2, init_weights=False))
    text = refusal(lambda: save_krona(model, tmp_path / "dog.safetensors", format="kohya"))
    assert "--to lora" in text
    save_krona(model, tmp_path / "dog.safetensors", format="lora")
    assert merge_file(transformers.flux(), tmp_path / "dog.safetensors") == len(krona_layers(model))


def test_embeddings_beside_an_adapter_are_loaded_by_diffusers_from_a_file_of_their_own(tmp_path):
    pipe = tiny_sd_pipeline()
    width = pipe.text_encoder.config.hidden_size
    embeddings = {"bundle_emb.sks.string_to_param.*": random(2, width)}
    save_file(lora() | embeddings, tmp_path / "dog.safetensors")
    text = refusal(merge_file, pipe, tmp_path / "dog.safetensors")
    assert "load_textual_inversion" in text
    with pytest.warns(UserWarning, match="embeddings of new words"):
        assert merge_file(pipe, tmp_path / "dog.safetensors", on_unused="warn") == 1
    save_file({"emb_params": random(2, width)}, tmp_path / "sks.safetensors")
    pipe.load_textual_inversion(tmp_path / "sks.safetensors", token="sks")
    assert "sks_1" in pipe.tokenizer.get_vocab()


def test_a_lora_that_changed_its_base_is_converted_to_a_plain_one_by_peft_as_the_error_says(tmp_path):
    header = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 2, "init_lora_weights": "corda"})}
    save_file(lora(), tmp_path / "dog.safetensors", header)
    assert "path_initial_model_for_weight_conversion" in refusal(
        merge_file, tiny_sd_pipeline(), tmp_path / "dog.safetensors"
    )
    import inspect

    from peft import PeftModel

    assert "path_initial_model_for_weight_conversion" in inspect.signature(PeftModel.save_pretrained).parameters
