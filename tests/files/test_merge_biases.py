"""Files that change biases and norms, merged into a pipeline, against LyCORIS' own merge of the same training."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.kohya import create_network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusekrona import merge_file
from diffusekrona.errors import AdapterFileError
from tests.modules import WIDTH, network
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import unchanged

PARTS = ("unet", "text_encoder")
PRESETS = ("unet-transformer-only", "attn-mlp", "attn-only")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def trained(path: Path, preset: str, algo: str, **settings: Any) -> Any:
    """Save a network of LyCORIS with random factors; the pipeline that it merged itself into."""
    pipe = tiny_sd_pipeline()
    encoder, unet = pipe.text_encoder, pipe.unet
    made = create_network(1.0, 4, 1, None, encoder, unet, algo=algo, preset=preset, **settings)
    made.apply_to(encoder, unet, True, True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in made.loras:
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    made.save_weights(str(path), torch.float32, {})
    merged = tiny_sd_pipeline()
    again = create_network(1.0, 4, 1, None, merged.text_encoder, merged.unet, algo=algo, preset=preset, **settings)
    saved = load_file(path)
    parts = {"diff": "weight", "diff_b": "bias"}
    for module in again.loras:  # by hand, since LyCORIS loads only into a network that is applied
        prefix = f"{module.lora_name}."
        for key in (key for key in saved if key.startswith(prefix) and not key.endswith(".alpha")):
            part = key.removeprefix(prefix)
            module.get_parameter(parts.get(part, part)).data.copy_(saved[key])
        module.merge_to(1.0)
    return merged


def assert_same(found: Any, expected: Any) -> None:
    for part in PARTS:
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def changed(pipe: Any) -> set[str]:
    """Endings of the parameters that are not those of a fresh pipeline."""
    fresh = tiny_sd_pipeline()
    return {
        name.rpartition(".")[2]
        for part in PARTS
        for name, tensor in getattr(pipe, part).state_dict().items()
        if not torch.equal(tensor, getattr(fresh, part).state_dict()[name])
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_whole_updates_of_lycoris_presets(preset: str, tmp_path: Path) -> None:
    expected, pipe = trained(tmp_path / "a.safetensors", preset, "full"), tiny_sd_pipeline()
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "a.safetensors")} >= {"diff", "diff_b"}
    merge_file(pipe, tmp_path / "a.safetensors")
    assert changed(pipe) == {"weight", "bias"}
    assert_same(pipe, expected)


@pytest.mark.parametrize("algo", ["lokr", "locon"])
def test_norms_that_were_trained_beside_factors(algo: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    settings = {"factor": 4, "full_matrix": True, "train_norm": True}
    expected, pipe = trained(path, "unet-transformer-only", algo, **settings), tiny_sd_pipeline()
    norms = [key for key in load_file(path) if key.endswith("_norm")]
    assert {key.rpartition(".")[2] for key in norms} == {"w_norm", "b_norm"}
    merge_file(pipe, path)
    assert_same(pipe, expected)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_weight_and_a_bias_or_either_of_them(tmp_path: Path) -> None:
    diffs = {"to_q.diff": random(WIDTH, WIDTH), "to_q.diff_b": random(WIDTH), "to_out.0.diff_b": random(WIDTH).half()}
    save_file({f"blocks.0.{key}": tensor for key, tensor in diffs.items()}, tmp_path / "a.safetensors")
    model, base = network(), network()
    assert merge_file(model, tmp_path / "a.safetensors", 0.5) == 2
    expected = base.state_dict()
    for key, tensor in diffs.items():
        expected[f"blocks.0.{key}".replace("diff_b", "bias").replace("diff", "weight")] += 0.5 * tensor.float()
    torch.testing.assert_close(model.state_dict(), expected)


@pytest.mark.parametrize(
    ("key", "size", "text"),
    [
        ("blocks.0.to_k.diff_b", WIDTH, r"blocks\.0\.to_k is a Linear without a bias that an update could go into"),
        ("blocks.0.to_q.diff_b", 5, r"the layer blocks\.0\.to_q was made for a bias of 5, but the one here has 24"),
        ("norm.w_norm", 5, r"the layer norm was made for a weight of 5, but the one here is 24"),
        ("norm.b_norm", 5, r"the layer norm was made for a bias of 5, but the one here has 24"),
    ],
)
def test_a_bias_that_has_no_place_is_refused_by_name(key: str, size: int, text: str, tmp_path: Path) -> None:
    good = {"blocks.1.to_q.diff": random(WIDTH, WIDTH), "blocks.1.to_q.diff_b": random(WIDTH)}
    save_file({**good, key: torch.ones(size)}, tmp_path / "a.safetensors")
    model: nn.Module = network()
    with unchanged(model), pytest.raises(AdapterFileError, match=text):
        merge_file(model, tmp_path / "a.safetensors")
