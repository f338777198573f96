"""The paper's scores (Appendix C, equations 6 to 8) and PEFT's drift, from features: tensors in, numbers out.

Similarities are computed pair by pair in float64 and their sums are rounded once, so that no order of the images
changes a bit of a mean or a spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from statistics import fmean, pstdev

from torch import Tensor

from ..errors import EvaluationError


@dataclass(frozen=True)
class Score:
    """One number per image, with their mean and spread.

    Attributes:
        values: in the order of the images.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the values. For CLIP-I and DINO it is the mean over all pairs, as in equations 6 and 8."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation of the values, divided by their number (not one less): 0 for one image."""
        return pstdev(self.values)


def image_similarity(generated: Tensor, real: Tensor) -> Score:
    """CLIP-I (equation 6) and DINO (equation 8): cosine similarity over all pairs of a generated and a real image.

    Args:
        generated: features, (m, width).
        real: features, (n, width).

    Returns:
        For each generated image, the mean similarity to the real ones, from -1 to 1.

    Raises:
        EvaluationError: there are no images, the widths differ, or features are zero or not finite.
    """
    a, b = _units(generated), _units(real)
    _check_width(a, b)
    columns = [(a * row).sum(-1).tolist() for row in b]
    return Score(tuple(fsum(pairs) / len(pairs) for pairs in zip(*columns, strict=True)))


def text_similarity(generated: Tensor, prompts: Tensor) -> Score:
    """CLIP-T (equation 7): cosine similarity of each generated image to its own prompt.

    Args:
        generated: image features, (m, width).
        prompts: text features, (m, width), in the same order.

    Raises:
        EvaluationError: as for `image_similarity`, or the numbers differ.
    """
    return Score(tuple(_row_by_row(generated, prompts).tolist()))


def drift(adapted: Tensor, base: Tensor) -> Score:
    """How far an adapter moves images that do not show its subject: (1 - cosine similarity) / 2, from 0 to 1.

    The definition is that of PEFT's benchmark (`measure_drift` in `method_comparison/image-gen/run.py`): class tokens
    of DINO, each image of the adapted model beside the base's of the same prompt and seed.

    Args:
        adapted: features, (m, width).
        base: features, (m, width), in the same order.

    Raises:
        EvaluationError: as for `text_similarity`.
    """
    return Score(tuple(((1 - _row_by_row(adapted, base)) / 2).tolist()))


def _row_by_row(a: Tensor, b: Tensor) -> Tensor:
    a, b = _units(a), _units(b)
    _check_width(a, b)
    if len(a) != len(b):
        raise EvaluationError(f"There are {len(a)} images on one side and {len(b)} on the other; they go in pairs.")
    return (a * b).sum(-1)


def _units(features: Tensor) -> Tensor:
    """Rows of length 1, in float64."""
    if features.ndim != 2 or not len(features):
        raise EvaluationError(f"Features must be (images, width) of at least one image, not {tuple(features.shape)}.")
    features = features.detach().cpu().double().contiguous()
    lengths = features.square().sum(-1, keepdim=True).sqrt()
    bad = (~(lengths.isfinite() & (lengths > 0))).flatten().nonzero().flatten().tolist()
    if bad:
        raise EvaluationError(f"The features of image {bad[0] + 1} of {len(features)} are zero or not finite.")
    return features / lengths


def _check_width(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise EvaluationError(f"Features are {a.shape[1]} and {b.shape[1]} wide; one encoder must make both.")
