"""A study from its name to its plan, its measurements and its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffusekrona.errors import KronAError
from diffusekrona.inputs.images import figure_png
from diffusekrona.storage import write_whole

from ..methods import method_from
from .cells import BASE
from .records import Records
from .settings import StudySettings
from .studies import STUDIES
from .study import Study
from .workers import measure

QUICK_STEPS = 3


def chosen_study(name: str, settings: StudySettings, seeds: int | None = None) -> Study:
    """A study as the settings want it.

    Args:
        name: in `STUDIES`.
        settings: may replace the study's own values.
        seeds: so many in place of the study's own.

    Raises:
        KronAError: there is no such study, or it has no such value.
    """
    if name not in STUDIES:
        raise KronAError(f"There is no study {name!r}; there are {', '.join(STUDIES)}, and tables.")
    study = STUDIES[name]().with_values(settings.studies.get(name, {}))
    return study if seeds is None else replace(study, seeds=tuple(range(seeds)))


def quick(settings: StudySettings) -> StudySettings:
    """The same in a few steps with few pictures, to see that all of it runs; its numbers say nothing."""
    return replace(
        settings,
        prompts=settings.prompts[:2],
        other_prompts=settings.other_prompts[:1],
        training={**settings.training, "max_train_steps": QUICK_STEPS},
        inference_steps=1,
    )


def plan_study(study: Study, settings: StudySettings, folder: Path) -> dict[str, str]:
    """How many models a study would train, for how many steps, and how many pictures it would draw.

    Nothing is loaded. All methods' options, training settings and folders of pictures are checked on the way.

    Raises:
        KronAError: one of them cannot be used.
    """
    settings.check_folders()
    records = Records(folder / "records.jsonl", settings.shared())
    cells = study.cells(settings, records)
    missing = [cell for cell in cells if cell not in records]
    steps: dict[str, int] = {}
    for cell in missing:
        if cell.spec.method != BASE:
            method_from(cell.spec.method, **cell.spec.options)
            last = cell.view.step or settings.config(cell.spec.training).max_train_steps
            steps[cell.model_key] = max(last, steps.get(cell.model_key, 0))
    pictures = len(missing) * (len(settings.prompts) + len(settings.other_prompts))
    return {
        "measured already": f"{len(cells) - len(missing)} of {len(cells)}",
        "models to train": f"{len(steps)}",
        "optimizer steps": f"{sum(steps.values()):,}",
        "pictures to draw": f"{pictures:,}",
        "then": study.afterwards,
    }


def run_study(
    study: Study,
    settings: StudySettings,
    folder: Path,
    *,
    workers: int = 1,
    on_record: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Measure what is missing and write the study's page and figures.

    Args:
        study: what to compare.
        settings: on what.
        folder: of `records.jsonl`, which all studies of these settings share, and of the pages.
        workers: processes.
        on_record: told how many of the missing measurements are done.

    Returns:
        The page.

    Raises:
        KronAError: something could not be measured; what could is in the folder.
    """
    records = Records(folder / "records.jsonl", settings.shared())
    while missing := [cell for cell in study.cells(settings, records) if cell not in records]:
        measure(settings, missing, records, workers, on_record)
    return write_page(study, settings, records, folder)


def write_page(study: Study, settings: StudySettings, records: Records, folder: Path) -> Path:
    """The page and figures of what has been measured so far.

    Galleries of an earlier page stay where the pictures, which are not committed, are not there to draw them from.
    """
    page = study.page(study.results(settings, records))
    earlier = sorted(file.stem for file in folder.glob(f"{study.name}-*.png"))
    subjects = study.subjects_in(settings)
    lines = [
        f"# {study.name}",
        "",
        f"The paper: {study.question}",
        "",
        f"On {settings.base}: {len(subjects)} subjects ({', '.join(subjects)}), seeds "
        f"{', '.join(map(str, study.seeds))}, {settings.config({}).max_train_steps} steps of "
        f"{settings.config({}).train_batch_size}, {len(settings.prompts)} prompts, unless said otherwise. Means, and "
        "in brackets 95% intervals over subjects and seeds. The quality is the harmonic mean of fidelity (DINO) and of "
        "the share that is as asked (CLIP-T where that is not known).",
        "",
        page.text,
        "",
        *(f"![{name}]({name}.png)\n" for name in dict.fromkeys([*page.figures, *earlier])),
    ]
    path = folder / f"{study.name}.md"
    files = {folder / f"{name}.png": figure_png(figure) for name, figure in page.figures.items()}
    write_whole({path: "\n".join(lines).encode(), **files})
    return path
