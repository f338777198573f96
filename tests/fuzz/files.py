"""Small valid files of every kind, and how to change them so that they often stay readable."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from diffusekrona import KronAConfig
from diffusekrona.files.formats.krona import header_of
from diffusekrona.files.formats.scales import HEADER as PEFT_HEADER
from tests.modules import WIDTH, Attention, network

LARGEST = 1 << 16
"""Bytes of a mutated file."""

_NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    1 << 14,
    1 << 20,
    10**6,
    10**15,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
]
_VALUES: list[Any] = [*_NUMBERS, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, None, "", "1", "x", [], {}, [[]]]
_PATTERNS = [
    ".*",
    "(a+)+$",
    "(.+)+x",
    "(",
    "to_q",
    r"blocks\.\d+\.to_(q|k)",
    "(?i)TO_Q",
    "(?P<idx>a)",
    "a{99999999999}",
]
_DTYPES = [
    "BOOL", "F4", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64",
    "F64", "I64", "U64", "F6_E2M3", "X",
]  # fmt: skip
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "U64": 8, "C64": 8}


class Model(nn.Module):
    """The small network, an attention that has the name of one, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        inner = network()
        self.proj_in, self.blocks, self.proj_out = inner.proj_in, inner.blocks, inner.proj_out
        self.attn, self.conv = Attention(), nn.Conv2d(8, 12, 3)


