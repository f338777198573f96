"""DeepSpeed's settings, as accelerate passes them on, as settings of PyTorch's own.

Of what ZeRO splits over processes, an adapter has megabytes of optimizer state and gradients (stages 1 and 2), which
stay whole here, and the frozen weights (stage 3), which FSDP splits in the same way.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TrainingConfigError
from ..tuner.compat import parse_flag_from_env

_log = logging.getLogger(__name__)

_NAMES = "ACCELERATE_DEEPSPEED_"


def deepspeed_as_fsdp() -> None:
    """Where accelerate's launcher asked this process for DeepSpeed, ask for plain processes or for FSDP instead.

    Raises:
        TrainingConfigError: DeepSpeed's file cannot be read, or wants frozen weights on a disk.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return
    zero = _zero_settings()
    stage, offload = zero["stage"], _device(zero["offload_param"])
    if offload not in ("none", "cpu"):
        raise TrainingConfigError(
            f"DeepSpeed is to keep the frozen weights on {offload}, which is not possible here: set "
            "offload_param_device to cpu or none in accelerate's configuration."
        )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    if stage < 3:
        _log.info("ZeRO %d would split what is small here: each process keeps all of it.", stage)
        return
    _log.info("PyTorch's FSDP splits the frozen weights, as ZeRO 3 would.")
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_OFFLOAD_PARAMS": str(offload == "cpu").lower(),
    }


def _zero_settings() -> dict[str, Any]:
    """Of accelerate's configuration, or of the file that it names, which goes before."""
    found: dict[str, Any] = {
        "stage": int(os.environ.get(f"{_NAMES}ZERO_STAGE", 2)),
        "offload_param": os.environ.get(f"{_NAMES}OFFLOAD_PARAM_DEVICE"),
    }
    file = os.environ.get(f"{_NAMES}CONFIG_FILE", "none")
    if file != "none":
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
            found |= {name: value for name, value in config.items() if value != "auto"}
            found["stage"] = int(found["stage"])
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise TrainingConfigError(f"DeepSpeed's configuration {file} cannot be read: {error}") from error
    return found


def _device(wanted: Any) -> str:
    """Where to keep what is not at work, from a name or from DeepSpeed's own `{"device": name}`."""
    name = wanted.get("device") if isinstance(wanted, Mapping) else wanted
    return str(name or "none").lower()
