"""The paper's parameter counts, recomputed from the layers of the models that it counts them on."""

from collections import Counter

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from diffusekrona import KronAConfig, inject_krona, krona_report
from diffusekrona.bases import architectures
from diffusekrona.errors import KronAError
from diffusekrona.kron.shapes import krona_parameters, loha_parameters, lokr_parameters, lora_parameters
from diffusekrona.tuner.targets import target_layers

Sizes = Counter[tuple[int, int]]
"""(d, h) → how many layers have that size."""

MILLION = 1_000_000

# Table 6 as printed: for each a1, the counts for these a2. The rows with a1 = 1 are apart, as they are wrong.
TABLE_6_A2 = (2, 4, 8, 16, 32, 64, 128)
TABLE_6 = {
    2: (238799040, 119402880, 59708160, 29867520, 14960640, 7534080, 3874560),
    4: (119402880, 59708160, 29867520, 14960640, 7534080, 3874560, 2152320),
    8: (59708160, 29867520, 14960640, 7534080, 3874560, 2152320, 1506240),
    16: (29867520, 14960640, 7534080, 3874560, 2152320, 1506240, 1613280),
    32: (14960640, 7534080, 3874560, 2152320, 1506240, 1613280, 2526960),
    64: (7534080, 3874560, 2152320, 1506240, 1613280, 2526960, 4704120),
    128: (3874560, 2152320, 1506240, 1613280, 2526960, 4704120, 9233340),
}
TABLE_6_FIRST = (119399520, 59701440, 29854080, 14933760, 7480320, 3767040, 1937280)


def linear_sizes(model: nn.Module, names: str) -> Sizes:
    """Sizes of the linear layers whose names match a regular expression."""
    layers = target_layers(model, KronAConfig(target_modules=names)).values()
    return Counter((layer.out_features, layer.in_features) for layer in layers)


def attention_sizes(model: nn.Module) -> Sizes:
    layers = target_layers(model, KronAConfig()).values()
    return Counter((layer.out_features, layer.in_features) for layer in layers)


def total(sizes: Sizes, count, *args) -> int:
    """Parameters of an adapter in all layers."""
    return sum(number * count(d, h, *args) for (d, h), number in sizes.items())


def is_printed_as(count: int, printed: str) -> bool:
    """Whether a count is the printed number of millions. The paper sometimes rounds and sometimes cuts."""
    unit = 10.0 ** -len(printed.partition(".")[2])
    return abs(count / MILLION - float(printed)) < unit


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: architectures.build(name) for name in architectures.ARCHITECTURES}


@pytest.fixture(scope="module")
def sdxl(models) -> Sizes:
    return attention_sizes(models["sdxl"])


@pytest.fixture(scope="module")
def sd15(models) -> Sizes:
    """The UNet's and the text encoder's layers: the paper's Stable Diffusion rows train both."""
    return attention_sizes(models["sd15"]) + attention_sizes(models["sd15-text-encoder"])


@pytest.fixture(scope="module")
def sdxl_with_feed_forward(models, sdxl) -> Sizes:
    """The attention projections and both layers of each feed-forward, as Table 7 counts LoKr and LoHa."""
    return sdxl + linear_sizes(models["sdxl"], r".*\.ff\.net\.(0\.proj|2)")


def test_on_the_meta_device_no_model_takes_memory(models):
    for model in models.values():
        assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_the_sdxl_unet_has_560_attention_projections_of_four_sizes(sdxl):
    assert sdxl == {(1280, 1280): 360, (1280, 2048): 120, (640, 640): 60, (640, 2048): 20}
    assert sdxl.total() == 560
    assert sum(number * d * h for (d, h), number in sdxl.items()) == 955_187_200


def test_stable_diffusion_has_128_projections_in_the_unet_and_48_in_the_text_encoder(models):
    assert attention_sizes(models["sd15"]).total() == 128
    assert attention_sizes(models["sd15-text-encoder"]) == {(768, 768): 48}


def test_dreambooth_trains_all_weights_of_unet_and_text_encoder(models):
    """Table 4: 982.5 M."""
    counts = [sum(p.numel() for p in models[name].parameters()) for name in ("sd15", "sd15-text-encoder")]
    assert counts == [859_520_964, 123_060_480]
    assert is_printed_as(sum(counts), "982.5")


@pytest.mark.parametrize("a1", TABLE_6)
def test_table_6_is_exact_in_every_row_with_a1_of_at_least_two(sdxl, a1):
    assert tuple(total(sdxl, krona_parameters, a1, a2) for a2 in TABLE_6_A2) == TABLE_6[a1]


