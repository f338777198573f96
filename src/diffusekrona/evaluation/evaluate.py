"""The paper's scores of a subject's images (Appendix C), LPIPS, and PEFT's drift, in memory or from folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..errors import EvaluationError
from ..inputs.images import read_image, upright_rgb
from . import metrics
from .encoders import ClipEncoder, DinoEncoder, Encoders
from .folders import ImageFolders
from .metrics import Score
from .perceptual import Lpips, LpipsOfSubject
from .result import Evaluation, SubjectScores
from .settings import SheetSettings
from .sheet import MOST_SUBJECTS

OnImage = Callable[[int, int], None]
"""Called for each image with the number of images read and of all."""


def evaluate_subject(
    encoders: Encoders,
    real: Iterable[Image.Image],
    generated: Iterable[Image.Image],
    prompts: Sequence[str],
    *,
    name: str = "subject",
    files: Sequence[str] | None = None,
) -> SubjectScores:
    """CLIP-I, CLIP-T and DINO of one subject's images (equations 6 to 8), and LPIPS if the encoders have it.

    Args:
        encoders: CLIP and DINO, and perhaps LPIPS.
        real: photographs of the subject; any mode and size. They may be lazy, so that few are in memory at a time.
        generated: generated images of it, likewise.
        prompts: one for each generated image, which CLIP-T compares with it.
        name: of the subject.
        files: names of the generated images; by default their numbers from 1.

    Returns:
        Cosine similarities, one of each kind per generated image, and mean distances.

    Raises:
        EvaluationError: there are no images on a side, or not as many prompts or names as generated images.
        DatasetError: the pixels of an image cannot be decoded.
    """
    lpips = LpipsOfSubject(encoders.lpips)
    real_clip, real_dino = encoders.image_features(lpips.real(_upright(real)))
    clip, dino = encoders.image_features(lpips.generated(_upright(generated)))
    files = [str(number + 1) for number in range(len(clip))] if files is None else files
    for what, given in (("prompts", prompts), ("names", files)):
        if len(given) != len(clip):
            raise EvaluationError(f"There are {len(clip)} generated images but {len(given)} {what}; give one for each.")
    return SubjectScores(
        name=name,
        real=len(real_clip),
        files=tuple(files),
        prompts=tuple(prompts),
        clip_i=metrics.image_similarity(clip, real_clip),
        clip_t=metrics.text_similarity(clip, encoders.text_features(prompts)),
        dino=metrics.image_similarity(dino, real_dino),
        lpips=lpips.score(),
    )


def measure_drift(encoders: Encoders, adapted: Iterable[Image.Image], base: Iterable[Image.Image]) -> Score:
    """How far an adapter moves images of prompts without its subject; `metrics.drift` has the formula.

    Args:
        encoders: only DINO is used.
        adapted: generated with the adapter.
        base: generated without it, of the same prompts and seeds in the same order.

    Raises:
        EvaluationError: there are no images, or the numbers of the two sides differ.
        DatasetError: the pixels of an image cannot be decoded.
    """
    return metrics.drift(encoders.dino_features(_upright(adapted)), encoders.dino_features(_upright(base)))


def check_asked(images: ImageFolders, lpips: str | Path | None, sheet: SheetSettings | None) -> None:
    """Check that all that is asked for can be made of these images, before any model is loaded.

    Args:
        images: what `find_images` found.
        lpips: as `Encoders` takes it.
        sheet: as `draw_sheet` takes it.

    Raises:
        EvaluationError: something is asked for that would have nothing to show, or the sheet would be too large.
    """
    if not images.subjects and (asked := [name for name, it in (("lpips", lpips), ("sheet", sheet)) if it is not None]):
        raise EvaluationError(
            f"{' and '.join(asked)} would have nothing to do: for drift alone there are no real and generated images. "
            "Give both folders, or leave it out."
        )
    if sheet is not None and sheet.sheet_score == "lpips" and lpips is None:
        raise EvaluationError("sheet_score is lpips, which is not measured; give lpips the weights of its network.")
    if sheet is not None and len(images.subjects) > MOST_SUBJECTS:
        raise EvaluationError(
            f"A sheet has room for {MOST_SUBJECTS} subjects, not for {len(images.subjects)}; evaluate them in parts."
        )


def evaluate_folders(encoders: Encoders, images: ImageFolders, on_image: OnImage | None = None) -> Evaluation:
    """The scores of all subjects, and the drift of all pairs, that `find_images` found.

    Args:
        encoders: CLIP and DINO, and perhaps LPIPS.
        images: what `find_images` found, which has checked all names and prompts.
        on_image: called after each image, for a progress bar.

    Raises:
        DatasetError: an image cannot be read; it is named.
        EvaluationError: there are subjects, but the encoders have no CLIP.
    """
    count = _Counted(len(images), on_image)
    scores = [
        evaluate_subject(
            encoders,
            count(each.real),
            count(each.generated),
            each.prompts,
            name=each.name,
            files=[path.name for path in each.generated],
        )
        for each in images.subjects
    ]
    used: dict[str, ClipEncoder | DinoEncoder | Lpips] = {"clip": encoders.clip} if images.subjects else {}
    used["dino"] = encoders.dino
    if encoders.lpips is not None and images.subjects:
        used["lpips"] = encoders.lpips
    base, adapted = [path for path, _ in images.pairs], [path for _, path in images.pairs]
    return Evaluation(
        models={name: encoder.source for name, encoder in used.items()},
        revisions={name: encoder.revision for name, encoder in used.items()},
        drop_words=images.drop_words,
        subjects=tuple(scores),
        drift=measure_drift(encoders, count(adapted), count(base)) if images.pairs else None,
        drift_files=tuple(path.name for path in base),
        lpips_network=encoders.lpips.network if encoders.lpips is not None and images.subjects else None,
    )


class _Counted:
    """Reads images one by one and says how many were read."""

    def __init__(self, total: int, on_image: OnImage | None) -> None:
        self._done, self._total, self._on_image = 0, total, on_image

    def __call__(self, paths: Iterable[Path]) -> Iterator[Image.Image]:
        for path in paths:
            yield upright_rgb(read_image(path), path)
            self._done += 1
            if self._on_image is not None:
                self._on_image(self._done, self._total)


def _upright(images: Iterable[Image.Image]) -> Iterator[Image.Image]:
    return (upright_rgb(image, f"image {number}") for number, image in enumerate(images, 1))
