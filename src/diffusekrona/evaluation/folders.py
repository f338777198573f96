"""Which images belong together: folders of one subject or of several, and pairs of the base's and an adapter's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError, EvaluationError
from ..inputs.captions import read_prompts
from ..inputs.images import image_paths, is_image


@dataclass(frozen=True)
class SubjectFolder:
    """The images of one subject.

    Attributes:
        name: of its folder.
        real: the photographs that it was learnt from.
        generated: what was generated of it.
        prompts: one for each generated image.
    """

    name: str
    real: tuple[Path, ...]
    generated: tuple[Path, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class ImageFolders:
    """All that is to be measured; `len` is the number of images to read.

    Attributes:
        subjects: with real and generated images.
        pairs: for drift, the base's image and the adapter's.
        drop_words: what was left out of the prompts.
    """

    subjects: tuple[SubjectFolder, ...]
    pairs: tuple[tuple[Path, Path], ...]
    drop_words: tuple[str, ...]

    def __len__(self) -> int:
        return sum(len(each.real) + len(each.generated) for each in self.subjects) + 2 * len(self.pairs)


def find_images(
    real: str | Path | None = None,
    generated: str | Path | None = None,
    *,
    drop_words: Sequence[str] = (),
    base_images: str | Path | None = None,
    adapted_images: str | Path | None = None,
) -> ImageFolders:
    """The images of folders that are given in pairs: real and generated ones, base's and adapter's ones, or all.

    Nothing is decoded yet, but names and prompts are checked.

    Args:
        real: photographs of one subject, or a subfolder of them per subject.
        generated: generated images and their prompts, likewise.
        drop_words: words to leave out of the prompts, such as the identifier "sks", which CLIP does not know.
        base_images: for drift, the base's images of prompts without the subject.
        adapted_images: the same prompts and seeds with the adapter, by the same file names.

    Raises:
        DatasetError: a folder is missing or empty, or an image has no prompt.
        EvaluationError: one of two folders is missing, or the two do not go together.
    """
    for one, other, names in (
        (real, generated, "real and generated"),
        (base_images, adapted_images, "base and adapted"),
    ):
        if (one is None) != (other is None):
            raise EvaluationError(f"Of the folders of {names} images only one is given; give both.")
    subjects = [] if real is None or generated is None else find_subjects(real, generated, drop_words)
    pairs = [] if base_images is None or adapted_images is None else find_pairs(base_images, adapted_images)
    if not subjects and not pairs:
        raise EvaluationError("There is nothing to measure: give real and generated images, or base and adapted ones.")
    return ImageFolders(tuple(subjects), tuple(pairs), tuple(drop_words))


def find_subjects(real: str | Path, generated: str | Path, drop_words: Sequence[str] = ()) -> list[SubjectFolder]:
    """The subjects of two folders, in the order of their names.

    Either folder holds the images of one subject, or both hold one subfolder per subject with equal names.

    Args:
        real: of photographs.
        generated: of generated images with their prompts, as `diffusekrona.inputs.captions.read_prompts` finds them.
        drop_words: words to leave out of the prompts, such as the identifier "sks", which CLIP does not know.

    Raises:
        DatasetError: a folder is missing or empty, or an image has no prompt.
        EvaluationError: the folders do not hold the same subjects, or a prompt has no other words.
    """
    sides = Path(real).expanduser(), Path(generated).expanduser()
    names = [_subfolders(side) for side in sides]
    if not any(names):
        return [_subject(sides[0].absolute().name, *sides, drop_words)]
    for side, own, other in zip(sides, names, reversed(names), strict=True):
        if not own:
            raise EvaluationError(
                f"{side} has no subfolders to go with the other folder's ({', '.join(other)}). "
                "Give two folders of images of one subject, or two with a subfolder for each subject."
            )
        if lacking := [name for name in other if name not in own]:
            raise EvaluationError(
                f"{side} has no subfolder for: {', '.join(lacking)} (it has {', '.join(own)}). "
                "Name the subfolders of a subject alike on both sides."
            )
    return [_subject(name, sides[0] / name, sides[1] / name, drop_words) for name in names[0]]


def find_pairs(base: str | Path, adapted: str | Path) -> list[tuple[Path, Path]]:
    """The images of two folders that have the same names, in the order of their names.

    Raises:
        DatasetError: a folder is missing or empty.
        EvaluationError: an image is in one of them only.
    """
    found = [{path.name: path for path in image_paths(folder)} for folder in (base, adapted)]
    for folder, own, other in zip((adapted, base), reversed(found), found, strict=True):
        if lacking := [name for name in other if name not in own]:
            raise EvaluationError(
                f"{folder} lacks {len(lacking)} of the other folder's images, such as {lacking[0]}. "
                "Generate both with the same prompts and seeds, and leave the names as they are."
            )
    return [(path, found[1][name]) for name, path in found[0].items()]


def without_words(prompt: str, words: Sequence[str]) -> str:
    """A prompt less these words, in either case, wherever they stand by themselves.

    Raises:
        EvaluationError: nothing is left.
    """
    for word in words:
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", prompt, flags=re.IGNORECASE)
    prompt = " ".join(prompt.split())
    if not prompt:
        raise EvaluationError(
            f"A prompt has no other words than {', '.join(words)}; CLIP-T needs what it says besides."
        )
    return prompt


def _subject(name: str, real: Path, generated: Path, drop_words: Sequence[str]) -> SubjectFolder:
    prompts = read_prompts(generated)
    return SubjectFolder(
        name,
        tuple(image_paths(real)),
        tuple(image_paths(generated)),
        tuple(without_words(prompt, drop_words) for prompt in prompts.values()),
    )


def _subfolders(folder: Path) -> list[str]:
    """The names of a folder's subfolders; none if it holds images itself."""
    if not folder.is_dir():
        raise DatasetError(f"There is no image folder {folder} (looked for {folder.absolute()}).")
    if any(is_image(path) for path in folder.iterdir()):
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
