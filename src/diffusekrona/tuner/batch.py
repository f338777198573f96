"""Which adapter each sample of a batch has, and which rows of a layer's input are a sample's.

A pipeline calls its models with more rows than there are prompts: several images of each prompt follow each other, and
for guidance the whole batch comes again, as often as it has passes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BatchError

MOST_PASSES = 4
"""How often a pipeline at most repeats a batch, for guidance by several predictions at once."""


class Span(NamedTuple):
    """Rows of a layer's input that follow each other and have one adapter.

    Attributes:
        start: first row.
        stop: the one after the last.
        name: the adapter; None for the base alone.
    """

    start: int
    stop: int
    name: str | None


@dataclass(eq=False)
class Batch:
    """The adapters of a batch's samples, for the layers of one model.

    Attributes:
        names: the adapter of each sample, None for the base alone.
        images: how many images the samples are drawn as, a multiple of theirs; None where that is not known.
        of_pipeline: whether a pipeline calls the model, which may draw several images of a sample.
        of_texts: whether the model has a row for each prompt, however many images are drawn.
    """

    names: Sequence[str | None]
    images: int | None = None
    of_pipeline: bool = False
    of_texts: bool = False

    def spans(self, rows: int, known: Container[str]) -> list[Span]:
        """The rows of a layer's input by adapter.

        Args:
            rows: how many there are.
            known: the adapters that the layer has; others change nothing there.

        Raises:
            BatchError: the samples are not so many, nor a multiple of so many as guidance and several images make.
        """
        names = [name if name in known else None for name in self.names]
        if not any(names):
            return [Span(0, rows, None)]
        images = self._images(rows)
        each = [name for name in names for _ in range(images // len(names))]
        found, start = [], 0
        for name, alike in groupby(each * (rows // images)):
            stop = start + len(list(alike))
            found.append(Span(start, stop, name))
            start = stop
        return found

    def repeated(self, per_sample: Tensor, rows: int) -> Tensor:
        """What each sample has, (samples, ...), for each row of a layer's input.

        Raises:
            BatchError: as `spans`.
        """
        images = self._images(rows)
        each = per_sample.repeat_interleave(images // len(self.names), 0)
        return torch.cat([each] * (rows // images))

    def _images(self, rows: int) -> int:
        """How many rows one pass of the batch has."""
        samples = len(self.names)
        images = samples if self.images is None or self.of_texts else self.images
        if images % samples:
            raise BatchError(
                f"{samples} adapters are given for {images} images: give one for each prompt, or for each image."
            )
        if rows % images or rows // images > MOST_PASSES:
            raise BatchError(
                f"{samples} adapters are given, one for each sample, but a layer's input has {rows} rows for {images} "
                f"{'prompts' if self.of_texts else 'images'}."
                + (" Give as many prompts as adapters, which change the text encoder, too." if self.of_texts else "")
            )
        if self.of_pipeline and self.images is None and not self.of_texts and rows != samples:
            raise BatchError(
                f"{samples} adapters are given, but the model is called with {rows} rows, and this pipeline does not "
                "tell how many are images of one prompt: give an adapter for each row."
            )
        return images
