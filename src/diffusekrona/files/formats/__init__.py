"""One file per file format. Each reads and writes factors and knows no model."""

from typing import Literal

Format = Literal["krona", "lokr", "lokr-diffusers", "comfyui", "kohya", "diffusers", "sdnext", "invokeai", "lora"]
"""Ours; LoKr as the named program reads it, "lokr" for ComfyUI and "lokr-diffusers" for Diffusers; an exact LoRA."""