def krona() -> Iterator[bytes]:
    for config in (
        KronAConfig(a1=2, a2=8, target_modules=["0.to_q", "1.to_q"], alpha_pattern={r"blocks\.0.*": 2.0}),
        KronAConfig(a1=2, a2=8, target_modules=r".*\d\.to_q", num_terms=3, layout="transposed"),
        KronAConfig(a1=2, a2=4, target_modules=["0.to_q", "1.to_q"], b_rank=1, factor_pattern={"1.to_q": (4, 8)}),
    ):
        tensors = {}
        for layer in ("blocks.0.to_q", "blocks.1.to_q"):
            a1, a2 = (4, 8) if config.b_rank and "1" in layer else (config.a1, config.a2)
            b1, b2 = WIDTH // a1, WIDTH // a2
            terms = (config.num_terms,) if config.num_terms > 1 else ()
            tensors[f"{layer}.krona_A"] = torch.randn(*terms, a1, a2)
            if config.b_rank:
                tensors |= {f"{layer}.krona_B1": torch.randn(b1, 1), f"{layer}.krona_B2": torch.randn(1, b2)}
            else:
                tensors[f"{layer}.krona_B"] = torch.randn(*terms, b1, b2)
        yield save(tensors, header_of({"": config}))
        yield save({f"unet.{name}": tensor for name, tensor in tensors.items()}, header_of({"unet": config}))
        yield save(
            {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
            {PEFT_HEADER: json.dumps(config.to_dict())},
        )


def lokr() -> Iterator[bytes]:
    yield save(_named("lokr_w1=4x8 lokr_w2=6x3", "lokr_w1_a=2x1 lokr_w1_b=1x3 lokr_w2_a=12x2 lokr_w2_b=2x8"))
    yield save(_named("lokr_w1=2x2 lokr_w2_a=6x1 lokr_w2_b=1x4x3x3", layer="conv"), {"ss_network_dim": "1"})
    yield save(_named("lokr_w1=2x2 lokr_w2_a=2x6 lokr_w2_b=2x4 lokr_t2=2x2x3x3", layer="conv"))


def lora() -> Iterator[bytes]:
    yield save(_named("lora_up.weight=24x2 lora_down.weight=2x24", "lora_A.weight=1x24 lora_B.weight=24x1"))
    yield save(_named("lora_up.weight=12x2x1x1 lora_mid.weight=2x2x3x3 lora_down.weight=2x8x1x1", layer="conv"))
    yield save(_named("lora_A.weight=2x24 lora_B.weight=24x2 lora_magnitude_vector=24"), _peft())


def loha() -> Iterator[bytes]:
    yield save(_named("hada_w1_a=24x2 hada_w1_b=2x24 hada_w2_a=24x3 hada_w2_b=3x24 dora_scale=24x1"))
    cores = "hada_t1=2x2x3x3 hada_w1_a=2x12 hada_w1_b=2x8 hada_t2=2x2x3x3 hada_w2_a=2x12 hada_w2_b=2x8"
    yield save(_named(cores, layer="conv"))


def full() -> Iterator[bytes]:
    yield save(_named("diff=24x24 diff_b=24", "diff=24x24"))
    yield save(_named("diff=12x8x3x3", layer="conv"))


def reference() -> Iterator[bytes]:
    for layer, (b1, b2), (a2, a1) in (("to_q", (6, 3), (8, 4)), ("to_k", (6, 4), (4, 4))):
        name = f"attn.processor.{layer}_lora"
        yield save({f"{name}.up.weight": torch.randn(b1, b2), f"{name}.down.weight": torch.randn(a2, a1)})


def multiplying() -> Iterator[bytes]:
    """OFT, BOFT, (IA)³ and GLoRA, which libraries compute."""
    yield save(_named("oft_blocks=6x4x4", "oft_blocks=2x6x4x4 rescale=24x1"))
    yield save(_named("oft_R.weight=6x6", "oft_R.weight=1x6"))
    yield save(_named("a1.weight=24x2 a2.weight=2x24 b1.weight=24x2 b2.weight=2x24", "weight=24x1 on_input=1"))
    for method, names, settings in (
        (
            "OFT",
            "oft_R.weight=6x6",
            {"oft_block_size": 4, "r": 0, "peft_version": "0.21.0", "num_cayley_neumann_terms": 5},
        ),
        ("BOFT", "boft_R=1x6x4x4 boft_s=24x1", {"boft_block_size": 4}),
        ("IA3", "ia3_l=24x1", {"feedforward_modules": []}),
    ):
        header = {PEFT_HEADER: json.dumps({"peft_type": method, **settings})}
        yield save(_named(names, prefix="base_model.model."), header)


def peft() -> Iterator[bytes]:
    for settings in (
        {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "alpha_pattern": {"to_q": 3}, "rank_pattern": {"x.*": 2}},
        {
            "r": 16,
            "lora_alpha": 2,
            "peft_type": "LORA",
            "use_rslora": True,
            "alpha_pattern": {r"blocks\.(\d+\.)*to_q": 1},
        },
        {"unet.r": 2, "unet.alpha": 4, "unet.peft_type": "LOKR"},
    ):
        names = "lokr_w1=4x8 lokr_w2=6x3" if "unet.r" in settings else "lora_A.weight=2x24 lora_B.weight=24x2"
        yield save(_named(names, prefix="base_model.model."), {PEFT_HEADER: json.dumps(settings)})


def _named(*layers: str, layer: str = "", prefix: str = "") -> dict[str, Tensor]:
    """Tensors by name, of such as "diff=24x24", for the first layers of the network or for one."""
    tensors = {}
    for number, parts in enumerate(layers):
        name = layer or f"blocks.{number}.to_q"
        for part, size in (text.split("=") for text in parts.split()):
            tensors[f"{prefix}{name}.{part}"] = torch.randn(*map(int, size.split("x")))
        if number == 0 and not prefix:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def _peft() -> dict[str, str]:
    return {PEFT_HEADER: json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"})}


def mutated(content: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """A file with some things changed; its offsets fit, and most often its data is as long as they say."""
    try:
        parts = _parts(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        parts = _parts(rng.choice(seeds))
    if rng.random() < 0.05:
        return _damaged(content, rng)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        rng.choice(_MUTATIONS)(parts, seeds, rng)
    result = _joined(parts, rng)
    return result if len(result) <= LARGEST else rng.choice(seeds)


Parts = tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, bytes]]
"""Metadata, header entries and bytes by tensor."""


def _parts(content: bytes) -> Parts:
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__", {})
    blobs = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    if not all(isinstance(entry["shape"], list) and isinstance(entry["dtype"], str) for entry in header.values()):
        raise TypeError("an entry that was changed before")
    return dict(metadata), header, blobs


def _joined(parts: Parts, rng: random.Random) -> bytes:
    metadata, entries, blobs = parts
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, entry in entries.items():
        blob = blobs[name]
        header[name] = {**entry, "data_offsets": [start, start + len(blob)]}
        start += len(blob)
    data = b"".join(blobs[name] for name in entries)
    if entries and rng.random() < 0.03:
        header[rng.choice(list(entries))][rng.choice(("data_offsets", "shape", "dtype"))] = rng.choice(_VALUES)
    text = json.dumps(header)
    if entries and rng.random() < 0.02:
        name = json.dumps(rng.choice(list(entries)))
        text = text[:-1] + f", {name}: {json.dumps(header[json.loads(name)])}}}"
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def _damaged(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if damaged:
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged[: rng.choice((len(damaged), rng.randint(0, len(damaged))))])


def _reshape(parts: Parts, seeds: list[bytes], rng: random.Random) -> None:
    """Another shape or dtype, most often with as many bytes as it takes."""
    _, entries, blobs = parts
    if not entries:
        return
    name = rng.choice(list(entries))
    entry = entries[name]
    shape, change = list(entry["shape"]), rng.random()
    if change < 0.2 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(_NUMBERS)
    elif change < 0.4 and shape:
        shape[rng.randrange(len(shape))] = rng.randint(0, 30)
    elif change < 0.5:
        shape.insert(rng.randint(0, len(shape)), rng.choice((0, 1, 1, 1, 2, 3)))
    elif change < 0.6 and shape:
        del shape[rng.randrange(len(shape))]
    elif change < 0.7:
        rng.shuffle(shape)
    elif change < 0.8:
        shape = rng.choice(([1, 1 << 13], [1 << 13, 1], [1 << 12, 1, 1, 1], [], [0], [1], [0, 10**15], [2] * 9))
    else:
        entry["dtype"] = rng.choice(_DTYPES)
    entry["shape"] = shape
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else 1
    length = count * _SIZES.get(str(entry["dtype"]), 1 if str(entry["dtype"]).startswith("F8") else 4)
    if 0 <= length <= LARGEST:
        blobs[name] = (blobs[name] * (length // max(1, len(blobs[name])) + 1))[:length] or bytes(length)


def _fill(parts: Parts, seeds: list[bytes], rng: random.Random) -> None:
    """Other numbers: all bits set, zeros, an infinity, or a few bytes changed."""
    _, _, blobs = parts
    if not blobs:
        return
    name = rng.choice(list(blobs))
    blob, change = bytearray(blobs[name]), rng.random()
    if change < 0.5:
        unit = rng.choice(
            (b"\0", b"\xff", b"\x00\x00\x80\x7f", b"\x00\x7c", b"\x00\x00\xc0\x7f", b"\x01\0\0\0", b"\x7f")
        )
        blob = bytearray((unit * len(blob))[: len(blob)])
    for _ in range(rng.randint(0, 3)):
        if blob:
            blob[rng.randrange(len(blob))] = rng.randrange(256)
    blobs[name] = bytes(blob)


def _rename(parts: Parts, seeds: list[bytes], rng: random.Random) -> None:
    """A tensor gets another layer's or another part's name, or a strange one."""
    _, entries, blobs = parts
    if not entries:
        return
    name, other = rng.choice(list(entries)), rng.choice(list(entries))
    layer, _, part = name.rpartition(".")
    names = [
        f"{other.rpartition('.')[0]}.{part}", f"{layer}.{other.rpartition('.')[2]}", part, layer, "", ".", f".{part}",
        f"lora_unet_{name}", f"unet.{name}", f"{layer}.alpha", f"{layer}.dora_scale", f"{layer}.é\0{part}", "a" * 1100,
        f"base_model.model.{name}", f"{layer}.base_layer.{part}", f"conv.{part}", f"proj_out.{part}",
        f"text_encoder.{name}", f"{layer}.bias", f"_orig_mod.{name}", "__metadata__",
    ]  # fmt: skip
    new = rng.choice(names)
    if new not in entries and new != "__metadata__":
        entries[new], blobs[new] = entries.pop(name), blobs.pop(name)


def _remove(parts: Parts, seeds: list[bytes], rng: random.Random) -> None:
    _, entries, blobs = parts
    if entries:
        name = rng.choice(list(entries))
        del entries[name], blobs[name]


def _splice(parts: Parts, seeds: list[bytes], rng: random.Random) -> None:
    """A tensor, or the metadata, of another file."""
    metadata, entries, blobs = parts
    others = _parts(rng.choice(seeds))
    if others[1] and rng.random() < 0.7:
        name = rng.choice(list(others[1]))
        entries[name], blobs[name] = others[1][name], others[2][name]
    elif others[0]:
        metadata.update(others[0])


def _annotate(parts: Parts, seeds: list[bytes], rng: random.Random) -> None:
    """Another value somewhere in the metadata, or in the JSON in it."""
    metadata, _, _ = parts
    if not metadata or rng.random() < 0.1:
        names = (
            "krona",
            PEFT_HEADER,
            "ss_network_args",
            "ss_network_dim",
            "ss_network_alpha",
            "alpha",
            "rank",
            "format",
        )
        metadata[rng.choice(names)] = rng.choice(
            ("", "{", "[]", "{}", "1", "nan", "1e999", "x", "[" * 3000, '{"r": 1}')
        )
        return
    key = rng.choice(list(metadata))
    if rng.random() < 0.05:
        metadata[key] = rng.choice(_VALUES)
        return
    try:
        value = json.loads(metadata[key])
    except (ValueError, TypeError, RecursionError):
        return
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _changed_json(value, rng)
    metadata[key] = json.dumps(value)


def _changed_json(value: Any, rng: random.Random, depth: int = 0) -> Any:
    if isinstance(value, dict) and value and depth < 5 and rng.random() < 0.9:
        key, change = rng.choice(list(value)), rng.random()
        if change < 0.1:
            return {other: inner for other, inner in value.items() if other != key}
        if change < 0.2:
            return {**value, rng.choice((*_PATTERNS, *map(str, _NUMBERS), "r", "alpha", "é")): rng.choice(_VALUES)}
        if change < 0.3:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: _changed_json(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and depth < 5 and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _changed_json(value[at], rng, depth + 1), *value[at + rng.randint(0, 1) :]]
    return rng.choice(
        (
            *_VALUES,
            *_PATTERNS,
            *([pattern, 2] for pattern in _PATTERNS),
            *([[p, rng.choice(_VALUES)]] for p in _PATTERNS),
        )
    )


_MUTATIONS: list[Callable[[Parts, list[bytes], random.Random], None]] = [
    _reshape, _reshape, _reshape, _fill, _fill, _rename, _rename, _remove, _splice, _annotate, _annotate, _annotate,
]  # fmt: skip