def test_table_6_prints_a_quarter_of_b_in_its_rows_with_a1_of_one(sdxl):
    for a2, printed in zip(TABLE_6_A2, TABLE_6_FIRST, strict=True):
        ours = total(sdxl, krona_parameters, 1, a2)
        assert ours == sum(number * (a2 + d * h // a2) for (d, h), number in sdxl.items())
        assert printed == sum(number * (a2 + d * h // a2 // 4) for (d, h), number in sdxl.items())
    assert total(sdxl, krona_parameters, 1, 2) == 477_594_720


def test_table_2_counts_are_those_of_the_models(sdxl, sd15):
    assert is_printed_as(total(sdxl, krona_parameters, 4, 64), "3.8")
    assert is_printed_as(total(sdxl, lora_parameters, 4), "5.8")
    assert is_printed_as(total(sd15, krona_parameters, 4, 64), "0.52")
    assert is_printed_as(total(sd15, lora_parameters, 4), "1.09")


def test_table_4_counts_are_those_of_the_models(sd15):
    assert is_printed_as(total(sd15, krona_parameters, 8, 64), "0.32")
    assert is_printed_as(total(sd15, lora_parameters, 4), "1.09")


def test_table_7_counts_of_krona_are_those_of_table_6_with_two_rows_swapped(sdxl):
    printed = {2: "3.8", 4: "7.5", 8: "2.1", 16: "1.5"}
    computed = {a1: total(sdxl, krona_parameters, a1, 64) for a1 in printed}
    assert is_printed_as(computed[2], printed[4])
    assert is_printed_as(computed[4], printed[2])
    assert is_printed_as(computed[8], printed[8])
    assert is_printed_as(computed[16], printed[16])


def test_table_7_counts_lokr_and_loha_with_the_feed_forward_layers_and_the_others_without(sdxl, sdxl_with_feed_forward):
    assert is_printed_as(total(sdxl, lora_parameters, 4), "5.8")
    assert is_printed_as(total(sdxl_with_feed_forward, lokr_parameters, 8, -1), "1.36")
    assert is_printed_as(total(sdxl_with_feed_forward, loha_parameters, 4), "20.9")
    assert total(sdxl_with_feed_forward, lokr_parameters, 8, -1) == 1_356_800
    assert total(sdxl, lokr_parameters, 8, -1) == 904_640
    assert total(sdxl, loha_parameters, 4) == 11_612_160
    assert is_printed_as(total(sdxl, lokr_parameters, None, 8), "14.9")


@pytest.mark.parametrize(("factor", "printed"), [(2, "238.7"), (4, "59.7"), (8, "14.9"), (16, "3.8")])
def test_table_8_counts_of_lokr_are_those_of_krona_with_equal_factors(sdxl, factor, printed):
    assert is_printed_as(total(sdxl, lokr_parameters, None, factor), printed)
    assert total(sdxl, lokr_parameters, None, factor) == total(sdxl, krona_parameters, factor, factor)


def test_table_8_counts_krona_with_8_and_64(sdxl):
    assert is_printed_as(total(sdxl, krona_parameters, 8, 64), "2.1")


PEERS = {
    "lora": (LoraConfig(r=4, target_modules=["0"]), lora_parameters, (4,)),
    "lokr": (LoKrConfig(r=8, target_modules=["0"]), lokr_parameters, (8, -1)),
    "lokr-8": (LoKrConfig(r=10_000, decompose_factor=8, target_modules=["0"]), lokr_parameters, (None, 8)),
    "loha": (LoHaConfig(r=4, target_modules=["0"]), loha_parameters, (4,)),
}


@pytest.mark.parametrize("peer", PEERS)
def test_counts_of_the_peers_are_those_that_peft_trains_in_layers_of_these_sizes(sdxl, sd15, peer):
    config, count, args = PEERS[peer]
    for d, h in sdxl | sd15:
        assert count(d, h, *args) == trainable(config, d, h)


def trainable(config: PeftConfig, d: int, h: int) -> int:
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(h, d, device="meta")))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("a1", "a2"), [(4, 64), (8, 64)])
def test_injecting_into_the_models_on_meta_trains_the_counted_parameters(sdxl, sd15, a1, a2):
    config = KronAConfig(a1=a1, a2=a2)
    unet = architectures.build("sdxl")
    inject_krona(unet, config)
    report = krona_report(unet)
    assert report.parameters == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert report.parameters == TABLE_6[a1][TABLE_6_A2.index(a2)]
    assert report.lora_parameters == total(sdxl, lora_parameters, 4)
    assert len(report.layers) == sdxl.total()

    parts = [architectures.build(name) for name in ("sd15", "sd15-text-encoder")]
    for part in parts:
        inject_krona(part, config)
    assert sum(krona_report(part).parameters for part in parts) == total(sd15, krona_parameters, a1, a2)


def test_a_model_is_built_in_the_wanted_dtype_and_place_and_leaves_the_default_dtype_alone():
    before = torch.get_default_dtype()
    encoder = architectures.build("sd15-text-encoder", dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == before


def test_a_failed_build_leaves_the_default_dtype_alone(monkeypatch):
    def fail() -> nn.Module:
        raise RuntimeError("no memory")

    monkeypatch.setitem(architectures.ARCHITECTURES, "broken", fail)
    before = torch.get_default_dtype()
    with pytest.raises(RuntimeError, match="no memory"):
        architectures.build("broken", dtype=torch.float16)
    assert torch.get_default_dtype() == before


def test_off_the_meta_device_the_weights_hold_values(monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", lambda: nn.Linear(4, 4))
    assert not architectures.build("small", device="cpu").weight.is_meta


def test_an_unknown_architecture_is_refused_with_the_known_names():
    with pytest.raises(KronAError, match=r"'sdxxl'; there are: .*sdxl, sd15, sd15-text-encoder"):
        architectures.build("sdxxl")
