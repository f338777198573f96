"""All that can be chosen about a server."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from ..schema import DType, SettingsModel, TextList

TOKEN_VARIABLE = "DIFFUSEKRONA_TOKEN"
"""The environment's name for the token, which other users of the machine do not see, as they see a flag."""


class ServeSettings(SettingsModel):
    """What is served, where, to whom, and within which limits."""

    base: str
    """Base model: a Diffusers pipeline's folder, or its id on the hub."""
    adapters: TextList
    """Folder of adapters, each a .safetensors file or a folder, by name; or ids of hub repositories, repeated."""

    host: str = "127.0.0.1"
    """Address to listen on. By default only this machine can connect; 0.0.0.0 lets all others, so set a token, too."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    token: Annotated[str | None, Field(min_length=1)] = None
    """Token that clients must send, as they send an API key. The environment variable DIFFUSEKRONA_TOKEN sets it, too,
    and hides it from others on the machine."""

    ray: str | None = None
    """Address of a running Ray cluster to serve from, such as 10.0.0.1:6379; by default one is started here."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Number of copies of the base that draw, each in a process of its own."""
    gpus: Annotated[float | None, Field(ge=0)] = None
    """GPUs for each copy of the base; by default 1 where there are any."""
    metrics_port: Annotated[int | None, Field(ge=1, le=65535)] = None
    """Port on which Ray gives its metrics to Prometheus; by default a free one."""

    device: str | None = None
    """Device to compute on, such as cuda or cpu; by default a GPU if there is one."""
    dtype: DType | None = None
    """Type that the weights are loaded in; by default float16 on a GPU, float32 on the CPU."""
    adapter_memory: Annotated[int, Field(ge=1)] = 2048
    """Megabytes for the factors of adapters in each copy; those that were not used for longest make room for others."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Number of pictures that are drawn in one pass, each with its own adapter."""
    wait: Annotated[float, Field(ge=0, le=60)] = 0.05
    """Seconds that a picture waits for others to fill its batch."""
    queue: Annotated[int, Field(ge=1)] = 64
    """Number of pictures that may wait for each copy; others are refused with the code 429."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a request is ended."""

    steps: Annotated[int, Field(ge=1)] = 30
    """Number of denoising steps where a request does not say."""
    guidance_scale: Annotated[float | None, Field(ge=0, le=100)] = None
    """Guidance scale where a request does not say; by default 7.5 for Stable Diffusion 1.x, 2.x and SDXL, and the
    pipeline's own for others."""
    max_steps: Annotated[int, Field(ge=1)] = 100
    """Largest number of denoising steps that a request may ask for."""
    max_images: Annotated[int, Field(ge=1)] = 4
    """Largest number of pictures that a request may ask for."""
    max_side: Annotated[int, Field(ge=16)] = 1536
    """Largest width and height in pixels that a request may ask for."""
    max_prompt: Annotated[int, Field(ge=1)] = 2000
    """Largest number of characters of a prompt."""
    max_body: Annotated[int, Field(ge=256)] = 65536
    """Largest number of bytes of a request."""

    @property
    def source(self) -> str | list[str]:
        """The adapters as `AdapterStore` takes them: one that is no id of the hub is a folder."""
        (first, *others) = self.adapters or [""]
        return self.adapters if others or (first.count("/") == 1 and not os.path.isdir(first)) else first

    def with_token(self) -> ServeSettings:
        """The same with the environment's token, where none is given."""
        found = os.environ.get(TOKEN_VARIABLE)
        return self.replace(token=found) if self.token is None and found else self
