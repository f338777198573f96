"""Where a run's files go: the adapter and its copies, the adapters of saved steps, and what may be replaced."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, KronAError
from ..pipeline import save_krona
from ..storage import write_whole
from ..tuner.names import DENOISERS, TEXT_ENCODERS
from .checkpoints import Checkpoints
from .settings import OutputSettings, Settings

_WRITTEN = "written.json"
"""File of a run's folder that lists what the run wrote beside it."""


class Output:
    """The places of a run's files.

    Args:
        settings: of the run.
        adapter_name: of the adapter in the pipeline; may be left out where there is just one.
    """

    def __init__(self, settings: Settings, adapter_name: str | None = None) -> None:
        self._settings: OutputSettings = settings.output
        self.adapter_name = adapter_name
        self.path = self._settings.output_dir
        self.folder = self._settings.run_folder
        self.is_single = self.path.suffix == ".safetensors"
        self.checkpoints = Checkpoints(self.folder / "checkpoints", settings.training.checkpoints_total_limit)

    @property
    def whole(self) -> Path:
        """The adapter as a single file."""
        return self.path if self.is_single else self.path / f"{self.path.resolve().name}.safetensors"

    @property
    def copy(self) -> Path | None:
        """The adapter for other programs."""
        also = self._settings.also
        return None if also is None else self.whole.with_name(f"{self.whole.stem}-{also}.safetensors")

    @property
    def card(self) -> Path | None:
        """The model card of a folder."""
        return None if self.is_single else self.path / "README.md"

    @property
    def page(self) -> Path:
        """The run's report."""
        return self.folder / "report.html"

    def step_file(self, step: int) -> Path:
        """The adapter as it was after a step."""
        return self.folder / "steps" / f"{self.whole.stem}-step{step:08d}.safetensors"

    @property
    def step_files(self) -> list[Path]:
        """The adapters of saved steps, in their order."""
        return sorted((self.folder / "steps").glob("*-step*.safetensors"))

    def make_room(self) -> None:
        """Fail before the training, not after it, where the adapter could not be saved or would replace something.

        Raises:
            KronAError: the place cannot be written to, or holds files that no run of ours wrote.
            CheckpointError: an earlier run is there, and it is neither resumed nor overwritten; or there is none to
                resume.
        """
        if self.is_single and self.path.is_dir():
            raise KronAError(f"output_dir {self.path} is a folder; a file that ends in .safetensors was expected.")
        if not self.is_single and self.path.is_file():
            raise KronAError(f"output_dir {self.path} is a file; give a folder, or a file that ends in .safetensors.")
        try:
            (self.path.parent if self.is_single else self.path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KronAError(f"output_dir {self.path} cannot be made: {error}. Choose another place.") from error
        if self._settings.overwrite:
            for file in self.step_files:  # which would be taken for this run's
                file.unlink(missing_ok=True)
            return
        if not self._settings.resume:
            self.checkpoints.check_free()
        elif self.checkpoints.newest() is None:
            raise CheckpointError(
                f"There is nothing to resume: {self.checkpoints.folder} has no checkpoint. "
                "Check output_dir, or begin anew without resume."
            )
        foreign = [path for path in self._targets() if path.exists() and path.name not in self._written()]
        if foreign:
            raise KronAError(
                f"{foreign[0]} is there already, and no run of this folder wrote it. "
                "Choose another output_dir, or let it be replaced: overwrite."
            )

    def save(self, pipe: Any, facts: dict[str, str]) -> list[Path]:
        """Save the adapter and its copies; the places, the first of which is `output_dir`."""
        saved = [save_krona(pipe, path, self.adapter_name) for path in dict.fromkeys([self.path, self.whole])]
        if self.copy is not None and self._settings.also is not None:
            saved.append(save_krona(pipe, self.copy, self.adapter_name, format=self._settings.also, metadata=facts))
        self._note_written()
        return saved

    def save_step(self, pipe: Any, step: int) -> Path:
        """Save the adapter as it is after a step."""
        file = self.step_file(step)
        file.parent.mkdir(parents=True, exist_ok=True)
        return save_krona(pipe, file, self.adapter_name)

    @property
    def is_complete(self) -> bool:
        """Whether a run has left all here: the adapter, its copy, and the report, which comes last."""
        files = [self.whole, *([] if self.copy is None else [self.copy])]
        return self.page.exists() and all(file.exists() and file.name in self._written() for file in files)

    def write(self, texts: dict[Path, str]) -> None:
        """Write text files beside the adapter or into the run's folder."""
        write_whole({path: text.encode() for path, text in texts.items()})
        self._note_written()

    def _targets(self) -> Iterable[Path]:
        """All that is written beside the run's folder."""
        files = [self.whole, self.copy, self.card]
        yield from (file for file in files if file is not None)
        if not self.is_single:
            yield self.path / "adapter_config.json"
            yield self.path / "adapter_model.safetensors"
            yield from (self.path / part for part in (*DENOISERS, *TEXT_ENCODERS))

    def _written(self) -> set[str]:
        try:
            names: list[str] = json.loads((self.folder / _WRITTEN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return set()
        return set(names)

    def _note_written(self) -> None:
        names = self._written() | {path.name for path in self._targets() if path.exists()}
        write_whole({self.folder / _WRITTEN: json.dumps(sorted(names)).encode()})
