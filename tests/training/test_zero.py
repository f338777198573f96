"""DeepSpeed's settings become those of plain processes or of FSDP."""

from __future__ import annotations

import json
import os

import pytest

from diffusekrona.training import TrainingConfigError
from diffusekrona.training.runtime import accelerator_for
from diffusekrona.training.zero import deepspeed_as_fsdp


@pytest.fixture(autouse=True)
def environment():
    """What is set in a test is unset afterwards."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ |= before


def asked(**settings: str) -> dict[str, str]:
    """What accelerate is told after DeepSpeed was asked for."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true"}
    os.environ |= {f"ACCELERATE_DEEPSPEED_{name.upper()}": value for name, value in settings.items()}
    deepspeed_as_fsdp()
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false"
    return {name: value for name, value in os.environ.items() if "FSDP" in name}


@pytest.mark.parametrize("stage", ["0", "1", "2", None])
def test_what_splits_no_weights_leaves_plain_processes(stage):
    assert asked(**({} if stage is None else {"zero_stage": stage})) == {}


@pytest.mark.parametrize(("device", "offloaded"), [("none", "false"), ("cpu", "true"), ("CPU", "true")])
def test_stage_3_is_fsdp_by_blocks(device, offloaded):
    assert asked(zero_stage="3", offload_param_device=device) == {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_OFFLOAD_PARAMS": offloaded,
    }


@pytest.mark.parametrize(
    ("zero", "found"),
    [
        ({"stage": 3}, "false"),
        ({"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}, "true"),
        ({"stage": 3, "offload_param": {"device": "none"}}, "false"),
        ({"stage": 3, "offload_param": {"pin_memory": True}}, "false"),
        ({"stage": 2, "offload_param": None}, None),
        ({"stage": "auto"}, "false"),
    ],
)
def test_a_file_goes_before_the_rest(tmp_path, zero, found):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}))
    assert asked(zero_stage="3", config_file=str(tmp_path / "zero.json")).get("FSDP_OFFLOAD_PARAMS") == found


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", *(f'{{"zero_optimization": {zero}}}' for zero in ("3", '{"stage": null}', '{"stage": "three"}'))],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "zero.json").write_text(text)
    with pytest.raises(TrainingConfigError, match=r"zero\.json cannot be read"):
        asked(config_file=str(tmp_path / "zero.json"))


def test_weights_on_a_disk_are_refused():
    with pytest.raises(TrainingConfigError, match="frozen weights on nvme"):
        asked(zero_stage="3", offload_param_device="nvme")


def test_one_process_trains_as_ever():
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    with accelerator_for("no") as accelerator:
        assert accelerator.num_processes == 1


@pytest.mark.parametrize("use", [None, "false"])
def test_who_does_not_ask_gets_nothing(use):
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} | ({} if use is None else {"ACCELERATE_USE_DEEPSPEED": use})
    deepspeed_as_fsdp()
    assert not [name for name in os.environ if "FSDP" in name]
