"""The recipe that makes the small text-to-image base model of `models/emoji-sdxl`."""
