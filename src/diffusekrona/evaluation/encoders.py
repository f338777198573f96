"""The encoders of the scores: CLIP and DINO from transformers, by the hub's id or from a folder.

Their own image processors prepare the images, on Pillow: CLIP's resizes the shorter side to 224 (bicubic) and cuts
out the middle, that of facebook/dino-vits16 resizes to 224 × 224 (bilinear). Everything runs in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..errors import EvaluationError
from . import CLIP, DINO
from .perceptual import Lpips

# The published processors were made with Pillow, and torchvision resizes in another way.
_ON_PILLOW = {"backend": "pil"} if find_spec("transformers.image_processing_backends") else {"use_fast": False}

_log = logging.getLogger(__name__)
_PARTS = {"CLIP": "model, image processor and tokenizer", "DINO": "model and image processor"}
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Encoders:
    """CLIP and DINO, ready to turn images and prompts into features, and LPIPS if it is asked for.

    Args:
        clip: a CLIP model, a folder or an id on the hub, with "@" a revision of it: "owner/name@refs/pr/1"; None for
            drift alone, which needs none.
        dino: the same of a self-supervised vision transformer with a class token (DINO, DINOv2, any ViT).
        lpips: weights of torchvision's vgg16 or alexnet for LPIPS, see `Lpips`; None measures none.
        device: where they run.
        batch_size: images or prompts per pass.

    Attributes:
        dino: DINO.
        lpips: LPIPS, or None.

    Raises:
        EvaluationError: a model is not there or cannot be fetched, lacks weights, or is of another kind, or a package
            is missing that LPIPS needs.
    """

    def __init__(
        self,
        clip: str | Path | None = CLIP,
        dino: str | Path = DINO,
        *,
        lpips: str | Path | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise EvaluationError(f"batch_size must be at least 1, not {batch_size}.")
        self.batch_size = batch_size
        # First, since it is the one whose weights or packages are most likely missing.
        self.lpips = None if lpips is None else Lpips(lpips, device, batch_size)
        self._clip = None if clip is None else ClipEncoder(clip, device)
        self.dino = DinoEncoder(dino, device)

    @property
    def clip(self) -> ClipEncoder:
        """CLIP.

        Raises:
            EvaluationError: it was left out.
        """
        if self._clip is None:
            raise EvaluationError("These encoders have no CLIP, so they measure drift alone; give Encoders a clip.")
        return self._clip

    def image_features(self, images: Iterable[Image.Image]) -> tuple[Tensor, Tensor]:
        """CLIP's and DINO's features, (n, width) each, float32. Images may be lazy: they are read batch by batch."""
        pairs = [(self.clip.images(batch), self.dino.images(batch)) for batch in _batches(images, self.batch_size)]
        return _joined([clip for clip, _ in pairs]), _joined([dino for _, dino in pairs])

    def dino_features(self, images: Iterable[Image.Image]) -> Tensor:
        """DINO's features, (n, width), float32."""
        return _joined([self.dino.images(batch) for batch in _batches(images, self.batch_size)])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """CLIP's features of prompts, (n, width), float32. Prompts that are too long are cut off with a warning."""
        self.clip.warn_of_long(texts)
        return _joined([self.clip.texts(batch) for batch in _batches(texts, self.batch_size)])


class ClipEncoder:
    """CLIP's projected features of images and of texts.

    Raises:
        EvaluationError: see `Encoders`.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        self.source = str(source)
        self._model = _model(source, "CLIP", device)
        if not (hasattr(self._model, "get_image_features") and hasattr(self._model, "get_text_features")):
            raise EvaluationError(f"{source} is a {type(self._model).__name__}, not a CLIP model such as {CLIP}.")
        self.revision = _revision(self._model)
        self._processor = _processor(source, "CLIP")
        self._tokenizer = _fetched(source, "CLIP", "tokenizer", AutoTokenizer.from_pretrained)
        self._length = int(self._model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, width) on the CPU."""
        return _pooled(self._model.get_image_features(pixel_values=_pixels(self._processor, images, self._model)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, width) on the CPU."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._model.device)
        return _pooled(
            self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )

    def warn_of_long(self, texts: Iterable[str]) -> None:
        """Log which prompts are longer than the text encoder reads."""
        for text in dict.fromkeys(texts):
            count = len(self._tokenizer(text, verbose=False)["input_ids"])
            if count > self._length:
                _log.warning(
                    "The prompt %r has %d tokens; %s reads %d, so its end does not count in CLIP-T.",
                    text,
                    count,
                    self.source,
                    self._length,
                )


class DinoEncoder:
    """The class token of a vision transformer's last hidden state, after its final norm.

    Raises:
        EvaluationError: see `Encoders`.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        self.source = str(source)
        self._model = _model(source, "DINO", device)
        if not hasattr(getattr(self._model, "embeddings", None), "cls_token"):
            raise EvaluationError(
                f"{source} is a {type(self._model).__name__}, which has no class token; give a model such as {DINO}."
            )
        self.revision = _revision(self._model)
        self._processor = _processor(source, "DINO")

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, width) on the CPU."""
        output = self._model(pixel_values=_pixels(self._processor, images, self._model))
        token: Tensor = output.last_hidden_state[:, 0]
        return token.float().cpu()


def _model(source: str | Path, kind: str, device: torch.device | str) -> Any:
    model, info = _fetched(
        source, kind, "model", AutoModel.from_pretrained, use_safetensors=True, output_loading_info=True
    )
    # DINO's checkpoints have no pooler, and nothing here uses one.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise EvaluationError(
            f"The {kind} model {source} lacks {len(missing)} weights, such as {missing[0]}, "
            "which would be random numbers; its scores would mean nothing."
        )
    return model.eval().to(device, torch.float32)


def _processor(source: str | Path, kind: str) -> Any:
    return _fetched(source, kind, "image processor", AutoImageProcessor.from_pretrained, **_ON_PILLOW)


def _fetched(source: str | Path, kind: str, part: str, load: Callable[..., Loaded], **options: Any) -> Loaded:
    """Call a `from_pretrained`, with an error that says what was wanted."""
    folder = Path(source).expanduser()
    name, _, revision = str(source).partition("@")
    try:
        if folder.is_dir():
            return load(folder, **options)
        return load(name, **options, **({"revision": revision} if revision else {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if folder.is_dir():
            raise EvaluationError(f"The {part} of {kind} in {folder} cannot be loaded: {reason}") from error
        raise EvaluationError(
            f"There is no {part} of {kind} {str(source)!r}: no folder {folder.absolute()}, and neither the Hugging "
            "Face hub (unreachable, or without a model of that name in safetensors) nor its local cache had it. "
            f"Check the spelling and the connection, or give a folder into which save_pretrained wrote {_PARTS[kind]}. "
            f"The hub's client said: {reason}"
        ) from error


def _pixels(processor: Any, images: Sequence[Image.Image], model: Any) -> Tensor:
    pixels: Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return pixels.to(model.device)


def _pooled(output: Any) -> Tensor:
    """The projected features, which transformers 5 wraps and transformers 4 gives as they are."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float().cpu()


def _revision(model: Any) -> str | None:
    """The commit on the hub that a model was read from; None for a folder."""
    found: str | None = getattr(model.config, "_commit_hash", None)
    return found


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _joined(parts: list[Tensor]) -> Tensor:
    if not parts:
        raise EvaluationError("There are no images or prompts to encode.")
    return torch.cat(parts)
