"""AdapterStore: each image against itself alone with load_krona; the budget, what is dropped, and what goes wrong."""

from __future__ import annotations

import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusekrona import AdapterStore, KronAConfig, inject_krona, load_krona, save_krona, unload_krona
from diffusekrona.errors import AdapterFileError, AdapterNameError, KronAError, StoreFullError
from diffusekrona.generation import generate_images
from diffusekrona.serving.loading import Loader
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sdxl_pipeline
from tests.serving.adapters import draw, folder_of, save

PROMPTS = ["a toy", "a dog on sand", "a red toy"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five adapters alike; read only."""
    return folder_of(tmp_path_factory.mktemp("adapters"), "dog", "cat", "fox", "hen", "cow")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapters"))


@pytest.fixture
def pipe() -> Any:
    return tiny_sdxl_pipeline()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was read from files, in order."""
    found: list[str] = []
    load = Loader.load

    def noted(self: Loader, source: Path) -> Any:
        found.append(source.stem)
        return load(self, source)

    monkeypatch.setattr(Loader, "load", noted)
    return found


def alone(source: Path | None, prompt: str, seed: int) -> torch.Tensor:
    pipe = tiny_sdxl_pipeline()
    if source is not None:
        load_krona(pipe, source)
    return draw(pipe, [prompt], [seed])


def size_of(folder: Path, pipe: Any) -> int:
    return AdapterStore(pipe, folder).load("dog").bytes


# What is drawn


def test_each_image_is_what_it_is_alone(folder: Path, pipe: Any) -> None:
    store = AdapterStore(pipe, folder)
    for names in (["dog", None, "cat"], ["fox", "dog", "dog"], ["hen", "cow", None], ["dog", None, "cat"]):
        with store.batch(names):
            found = draw(pipe, PROMPTS, [0, 1, 2])
        for number, name in enumerate(names):
            expected = alone(folder / f"{name}.safetensors" if name else None, PROMPTS[number], number)
            torch.testing.assert_close(found[number : number + 1], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(draw(pipe, PROMPTS[:1], [0]), alone(None, PROMPTS[0], 0), rtol=0, atol=0)


KINDS: dict[str, dict[str, Any]] = {
    "scaled": {"a1": 4, "a2": 8, "alpha": 3.0},
    "terms": {"a1": 4, "a2": 8, "num_terms": 2, "target_modules": ["to_q"]},
    "transposed": {"a1": 8, "a2": 2, "b_rank": 1, "layout": "transposed"},
    "patterns": {"a1": 4, "a2": 8, "alpha_pattern": {"to_q": 0.5}},
    "texts": {"a1": 4, "a2": 8, "text_encoders": True},
    "half": {"a1": 4, "a2": 8, "dtype": torch.bfloat16},
}


def test_so_are_adapters_of_all_kinds_in_any_order(folder: Path, pipe: Any) -> None:
    for seed, (name, config) in enumerate(KINDS.items()):
        save(pipe, folder / (name if seed % 2 else f"{name}.safetensors"), seed, **config)
    store = AdapterStore(pipe, folder)
    kinds = [*KINDS, *reversed(KINDS), "dog"]
    for start in range(0, len(kinds) - 2):
        names = kinds[start : start + 3]
        with store.batch(names):
            found = draw(pipe, PROMPTS, [0, 1, 2])
        for number, name in enumerate(names):
            expected = alone(store.listing.source(name), PROMPTS[number], number)
            torch.testing.assert_close(found[number : number + 1], expected, rtol=2e-3, atol=2e-3)


def test_long_prompts_have_their_own_text_encoders_too(folder: Path, pipe: Any) -> None:
    for seed, name in enumerate(("one", "two")):
        save(pipe, folder / f"{name}.safetensors", seed, a1=4, a2=8, text_encoders=True)
    store, prompts = AdapterStore(pipe, folder), ["a toy " * 30 + end for end in ("cat", "dog", "hen")]
    options = {"steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
    with store.batch(["one", None, "two"]):
        found = generate_images(pipe, prompts, [0, 1, 2], batch_size=3, **options)
    for number, name in enumerate(("one", None, "two")):
        with store.batch([name]):
            (expected,) = generate_images(pipe, prompts[number : number + 1], [number], **options)
        difference = np.asarray(found[number], float) - np.asarray(expected, float)
        assert np.abs(difference).max() <= 2
    with store.batch(["one", "two", "one"]):
        others = generate_images(pipe, prompts, [0, 1, 2], batch_size=3, **options)
    assert np.abs(np.asarray(found[1], float) - np.asarray(others[1], float)).max() > 10


def test_the_pipelines_own_adapters_stay_as_they_are(folder: Path, pipe: Any) -> None:
    own = inject_krona(pipe, KronAConfig(a1=2, a2=4, init_weights=False), "own")
    before = draw(pipe, PROMPTS, [0, 1, 2])
    store = AdapterStore(pipe, folder)
    with store.batch(["dog", None, "cat"]):
        assert not torch.equal(draw(pipe, PROMPTS, [0, 1, 2]), before)
    assert torch.equal(draw(pipe, PROMPTS, [0, 1, 2]), before)
    assert all(parameter.requires_grad for parameter in own.parameters())
    store.close()
    assert torch.equal(draw(pipe, PROMPTS, [0, 1, 2]), before)
    unload_krona(pipe)
    assert not krona_layers(pipe.unet)


def test_places_are_few_and_none_is_left(folder: Path, pipe: Any) -> None:
    store = AdapterStore(pipe, folder)
    for name in ("dog", "cat", "fox", "hen", "cow"):
        with store.batch([name, None]):
            pass
    assert len(pipe.unet.peft_config) == 1
    with pytest.raises(RuntimeError), store.batch(["dog", "cat"]):
        raise RuntimeError
    assert len(pipe.unet.peft_config) == 2
    store._slots._most = 1
    with store.batch(["dog"]):
        pass
    assert len(pipe.unet.peft_config) == 1
    store.close()
    assert not hasattr(pipe.unet, "peft_config")
    assert store.bytes == 0


def test_factors_have_the_bases_dtype_or_float32(folder: Path) -> None:
    pipe = tiny_sdxl_pipeline().to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        save(pipe, folder / f"{str(dtype)[6:]}.safetensors", dtype=dtype, a1=4, a2=8)
    store = AdapterStore(pipe, folder)
    found = {name: store.load(name).contents.tensors[0].dtype for name in ("bfloat16", "float16", "dog")}
    assert found == {"bfloat16": torch.bfloat16, "float16": torch.float32, "dog": torch.float32}


# Reading


def test_one_like_another_is_read_in_one_piece_and_is_the_same(folder: Path, pipe: Any, monkeypatch: Any) -> None:
    by_the_readers = {name: AdapterStore(pipe, folder).load(name) for name in ("dog", "cat")}
    store = AdapterStore(pipe, folder)
    store.load("dog")
    monkeypatch.setattr("diffusekrona.serving.loading.read_adapters", lambda *_: pytest.fail("read in the usual way"))
    found = store.load("cat")
    assert found.structure == by_the_readers["cat"].structure
    assert found.contents.scales == by_the_readers["cat"].contents.scales
    for one, two in zip(found.contents.tensors, by_the_readers["cat"].contents.tensors, strict=True):
        assert torch.equal(one, two)
    memory = {tensor.untyped_storage().data_ptr() for tensor in found.contents.tensors}
    assert len(memory) == 1
    assert found.bytes == by_the_readers["cat"].bytes == sum(t.nbytes for t in found.contents.tensors)


def test_another_config_with_the_same_tensors_is_another_adapter(folder: Path, pipe: Any) -> None:
    save(pipe, folder / "strong.safetensors", a1=4, a2=8, alpha=2.0)
    store = AdapterStore(pipe, folder)
    assert set(store.load("dog").contents.scales.values()) == {1.0}
    assert set(store.load("strong").contents.scales.values()) == {2.0}


def test_a_replaced_file_is_read_again(folder: Path, pipe: Any, reads: list[str]) -> None:
    store = AdapterStore(pipe, folder)
    store.load("dog")
    store.load("dog")
    save(pipe, folder / "dog.safetensors", seed=7, a1=4, a2=8)
    with store.batch(["dog"]):
        found = draw(pipe, PROMPTS[:1], [0])
    torch.testing.assert_close(found, alone(folder / "dog.safetensors", PROMPTS[0], 0), rtol=1e-3, atol=1e-3)
    assert reads == ["dog", "dog"]
    assert len(store.loaded()) == 1


# Damage


def test_a_damaged_one_fails_its_own_name_each_time_and_no_other(folder: Path, pipe: Any) -> None:
    whole = (folder / "dog.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[:-100])
    (folder / "long.safetensors").write_bytes(whole + b"0" * 8)
    (folder / "noise.safetensors").write_bytes(b"noise")
    (folder / "none.safetensors").write_bytes(b"")
    (folder / "infinite.safetensors").write_bytes(whole[:-4] + b"\x00\x00\x80\x7f")
    (folder / "empty").mkdir()
    inject_krona(pipe, KronAConfig(a1=4, a2=8, modules_to_save=["conv_out"]), "whole")
    save_krona(pipe, folder / "whole.safetensors", "whole")
    unload_krona(pipe)
    store = AdapterStore(pipe, folder)
    store.load("cat")
    for name in ("short", "long", "noise", "none", "infinite", "empty", "whole"):
        for _ in range(2):
            with pytest.raises(AdapterFileError), store.batch(["dog", name]):
                pass
        with store.batch(["dog"]):
            pass
    with pytest.raises(AdapterNameError, match="no adapter named 'cow2'"), store.batch(["cow2"]):
        pass
    assert not store._in_use
    assert set(store.loaded()) == {"dog", "cat"}
    (folder / "short.safetensors").write_bytes(whole)
    with store.batch(["short"]):
        pass


def test_one_that_vanishes_is_an_error_of_ours(folder: Path, pipe: Any) -> None:
    store = AdapterStore(pipe, folder)
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "link.safetensors").symlink_to(folder / "nowhere")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        store.load("link")


# The budget


def test_those_used_last_stay_within_the_budget(folder: Path, pipe: Any, reads: list[str]) -> None:
    size = size_of(folder, pipe)
    reads.clear()
    store = AdapterStore(pipe, folder, budget=2 * size + size // 2)
    for name in ("dog", "cat", "dog", "fox"):
        store.load(name)
        assert store.bytes <= 2 * size
    assert store.loaded() == ["dog", "fox"]
    store.load("dog")
    store.load("cat")
    assert reads == ["dog", "cat", "fox", "cat"]
    assert store.loaded() == ["dog", "cat"]


def test_those_in_use_are_not_dropped(folder: Path, pipe: Any) -> None:
    size = size_of(folder, pipe)
    store = AdapterStore(pipe, folder, budget=2 * size + size // 2)
    with store.batch(["dog", "cat"]):
        with pytest.raises(StoreFullError, match="'fox' takes"):
            store.load("fox")
        assert set(store.loaded()) == {"dog", "cat"}
    with pytest.raises(StoreFullError), store.batch(["dog", "cat", "fox"]):
        pass
    with store.batch(["fox", "hen"]):
        assert set(store.loaded()) == {"fox", "hen"}
    with pytest.raises(StoreFullError, match="no room"):
        AdapterStore(pipe, folder, budget=10).load("dog")
    with pytest.raises(KronAError, match="at least 1 byte"):
        AdapterStore(pipe, folder, budget=0)


def test_what_was_dropped_takes_no_memory(folder: Path, pipe: Any) -> None:
    store = AdapterStore(pipe, folder, budget=size_of(folder, pipe) + 5000)

    def held() -> int:
        factors = [
            f for layer in krona_layers(pipe.unet).values() for f in (*layer.krona_A.values(), *layer.krona_B.values())
        ]
        return sum({f.untyped_storage().data_ptr(): f.untyped_storage().nbytes() for f in factors}.values())

    with store.batch(["dog"]):
        kept = weakref.ref(store.load("dog"))
        assert held() == store.bytes
    assert held() < 100
    store.load("cat")
    assert kept() is None


# The next batch


def settle(store: AdapterStore) -> None:
    """Wait until what was asked for ahead is there."""
    if store._prefetching is not None:
        store._prefetching.submit(lambda: None).result(timeout=60)


def test_the_next_batchs_are_loaded_meanwhile(folder: Path, pipe: Any, reads: list[str]) -> None:
    store = AdapterStore(pipe, folder)
    with store.batch(["dog"]):
        store.prefetch(["cat", None, "fox", "dog", "cat"])
        settle(store)
        assert set(store.loaded()) == {"dog", "cat", "fox"}
    with store.batch(["cat", "fox"]):
        pass
    assert sorted(reads) == ["cat", "dog", "fox"]


def test_one_read_serves_all_who_wait_for_it(folder: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go, load, count = threading.Event(), threading.Event(), Loader.load, []

    def slow(self: Loader, source: Path) -> Any:
        count.append(source.stem)
        started.set()
        assert go.wait(60)
        return load(self, source)

    monkeypatch.setattr(Loader, "load", slow)
    store = AdapterStore(pipe, folder)
    store.prefetch(["dog"])
    assert started.wait(60)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(store.load("dog")))
    waiting.start()
    go.set()
    waiting.join(60)
    assert found
    assert count == ["dog"]


def test_what_has_no_room_ahead_waits_for_its_turn(folder: Path, pipe: Any) -> None:
    size = size_of(folder, pipe)
    store = AdapterStore(pipe, folder, budget=3 * size + size // 2)
    store.load("cow")
    with store.batch(["dog", "cat"]):
        store.prefetch(["fox", "hen"])
        settle(store)
        assert set(store.loaded()) == {"dog", "cat", "fox"}  # in cow's place; none for hen
    with store.batch(["fox", "hen"]):
        assert {"fox", "hen"} <= set(store.loaded())


def test_damage_ahead_is_told_when_it_is_asked_for(folder: Path, pipe: Any) -> None:
    (folder / "noise.safetensors").write_bytes(b"noise")
    store = AdapterStore(pipe, folder)
    store.prefetch(["noise", "nobody", "dog"])
    settle(store)
    assert store.loaded() == ["dog"]
    with pytest.raises(AdapterFileError, match="noise"):
        store.load("noise")


# Ten thousand


def test_ten_thousand_in_the_folder_cost_nothing_until_they_are_used(folder: Path, pipe: Any, reads: list[str]) -> None:
    for number in range(10_000):
        (folder / f"subject-{number}.safetensors").hardlink_to(folder / "dog.safetensors")
    store = AdapterStore(pipe, folder)
    assert len(store.names()) == 10_005
    assert reads == []
    assert store.bytes == 0
    for number in (0, 9_999):
        with store.batch([f"subject-{number}"]):
            pass
    assert reads == ["subject-0", "subject-9999"]
