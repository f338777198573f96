"""Prompts to pictures."""

from .generate import generate_images, generated

__all__ = ["generate_images", "generated"]
