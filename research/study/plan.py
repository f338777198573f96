"""What a study would measure, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ..methods import method_from
from .cells import BASE
from .records import Records
from .settings import StudySettings
from .study import Study


def outlook(study: Study, settings: StudySettings, folder: Path) -> dict[str, str]:
    """How many models would be trained, for how many steps, and how many pictures be drawn.

    All methods' options, training settings and folders of pictures are checked on the way.

    Raises:
        KronAError: one of them cannot be.
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
