"""A judge of small pictures: a classifier that tells what is drawn on which background, and how alike pictures are.

The classifier is a transformers `ResNetForImageClassification` whose labels are "concept:…" and "background:…" in
one head. `recipes/base` trains it on the art that the small base model is trained on, apart from that model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import ResNetForImageClassification

from diffusekrona.errors import KronAError

_CONCEPT = "concept:"
_BACKGROUND = "background:"


class Judge:
    """The classifier of `models/emoji-classifier`, ready to judge 64 × 64 pictures.

    Args:
        folder: where its config and weights are.

    Raises:
        KronAError: the folder holds no such classifier.
    """

    def __init__(self, folder: str | Path) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise KronAError(f"{folder} holds no classifier; the repository's is models/emoji-classifier.")
        self._model = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
        labels = [self._model.config.id2label[i] for i in range(self._model.config.num_labels)]
        self.concepts = [label.removeprefix(_CONCEPT) for label in labels if label.startswith(_CONCEPT)]
        self.backgrounds = [label.removeprefix(_BACKGROUND) for label in labels if label.startswith(_BACKGROUND)]
        if labels != [_CONCEPT + name for name in self.concepts] + [_BACKGROUND + name for name in self.backgrounds]:
            raise KronAError(f"{folder} is a classifier with other labels than {_CONCEPT}… and then {_BACKGROUND}….")

    def name_concepts(self, images: Sequence[Image.Image], best: int = 1) -> list[list[str]]:
        """For each picture the `best` likeliest concepts, likeliest first."""
        ranked = self._logits(images)[:, : len(self.concepts)].topk(best).indices
        return [[self.concepts[i] for i in row] for row in ranked.tolist()]

    def name_backgrounds(self, images: Sequence[Image.Image]) -> list[str]:
        """For each picture the likeliest background colour."""
        return [self.backgrounds[i] for i in self._logits(images)[:, len(self.concepts) :].argmax(-1).tolist()]

    def similarity(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
        """Mean cosine similarity of the pictures' features, over every pair of an image and a different reference.

        It is built as CLIP-I and DINO are (Appendix C, equations 6 and 8), with this classifier's features. 1 means
        alike. The ceiling is the score of one subject's pictures among themselves.
        """
        a, b = self._features(images), self._features(references)
        different = torch.tensor([[image is not reference for reference in references] for image in images])
        return float((a @ b.T)[different].mean())

    @torch.no_grad()
    def _logits(self, images: Sequence[Image.Image]) -> Tensor:
        logits: Tensor = self._model(_pixels(images)).logits
        return logits

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        pooled: Tensor = self._model.resnet(_pixels(images)).pooler_output
        return functional.normalize(pooled.flatten(1), dim=-1)


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, 64, 64) in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1
