"""The pipeline that a server draws with, as its settings say."""

from __future__ import annotations

from typing import Any

import torch

from ..bases.loading import default_device, load_base
from .settings import ServeSettings


def load_pipeline(settings: ServeSettings) -> Any:
    """Load the base onto its device, and quietly.

    Raises:
        BaseModelError: there is no such base.
    """
    device = torch.device(settings.device) if settings.device else default_device()
    dtype = getattr(torch, settings.dtype or ("float32" if device.type == "cpu" else "float16"))
    pipe = load_base(settings.base, dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
