"""What both recipes share: where checkpoints are, and the folder that transformers loads."""

from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, PreTrainedModel

from recipes.base.art import PIXELS
from recipes.base.training import save_half

CACHE = Path(__file__).parent / ".cache"


def image_settings() -> dict[str, Any]:
    """Of an image processor: 64 pixels a side, values in [-1, 1]."""
    size = {"height": PIXELS, "width": PIXELS}
    return {
        "size": size, "do_center_crop": False, "crop_size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip


def write_model(model: PreTrainedModel, folder: Path, processor: Any, words: CLIPTokenizer | None = None) -> None:
    """Stored in half precision, with what prepares its inputs."""
    save_half(model, folder)
    processor.save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)
        words.backend_tokenizer.model.save(str(folder))  # what transformers 4 reads
