"""One file per file format. Each reads and writes factors and knows no model."""

from typing import Literal

Format = Literal["krona", "lokr", "lokr-diffusers"]
"""Ours; LoKr with the names of kohya's scripts, LyCORIS and ComfyUI; LoKr with the names of Diffusers."""
