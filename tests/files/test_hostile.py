"""Files made to do harm are refused by name, with memory in proportion to them; what is large and honest is read."""

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_file, save_krona
from diffusekrona.errors import AdapterFileError, KronAError
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.krona import header_of
from diffusekrona.files.formats.scales import HEADER as PEFT_HEADER
from diffusekrona.files.inspect import inspect_file
from diffusekrona.storage import (
    LARGEST_HEADER,
    LONGEST_NAME,
    MOST_DIMENSIONS,
    MOST_TENSORS,
    read_names,
    read_safetensors,
)
from tests.modules import network
from tests.snapshots import unchanged
from tests.tensors import LargestTensor

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")


def written(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def growth(action: Callable[[], object]) -> int:
    """Bytes by which a child process grows at its peak when it does something that raises one of our errors."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            action()
            os.write(writer, b"nothing was raised")
        except KronAError:
            os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as found:
        return 1024 * int(found.read())


# Headers


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
REFUSED = {
    "a length that the file does not have": (b"", 0, "is not a complete safetensors file"),
    "a size beyond 64 bits": ({"a": entry([2**33, 2**33], 0, 8)}, 8, "overflow"),
    "a size beyond 64 bits of an empty tensor": ({"a": entry([0, 2**62, 2**62], 0, 0)}, 0, "sizes are too large"),
    "a dimension beyond 63 bits": ({"a": entry([0, 2**63], 0, 0)}, 0, "sizes are too large"),
    "a negative dimension": ({"a": entry([-1, 2], 0, 8)}, 8, "-1"),
    "a dimension that is a fraction": ({"a": entry([1.0, 2], 0, 8)}, 8, "floating point"),
    "a dimension that is true": ({"a": entry([True, 2], 0, 8)}, 8, "boolean"),
    "a dimension that is text": ({"a": entry(["2"], 0, 8)}, 8, "string"),
    "very many dimensions": ({"a": entry([1] * 100_000, 0, 4)}, 4, "'a' has 100,000 dimensions"),
    "a tensor twice": (TWICE, 8, "names 'a' twice"),
    "an entry twice": (b'{"__metadata__":{"k":"1","k":"2"}}', 0, "names 'k' twice"),
    "overlapping tensors": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "offset"),
    "a gap between tensors": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "offset"),
    "bytes after the last tensor": ({"a": entry([2], 0, 8)}, 16, "is not a complete safetensors file"),
    "a dtype that there is not": ({"a": entry([2], 0, 8, "F31")}, 8, "F31"),
    "four-bit numbers": ({"a": entry([4], 0, 2, "F4")}, 2, "holds a as F4"),
    "six-bit numbers": ({"a": entry([4], 0, 3, "F6_E2M3")}, 3, "F6_E2M3"),
    "complex numbers": ({"a": entry([1], 0, 8, "C64")}, 8, "holds a as C64"),
    "metadata that is no text": ({"__metadata__": {"k": 1}}, 0, "expected a string"),
    "metadata that is a list": ({"__metadata__": []}, 0, "expected a map"),
    "lists in lists in the metadata": (b'{"__metadata__":{"k":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 0, "string"),
    "lists in lists in an entry": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        8,
        "recursion",
    ),
    "a name of a million characters": ({"a" * 1_000_000: entry([2], 0, 8)}, 8, "has 1,000,000 characters"),
    "very many tensors": (
        {f"{i}": entry([0], 0, 0) for i in range(MOST_TENSORS + 50_000)},
        0,
        "names 150,000 tensors, and 100,000 is the most",
    ),
}


@fork
@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_header_is_refused_by_name_with_memory_in_proportion(tmp_path: Path, name: str) -> None:
    header, data, text = REFUSED[name]
    path = written(tmp_path / "x.safetensors", header, bytes(data))
    if name == "a length that the file does not have":
        path.write_bytes((100_000_000).to_bytes(8, "little") + b'{"a": 1}')
    for read in (read_safetensors, inspect_file):
        with pytest.raises(AdapterFileError) as raised:
            read(path)
        assert text in str(raised.value)
        assert len(str(raised.value)) < 1000 + len(str(path))
    assert growth(lambda: read_safetensors(path)) < 30 * path.stat().st_size + 16e6


@fork
@pytest.mark.parametrize("size", [LARGEST_HEADER + 1, 99_000_000, 200_000_000])
def test_a_header_that_is_too_large_is_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(8 + size)  # which takes no room on the disk
    with pytest.raises(AdapterFileError, match=rf"has a header of {size:,} bytes, and headers of up to 33,554,432"):
        read_names(path)
    assert growth(lambda: read_names(path)) < 16e6


def test_what_is_large_and_honest_is_read(tmp_path: Path) -> None:
    """More tensors and a larger header than any adapter of SDXL has, and the limits themselves."""
    names = [f"lora_unet_input_blocks_{i}.{part}" for i in range(5000) for part in ("lora_up.weight", "alpha")]
    tensors = {name: torch.zeros(1) for name in names} | {"a" * LONGEST_NAME: torch.zeros([1] * MOST_DIMENSIONS)}
    metadata = {"ss_tag_frequency": "x" * 5_000_000}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    found, header = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert header == metadata


@pytest.mark.parametrize("size", [0, 10**15])
def test_an_empty_tensor_may_have_a_large_shape(tmp_path: Path, size: int) -> None:
    path = written(tmp_path / "x.safetensors", {"x.diff": entry([0, size], 0, 0)})
    assert read_safetensors(path)[0]["x.diff"].shape == (0, size)
    with pytest.raises(AdapterFileError, match=r"holds diff of shape 0 × "):
        merge_file(network(), path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_narrow_and_wide_numbers_are_merged(tmp_path: Path, dtype: torch.dtype) -> None:
    factors = {
        "proj_in.lora_A.weight": torch.ones(2, 24).to(dtype),
        "proj_in.lora_B.weight": torch.ones(24, 2).to(dtype),
    }
    save_file(factors, tmp_path / "x.safetensors")
    model = network()
    before = model.proj_in.weight.detach().clone()
    assert merge_file(model, tmp_path / "x.safetensors") == 1
    assert torch.equal(model.proj_in.weight, before + 2)
    assert inspect_file(tmp_path / "x.safetensors").layers[0].rank == 1


# Configs in headers


DEEP = "transformer_blocks_of_many.and_more_of_them_within.proj_in"


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """What is raised, or said about what cannot be used."""
    try:
        return " ".join(read(path).unused)
    except AdapterFileError as error:
        return str(error)


def krona_file(path: Path, layer: str = "proj_in", **fields: Any) -> Path:
    """An adapter of one layer of the network, its config changed after it was made."""
    config = KronAConfig(a1=2, a2=8, target_modules=[layer]).to_dict() | fields
    header = {"krona": json.dumps({"version": 1, "components": {"": config}})}
    path.write_bytes(save({f"{layer}.krona_A": torch.ones(2, 8), f"{layer}.krona_B": torch.ones(12, 3)}, header))
    return path


def lora_file(path: Path, layer: str = "proj_in", **fields: Any) -> Path:
    config = {"r": 1, "lora_alpha": 1, "peft_type": "LORA", **fields}
    factors = {f"{layer}.lora_A.weight": torch.ones(1, 24), f"{layer}.lora_B.weight": torch.ones(24, 1)}
    path.write_bytes(save(factors, {PEFT_HEADER: json.dumps(config)}))
    return path


def deep() -> nn.Module:
    """A model whose layers have long names, as those of large ones have."""
    first, second, _ = DEEP.split(".")
    return nn.ModuleDict({first: nn.ModuleDict({second: network()})})


BOMBS = [
    "(.+)+,",
    r"(\w+\.?)*,",
    r"((\w|\.)+;?)+,",
    ".*" * 30 + ",",
    r"(?:){4000000000},",
    r"(\w?[\w.])*,",
]


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "factor_pattern", "alpha_pattern", "terms_pattern"]
)
def test_an_expression_that_would_take_for_ever_is_refused(tmp_path: Path, field: str, pattern: str) -> None:
    values: dict[str, Any] = {"factor_pattern": [[pattern, [2, 8]]], "alpha_pattern": [[pattern, 2.0]]}
    values["terms_pattern"] = [[pattern, 1]]
    path = krona_file(tmp_path / "x.safetensors", DEEP, **{field: values.get(field, pattern)})
    model = deep()
    for read in (load_krona, merge_file):
        with (
            unchanged(model),
            pytest.raises(AdapterFileError, match=r"x\.safetensors .*could take all too long to match"),
        ):
            read(model, path)


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_an_expression_of_pefts_that_would_take_for_ever_is_refused(tmp_path: Path, field: str, pattern: str) -> None:
    path = lora_file(tmp_path / "x.safetensors", DEEP, **{field: {pattern: 2}})
    with pytest.raises(AdapterFileError, match=r"x\.safetensors .*could take all too long to match"):
        inspect_file(path)


def test_an_expression_that_would_take_for_ever_on_the_names_in_the_file_is_refused_without_a_model(
    tmp_path: Path,
) -> None:
    path = krona_file(tmp_path / "x.safetensors", "a" * 60 + "b", alpha_pattern=[["(a+)+", 2.0]])
    with pytest.raises(AdapterFileError, match=r"x\.safetensors .*could take all too long to match"):
        inspect_file(path)


@pytest.mark.parametrize("pattern", [r"(\w+\.)*to_q", r".*(attn|blocks).*to_(q|k)", r"(?!.*proj).*to_q", r"(?i).*TO_Q"])
def test_what_could_be_trained_can_be_loaded(tmp_path: Path, pattern: str) -> None:
    model = network()
    inject_krona(model, KronAConfig(a1=2, a2=8, target_modules=pattern, alpha_pattern={r"(\w+\.)*1\.to_q": 2.0}))
    save_krona(model, tmp_path / "x.safetensors")
    load_krona(network(), tmp_path / "x.safetensors")


def test_a_config_with_a_million_components_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    components = ",".join(f'"{number}":0' for number in range(1_000_000))
    header = f'{{"version": 1, "components": {{{components}}}}}'
    path.write_bytes(save({"0.x.krona_A": torch.ones(2, 2)}, {"krona": header}))
    with pytest.raises(AdapterFileError, match="for 1,000,000 components, and 100 is the most"):
        inspect_file(path)
    fields = ",".join(f'"{number}.r":1' for number in range(200_000))
    factors = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
    path.write_bytes(save(factors, {PEFT_HEADER: f"{{{fields}}}"}))
    with pytest.raises(AdapterFileError, match="for 200,000 components in its header, and 100 is the most"):
        inspect_file(path)


@pytest.mark.parametrize("make", [krona_file, lora_file])
def test_a_config_with_very_many_patterns_is_refused(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = make(tmp_path / "x.safetensors", alpha_pattern={f"x{number:09}": 1 for number in range(100_001)})
    with pytest.raises(AdapterFileError, match="alpha_pattern has 1,000,010 characters of patterns"):
        inspect_file(path)


def test_a_config_with_a_million_names_is_refused(tmp_path: Path) -> None:
    path = krona_file(tmp_path / "x.safetensors", target_modules=[f"x{number}" for number in range(1_000_000)])
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(100)))
    with pytest.raises(AdapterFileError, match="names 1,000,000 layers, more than a model could have"):
        load_krona(model, path)


# Small factors of large updates

SIDE = 1 << 17


def thin(path: Path, **parts: tuple[int, ...]) -> Path:
    save_file({f"proj_in.{part}": torch.ones(size) for part, size in parts.items()}, path)
    return path


WIDE = {
    "lora": {"lora_up.weight": (SIDE, 1), "lora_down.weight": (1, SIDE)},
    "loha": {f"hada_w{i}_{part}": size for i in (1, 2) for part, size in (("a", (SIDE, 1)), ("b", (1, SIDE)))},
    "lokr": {"lokr_w1": (SIDE, 1), "lokr_w2": (1, SIDE)},
    "lokr w2": {"lokr_w1": (1, 1), "lokr_w2_a": (SIDE, 1), "lokr_w2_b": (1, SIDE)},
    "lokr w1": {"lokr_w1_a": (SIDE, 1), "lokr_w1_b": (1, SIDE), "lokr_w2": (1, 1)},
    "lokr core": {"lokr_w1": (1, 1), "lokr_w2_a": (1, SIDE), "lokr_w2_b": (1, SIDE), "lokr_t2": (1, 1, 1, 1)},
    "lora core": {
        "lora_up.weight": (SIDE, 1, 1, 1),
        "lora_mid.weight": (1, 1, 1, 1),
        "lora_down.weight": (1, SIDE, 1, 1),
    },
}


@pytest.mark.parametrize("name", WIDE)
def test_factors_of_an_update_larger_than_any_weight_are_refused(tmp_path: Path, name: str) -> None:
    path = thin(tmp_path / "x.safetensors", **WIDE[name])
    for read in (inspect_file, lambda source: merge_file(network(), source)):
        with LargestTensor() as made:
            assert "the file is damaged, or made to do harm" in refusal(read, path)
        assert made.elements <= 4 * SIDE  # bytes of a factor


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "lora core"])
def test_an_update_of_another_size_is_not_built(tmp_path: Path, name: str) -> None:
    side = SIDE // 16
    sizes = {part: tuple(side if n == SIDE else n for n in size) for part, size in WIDE[name].items()}
    path, model = thin(tmp_path / "x.safetensors", **sizes), network()
    with (
        LargestTensor() as made,
        unchanged(model),
        pytest.raises(AdapterFileError, match="the file is for another model"),
    ):
        merge_file(model, path)
    assert made.elements <= 4 * side


@pytest.mark.parametrize("name", ["lora", "loha", "lokr"])
def test_inspecting_builds_no_update(tmp_path: Path, name: str) -> None:
    side = SIDE // 16
    sizes = {part: tuple(side if n == SIDE else n for n in size) for part, size in WIDE[name].items()}
    with LargestTensor() as made:
        (layer,) = inspect_file(thin(tmp_path / "x.safetensors", **sizes)).layers
    assert made.elements <= 4 * side
    assert (layer.size, layer.rank, layer.norm) == ((side, side), 1, pytest.approx(side))


@pytest.mark.parametrize("terms", [1, 5, 400])
def test_inspecting_very_many_terms_takes_no_more_than_the_file(tmp_path: Path, terms: int) -> None:
    factors = torch.randn(terms, 2, 3), torch.randn(terms, 3, 2)
    config = KronAConfig(a1=2, a2=3, num_terms=terms)
    tensors = {f"x.krona_{key}": f if terms > 1 else f[0] for key, f in zip("AB", factors, strict=True)}
    save_file(tensors, tmp_path / "x.safetensors", header_of({"": config}))
    with LargestTensor() as made:
        (layer,) = inspect_file(tmp_path / "x.safetensors").layers
    dense = sum(torch.kron(a, b) for a, b in zip(*factors, strict=True))
    assert isinstance(dense, Tensor)
    assert layer.norm == pytest.approx(float(dense.double().norm()), rel=1e-5)
    assert made.elements <= max(36, 24 * terms)


MISFITS = {
    "a vector": {"krona_A": (2,), "krona_B": (12, 3)},
    "five dimensions": {"krona_A": (2, 8, 1, 1, 1), "krona_B": (12, 3, 1, 1, 1)},
    "terms of one factor": {"krona_A": (2, 8), "krona_B": (3, 12, 3)},
    "other terms": {"krona_A": (2, 2, 8), "krona_B": (3, 12, 3)},
    "nothing": {"krona_A": (0, 8), "krona_B": (12, 3)},
    "another rank": {"krona_A": (2, 8), "krona_B1": (12, 2), "krona_B2": (1, 3)},
    "one number": {"krona_A": (2, 8), "krona_B": ()},
}


@pytest.mark.parametrize("name", MISFITS)
def test_factors_of_ours_that_do_not_fit_each_other_are_named(tmp_path: Path, name: str) -> None:
    tensors = {f"x.{part}": torch.ones(size) for part, size in MISFITS[name].items()}
    save_file(tensors, tmp_path / "x.safetensors", header_of({"": KronAConfig()}))
    with pytest.raises(AdapterFileError, match=r"the layer x has A of .*, which do not fit each other"):
        inspect_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["krona", "lokr", "full"])
def test_numbers_out_of_range_are_named(tmp_path: Path, kind: str) -> None:
    huge = torch.full((2, 2), 3e38)
    tensors, header = {
        "krona": ({"x.krona_A": huge / 0, "x.krona_B": huge}, header_of({"": KronAConfig()})),
        "lokr": ({"x.lokr_w1": huge, "x.lokr_w2_a": huge.clone(), "x.lokr_w2_b": huge.clone()}, None),
        "full": ({"x.diff": -huge / 0}, None),
    }[kind]
    save_file(tensors, tmp_path / "x.safetensors", header)
    assert re.search(r"the layer x .*an infinity or a NaN", refusal(inspect_file, tmp_path / "x.safetensors"))


def test_a_scale_beyond_64_bits_and_norms_beyond_float64_are_numbers(tmp_path: Path) -> None:
    found = inspect_file(krona_file(tmp_path / "x.safetensors", alpha=10**200))
    assert found.norm == pytest.approx(10**200 * (16 * 36) ** 0.5)
    with pytest.raises(KronAError, match="would hold an infinity"):
        merge_file(network(), tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.uint64, torch.int64, torch.bool, torch.float16])
def test_a_switch_of_any_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    switch = torch.full((1,), 2**63 if dtype == torch.uint64 else 1, dtype=dtype)
    save_file({"proj_in.weight": torch.ones(24), "proj_in.on_input": switch}, tmp_path / "x.safetensors")
    assert inspect_file(tmp_path / "x.safetensors").layers[0].kind == "ia3"


def peft_file(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.write_bytes(
        save({f"base_model.model.{DEEP}.{key}": t for key, t in tensors.items()}, {PEFT_HEADER: json.dumps(config)})
    )
    return path


@pytest.mark.parametrize("modules", [None, "(", "(.+)+,", [1], 3])
def test_names_of_pefts_that_are_no_names_are_refused(tmp_path: Path, modules: Any) -> None:
    path = peft_file(
        tmp_path / "x.safetensors", {"ia3_l": torch.ones(24, 1)}, peft_type="IA3", feedforward_modules=modules
    )
    with pytest.raises(AdapterFileError, match="has a config that PEFT does not take"):
        merge_file(deep(), path)


def test_a_series_of_very_many_terms_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "OFT", "peft_version": "0.21.0", "oft_block_size": 4, "r": 0}
    path = peft_file(
        tmp_path / "x.safetensors", {"oft_R.weight": torch.ones(6, 6)}, num_cayley_neumann_terms=10**15, **config
    )
    with pytest.raises(AdapterFileError, match="1000000000000000 terms of a series"):
        merge_file(deep(), path)


def test_a_rank_that_is_no_dimension_is_named(tmp_path: Path) -> None:
    parts = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(2, 2), "lokr_w2_b": torch.tensor(1.0)}
    save_file({f"x.{part}": tensor for part, tensor in parts.items()}, tmp_path / "x.safetensors")
    assert "holds w2_b of shape a single number" in refusal(inspect_file, tmp_path / "x.safetensors")
    parts = {
        "lora_A.weight": torch.ones(1, 4),
        "lora_B.weight": torch.ones(4, 1),
        "lora_magnitude_vector": torch.tensor(1.0),
    }
    save_file({f"x.{part}": tensor for part, tensor in parts.items()}, tmp_path / "x.safetensors")
    assert "holds magnitude of a single number" in refusal(inspect_file, tmp_path / "x.safetensors")


def test_products_that_are_too_large_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"lokr_w1_a": torch.ones(100, 1), "lokr_w1_b": torch.ones(1, 100), "lokr_w2": torch.ones(1, 1)}
    save_file({f"{i}.{part}": t.clone() for i in range(3) for part, t in parts.items()}, tmp_path / "x.safetensors")
    monkeypatch.setattr(foreign, "LARGEST_FACTORS", 3 * 10_000)
    assert len(inspect_file(tmp_path / "x.safetensors").layers) == 3
    monkeypatch.setattr(foreign, "LARGEST_FACTORS", 3 * 10_000 - 1)
    with pytest.raises(AdapterFileError, match="take more than 29,999 numbers together"):
        inspect_file(tmp_path / "x.safetensors")


LONG = 8192


@fork
@pytest.mark.parametrize("act", [load_krona, merge_file], ids=["load_krona", "merge_file"])
def test_large_products_of_small_parts_are_refused_before_they_are_built(tmp_path: Path, act: Any) -> None:
    """Second factors of two ranks, which no config holds as products, and which take 256 MB each as wholes."""
    model = nn.ModuleList(nn.Linear(24, 16) for _ in range(4))
    path = large_products(tmp_path / "x.safetensors", ranks=[1, 2, 1, 2])
    fitting = large_products(tmp_path / "fits.safetensors", ranks=[1])
    act(nn.ModuleList([nn.Linear(LONG, LONG)]), fitting)  # imports what is needed
    assert growth(lambda: act(model, path)) < LONG * LONG


def large_products(path: Path, ranks: list[int]) -> Path:
    tensors = {}
    for i, rank in enumerate(ranks):
        tensors |= {f"{i}.lokr_w1": torch.ones(1, 1), f"{i}.lokr_w2_a": torch.ones(LONG, rank)}
        tensors[f"{i}.lokr_w2_b"] = torch.ones(rank, LONG)
    save_file(tensors, path)
    return path


def test_looking_at_a_file_builds_no_product(tmp_path: Path) -> None:
    path = large_products(tmp_path / "x.safetensors", ranks=[2])
    with LargestTensor() as largest:
        found = inspect_file(path)
    assert largest.elements < LONG * LONG // 100
    assert found.norm == pytest.approx(2 * LONG)
    assert found.layers[0].rank == 1


def test_a_product_without_rank_beside_whole_factors_is_named(tmp_path: Path) -> None:
    """The fuzzer's: the rank of all products, by which the alpha of whole factors is looked at, was 0."""
    tensors = {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2": torch.ones(2, 2), "x.alpha": torch.tensor(1.0)}
    tensors |= {"y.lokr_w1": torch.ones(2, 2), "y.lokr_w2_a": torch.ones(2, 0), "y.lokr_w2_b": torch.ones(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors")
    assert [layer.name for layer in found.layers] == ["x"]
    assert "the layer y holds w2_a of shape 2 × 0" in found.unused[0]
