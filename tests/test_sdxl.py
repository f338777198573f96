"""The helpers on the full-size UNet of Stable Diffusion XL: 2.57 billion weights in bf16, random ones."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusekrona import (
    KronAConfig,
    inject_krona,
    load_krona,
    merge_krona,
    save_krona,
    unload_krona,
    unmerge_krona,
)
from diffusekrona.bases.architectures import build
from diffusekrona.tuner.injected import krona_layers

PARAMETERS = 3_874_560
NEEDED = 9 << 30


def available_memory() -> int:
    """Bytes that can be had without swapping; where the system does not say, enough."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return NEEDED
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kibibytes) << 10


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """Its weights repeat a small random pool, each from another place on; 5 GB of random ones take long."""
    if available_memory() < NEEDED:
        pytest.skip("needs 9 GiB of free memory")
    model = build("sdxl", dtype=torch.bfloat16).to_empty(device="cpu").eval()
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            for chunk in parameter.view(-1).split(pool.numel() - number):
                chunk.copy_(pool[number : number + chunk.numel()])
    return model


@pytest.fixture
def unet(base: nn.Module) -> Iterator[nn.Module]:
    yield base
    unload_krona(base)


def config() -> KronAConfig:
    """The paper's factors, A of 4 × 64, both of them random."""
    return KronAConfig(init_b="normal")


def checksums(model: nn.Module) -> dict[str, int]:
    """One for each weight that an adapter goes on, under its name without adapters."""
    return {
        name.replace(".base_layer", ""): zlib.crc32(module.weight.detach().view(torch.uint8).numpy())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (".attn1." in name or ".attn2." in name)
    }


@pytest.mark.slow
def test_an_adapter_is_injected_saved_loaded_and_unloaded(unet: nn.Module, tmp_path: Path) -> None:
    before = list(unet.state_dict())
    adapter = inject_krona(unet, config())
    assert len(krona_layers(unet)) == 560
    assert sum(parameter.numel() for parameter in adapter.parameters()) == PARAMETERS
    path = save_krona(unet, tmp_path / "dog.safetensors")
    header = path.stat().st_size - 4 * PARAMETERS
    assert 0 < header < 200_000
    unload_krona(unet)
    assert list(unet.state_dict()) == before
    loaded = load_krona(unet, path)
    saved = load_file(path)
    assert {name for name, _ in loaded.named_parameters()} == saved.keys()
    assert all(torch.equal(parameter, saved[name]) for name, parameter in loaded.named_parameters())
    unload_krona(unet)
    assert list(unet.state_dict()) == before


@pytest.mark.slow
def test_an_adapter_is_merged_and_unmerged_bit_for_bit(unet: nn.Module) -> None:
    before = checksums(unet)
    assert len(before) == 560
    inject_krona(unet, config())
    merge_krona(unet)
    merged = checksums(unet)
    assert all(merged[name] != before[name] for name in before)
    unmerge_krona(unet)
    assert checksums(unet) == before
    merge_krona(unet)
    assert checksums(unet) == merged
    unload_krona(unet)
    assert checksums(unet) == before
    assert not krona_layers(unet)
