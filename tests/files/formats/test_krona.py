"""Our own format: folders in PEFT's layout, and single files with the config in their header."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusekrona import KronAConfig
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.formats import krona
from diffusekrona.files.formats.krona import SavedAdapter, write
from diffusekrona.files.read import opened

FORMS = pytest.mark.parametrize("form", ["dog", "dog.safetensors"])


def read(path: Path) -> dict[str, SavedAdapter]:
    return krona.read(opened(path))


def adapter(seed: int = 0, **fields: Any) -> SavedAdapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"mid.{i}.to_q.krona_{f}": torch.randn(3, 2, generator=generator) for i in range(2) for f in "AB"}
    return SavedAdapter(KronAConfig(**{"a1": 3, "a2": 2, **fields}), tensors)


def assert_same(found: dict[str, SavedAdapter], expected: dict[str, SavedAdapter]) -> None:
    assert found.keys() == expected.keys()
    for part, saved in expected.items():
        assert found[part].config == saved.config
        assert found[part].tensors.keys() == saved.tensors.keys()
        assert all(torch.equal(found[part].tensors[key], tensor) for key, tensor in saved.tensors.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def save_with_header(path: Path, entries: dict[str, str], tensors: dict[str, Tensor] | None = None) -> Path:
    save_file(tensors or {"x": torch.ones(1)}, path, metadata=entries)
    return path


# What is written


@FORMS
@pytest.mark.parametrize("parts", [[""], ["unet"], ["unet", "text_encoder"], ["transformer", "text_encoder_3"]])
def test_what_is_written_is_read(tmp_path: Path, form: str, parts: list[str]) -> None:
    adapters = {part: adapter(seed, alpha=seed + 1.0) for seed, part in enumerate(parts)}
    write(tmp_path / form, adapters)
    assert_same(read(tmp_path / form), adapters)


@FORMS
def test_every_field_of_a_config_is_kept(tmp_path: Path, form: str) -> None:
    saved = adapter(
        alpha=-0.25,
        target_modules=["to_q", "to_k"],
        exclude_modules=r".*time.*",
        factor_pattern={r"b.*": (1, 2), "a": (3, 1)},
        alpha_pattern={"to_v": 2.0, "to_q": 3.0},
        terms_pattern={"to_v": 2, "to_q": 3},
        dropout=0.25,
        init_a="kaiming_uniform",
        init_b="xavier_uniform",
        layers_to_transform=[0, 2],
        layers_pattern="blocks",
        modules_to_save=["conv_out"],
        inference_mode=True,
    )
    write(tmp_path / form, {"": saved})
    config = read(tmp_path / form)[""].config
    assert config == saved.config
    assert list(config.factor_pattern.items()) == list(saved.config.factor_pattern.items())
    assert list(config.alpha_pattern.items()) == list(saved.config.alpha_pattern.items())
    assert list(config.terms_pattern.items()) == list(saved.config.terms_pattern.items())


def test_a_folder_has_pefts_layout_for_each_component(tmp_path: Path) -> None:
    adapters = {"unet": adapter(0), "text_encoder": adapter(1, a1=1)}
    write(tmp_path, adapters)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert contents(tmp_path).keys() == {f"{part}/{name}" for part in adapters for name in names}
    for part, saved in adapters.items():
        tensors = load_file(tmp_path / part / "adapter_model.safetensors")
        assert tensors.keys() == {f"base_model.model.{key}" for key in saved.tensors}
        assert PeftConfig.from_pretrained(tmp_path / part) == saved.config


def test_a_single_models_folder_has_pefts_layout(tmp_path: Path) -> None:
    write(tmp_path, {"": adapter()})
    assert contents(tmp_path).keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_file_names_its_tensors_after_their_components(tmp_path: Path) -> None:
    adapters = {"unet": adapter(0), "text_encoder": adapter(1)}
    write(tmp_path / "dog.safetensors", adapters)
    expected = {f"{part}.{key}" for part, saved in adapters.items() for key in saved.tensors}
    assert load_file(tmp_path / "dog.safetensors").keys() == expected


def test_the_header_says_its_version_and_every_config(tmp_path: Path) -> None:
    adapters = {"unet": adapter(0), "text_encoder": adapter(1, alpha=2.0)}
    write(tmp_path / "dog.safetensors", adapters)
    entries = header(tmp_path / "dog.safetensors")
    assert entries.keys() == {"krona"}
    found = json.loads(entries["krona"])
    assert found["version"] == 1
    assert {part: config["alpha"] for part, config in found["components"].items()} == {
        "unet": 1.0,
        "text_encoder": 2.0,
    }


@FORMS
def test_equal_adapters_give_equal_bytes(tmp_path: Path, form: str) -> None:
    for again in range(8):
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ff"]
        adapters = {"unet": adapter(target_modules=set(targets[again % 5 :] + targets[: again % 5]))}
        write(tmp_path / str(again) / form, adapters)
    assert all(contents(tmp_path / str(again)) == contents(tmp_path / "0") for again in range(8))


def test_tensors_are_written_as_they_read_whatever_their_strides(tmp_path: Path) -> None:
    saved = adapter()
    saved.tensors = {key: tensor.T.requires_grad_() for key, tensor in saved.tensors.items()}
    write(tmp_path / "dog.safetensors", {"": saved})
    assert_same(read(tmp_path / "dog.safetensors"), {"": saved})


# Over what was there


@FORMS
def test_a_new_adapter_replaces_the_old_one(tmp_path: Path, form: str) -> None:
    write(tmp_path / form, {"": adapter(0)})
    write(tmp_path / form, {"": adapter(1, alpha=3.0)})
    assert_same(read(tmp_path / form), {"": adapter(1, alpha=3.0)})


@pytest.mark.parametrize("old", [[""], ["unet", "text_encoder"], ["transformer"]])
@pytest.mark.parametrize("new", [[""], ["unet"], ["unet", "text_encoder_2"]])
def test_components_that_the_folder_held_before_are_gone(tmp_path: Path, old: list[str], new: list[str]) -> None:
    write(tmp_path, {part: adapter(0) for part in old})
    write(tmp_path, {part: adapter(1) for part in new})
    assert_same(read(tmp_path), {part: adapter(1) for part in new})
    written = {str(path) for path in tmp_path.rglob("adapter_*")}
    assert len(written) == 2 * len(new)


@pytest.mark.parametrize("parts", [[""], ["unet"]])
def test_other_files_and_other_adapters_in_subfolders_stay(tmp_path: Path, parts: list[str]) -> None:
    write(tmp_path / "checkpoint-500", {"": adapter(0)})
    write(tmp_path / "cat", {"unet": adapter(0)})
    (tmp_path / "README.md").write_text("my dog")
    before = contents(tmp_path)
    write(tmp_path, {part: adapter(1) for part in parts})
    assert before.items() <= contents(tmp_path).items()
    assert_same(read(tmp_path), {part: adapter(1) for part in parts})


@FORMS
def test_what_a_killed_process_left_does_not_matter(tmp_path: Path, form: str) -> None:
    write(tmp_path / form, {"unet": adapter(0)})
    for folder in (tmp_path, tmp_path / form, tmp_path / form / "unet"):
        if folder.is_dir():
            for name in (".adapter_model.safetensors.0123abcd.tmp", ".dog.safetensors.0123abcd.tmp"):
                (folder / name).write_bytes(b"half")
    assert_same(read(tmp_path / form), {"unet": adapter(0)})
    write(tmp_path / form, {"unet": adapter(1)})
    assert_same(read(tmp_path / form), {"unet": adapter(1)})


def forked(action: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
@FORMS
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(
    tmp_path: Path, form: str, function: str, call: int, after: bool
) -> None:
    path = tmp_path / form
    old, new = {"unet": adapter(0)}, {"unet": adapter(1, alpha=2.0)}
    write(path, old)

    def save_and_die() -> None:
        original, calls = getattr(os, function), 0

        def killing(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, function, killing)
        write(path, new)

    killed = call == 1 or form == "dog"
    assert forked(save_and_die) == (-signal.SIGKILL if killed else 0)
    # The config in the tensor file's header counts, so the first rename decides.
    renamed = not killed or (function == "replace" and (after or call == 2))
    assert_same(read(path), new if renamed else old)
    write(path, new)
    assert_same(read(path), new)


# What PEFT and Diffusers wrote


def test_a_folder_without_a_header_takes_its_config_from_the_json(tmp_path: Path) -> None:
    saved = adapter()
    tensors = {f"base_model.model.{key}": tensor for key, tensor in saved.tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    saved.config.save_pretrained(tmp_path)
    assert_same(read(tmp_path), {"": saved})
    assert_same(read(tmp_path / "adapter_model.safetensors"), {"": saved})


def test_diffusers_metadata_counts_as_a_config(tmp_path: Path) -> None:
    saved = adapter()
    entries = {"format": "pt", "lora_adapter_metadata": json.dumps(saved.config.to_dict())}
    save_with_header(tmp_path / "pytorch_lora_weights.safetensors", entries, saved.tensors)
    assert_same(read(tmp_path), {"": saved})
    assert_same(read(tmp_path / "pytorch_lora_weights.safetensors"), {"": saved})


def test_a_layer_that_was_saved_under_another_adapter_has_its_own_name(tmp_path: Path) -> None:
    saved = adapter()
    tensors = {key.replace(".krona", ".base_layer.krona"): tensor for key, tensor in saved.tensors.items()}
    entries = {"lora_adapter_metadata": json.dumps(saved.config.to_dict())}
    assert_same(read(save_with_header(tmp_path / "x.safetensors", entries, tensors)), {"": saved})


# What cannot be read


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"dog does not exist"):
        read(tmp_path / "dog")


@pytest.mark.parametrize("name", ["dog", "dog.safetensors"])
def test_an_empty_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(AdapterFileError, match=r"holds no adapter_model\.safetensors.*It holds: nothing"):
        read(tmp_path / name)


def test_a_folder_without_an_adapter_lists_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_with_header(tmp_path / name, {})
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterFileError, match=r"It holds: a\.safetensors, adapter_model\.bin, b\.safetensors"):
        read(tmp_path)


def test_a_pickle(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"adapter_model\.bin is a pickle"):
        read(tmp_path / "adapter_model.bin")


def test_a_missing_config(tmp_path: Path) -> None:
    save_with_header(tmp_path / "adapter_model.safetensors", {"format": "pt"})
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(AdapterFileError, match=r"carries no KronA config.*an adapter_config\.json beside it"):
            read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged config"),
        ('{"peft_type": "KRONA"', "damaged config"),
        ("[" * 100_000, "damaged config"),
        ("[1, 2]", "not a JSON object"),
        ('"KRONA"', "not a JSON object"),
        ("{}", "a config, which is not a KronA adapter's"),
        ('{"peft_type": "LORA", "r": 8}', "an adapter of the method LORA, which is not a KronA adapter's"),
        ('{"peft_type": ["KRONA"]}', "which is not a KronA adapter's"),
        ('{"peft_type": "KRONA", "a1": 0}', "a config that does not work: a1, a2 must be two whole numbers"),
        ('{"peft_type": "KRONA", "a1": "4"}', "a config that does not work"),
        (
            '{"peft_type": "KRONA", "alpha": NaN}',
            "a config that does not work: alpha must be a finite number",
        ),
        (
            '{"peft_type": "KRONA", "alpha": 1e999}',
            "a config that does not work: alpha must be a finite number",
        ),
        ('{"peft_type": "KRONA", "dropout": 1.5}', "a config that does not work: dropout"),
        ('{"peft_type": "KRONA", "init_a": "ones"}', "a config that does not work: init_a"),
        ('{"peft_type": "KRONA", "task_type": "PAINTING"}', "a config that does not work: Invalid task type"),
        ('{"peft_type": "KRONA", "target_modules": "*("}', "a config that does not work: target_modules"),
        ('{"peft_type": "KRONA", "target_modules": [3]}', "a config that does not work: target_modules"),
        (
            '{"peft_type": "KRONA", "factor_pattern": {"(": [1, 2]}}',
            "a config that does not work: factor_pattern",
        ),
        (
            '{"peft_type": "KRONA", "factor_pattern": {"a": [1]}}',
            "a config that does not work: factor_pattern",
        ),
        (
            '{"peft_type": "KRONA", "layers_to_transform": "x"}',
            "a config that does not work: layers_to_transform",
        ),
        ('{"peft_type": "KRONA", "modules_to_save": "conv"}', "a config that does not work: modules_to_save"),
    ],
)
def test_a_config_that_does_not_work_is_an_error_that_says_why(tmp_path: Path, text: str, message: str) -> None:
    save_with_header(tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=rf"adapter_config\.json holds .*{message}"):
        read(tmp_path)
    if text.startswith("{"):
        components = '{"version": 1, "components": {"": ' + text + "}}"
        with pytest.raises(AdapterFileError, match=r"x\.safetensors holds"):
            read(save_with_header(tmp_path / "x.safetensors", {"krona": components}))
        with pytest.raises(AdapterFileError, match=rf"y\.safetensors holds .*{message}"):
            read(save_with_header(tmp_path / "y.safetensors", {"lora_adapter_metadata": text}))


def test_a_config_that_is_not_text(tmp_path: Path) -> None:
    save_with_header(tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json cannot be read"):
        read(tmp_path)


def test_a_newer_librarys_config_is_read_with_a_warning(tmp_path: Path) -> None:
    saved = adapter()
    values = {**saved.config.to_dict(), "of_the_future": 1}
    path = save_with_header(tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(values)}, saved.tensors)
    with pytest.warns(UserWarning, match="of_the_future"):
        assert_same(read(path), {"": saved})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"version": 2, "components": {}}', "a `krona` header of version 2; this reads version 1"),
        ('{"version": "1"}', "a `krona` header of version '1'"),
        ("{}", "a `krona` header of version None"),
        ('{"version": 1}', "a `krona` header that names no components"),
        ('{"version": 1, "components": {}}', "a `krona` header that names no components"),
        ('{"version": 1, "components": ["unet"]}', "a `krona` header that names no components"),
        ('{"version": 1, "components": {"unet": 3}}', "holds a config, which is not a KronA adapter's"),
        ("[]", "not a JSON object"),
        ('{"version"', "damaged config"),
    ],
)
def test_a_header_that_does_not_work_is_an_error_that_says_why(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        read(save_with_header(tmp_path / "x.safetensors", {"krona": entry}))


def test_tensors_of_a_component_that_the_header_does_not_name(tmp_path: Path) -> None:
    write(tmp_path / "dog.safetensors", {"unet": adapter()})
    entries = header(tmp_path / "dog.safetensors")
    path = save_with_header(tmp_path / "x.safetensors", entries, {"vae.krona_A": torch.ones(1)})
    with pytest.raises(AdapterFileError, match=r"holds 'vae\.krona_A', but its config names only \['unet'\]"):
        read(path)


def test_a_whole_pipelines_file_under_pefts_name(tmp_path: Path) -> None:
    adapters = {"unet": adapter(0), "text_encoder": adapter(1)}
    write(tmp_path / "adapter_model.safetensors", adapters)
    assert_same(read(tmp_path), adapters)
    (tmp_path / "unet").mkdir()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "unet" / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="a component's folder holds one, without a name"):
        read(tmp_path)
