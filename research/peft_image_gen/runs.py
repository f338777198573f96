"""Runs of the benchmark's own script, and what they wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.table import Table

import diffusekrona
from diffusekrona.errors import KronAError

from .checkout import RESULTS, Benchmark, read_json

WITH_KRONA = Path(__file__).parent / "with_krona.py"
NOT_SAVED = 99_999_999
"""The size that the benchmark writes for an adapter that it could not save."""


@dataclass(frozen=True)
class Result:
    """What the benchmark measured of one experiment.

    Attributes:
        path: the file.
        content: all that it holds.
    """

    path: Path
    content: dict[str, Any]

    @property
    def experiment(self) -> str:
        """The method's folder and the experiment's."""
        return str(self._part("run_info")["experiment_name"])

    @property
    def training(self) -> dict[str, Any]:
        """What was measured while it trained."""
        return self._part("train_info")

    @property
    def accelerator(self) -> str:
        """The device."""
        return str(self._part("meta_info")["system_info"]["accelerator"])

    @property
    def scores(self) -> dict[str, Any]:
        """Of the held-out pictures after the last step; empty if it did not come to that."""
        return next((one for one in self.training["metrics"] if "test dino_similarity" in one), {})

    @property
    def problem(self) -> str | None:
        """Why this is no finished run; None if it is one."""
        if self.training["status"] != "success":
            return f"it is {self.training['status']}: {self._part('run_info')['error_msg'] or 'no reason given'}"
        if self.training["file_size"] == NOT_SAVED:
            return "the adapter could not be saved, see what the benchmark printed"
        return None

    def _part(self, name: str) -> dict[str, Any]:
        part: dict[str, Any] = self.content[name]
        return part


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        code: the script's exit code.
        result: what it wrote; None if it wrote nothing.
    """

    code: int
    result: Result | None

    @property
    def problem(self) -> str | None:
        """Why it is not finished. The benchmark's script ends with 0 also where the training failed."""
        if self.code:
            return f"the benchmark's script ended with exit code {self.code}"
        if self.result is None:
            return f"the benchmark's script wrote nothing into {', '.join(RESULTS)}"
        return self.result.problem

    @property
    def exit_code(self) -> int:
        """The script's; 1 if that is 0 and yet something is wrong."""
        return self.code or int(self.problem is not None)


def run_experiment(
    benchmark: Benchmark,
    experiment: str,
    *,
    starter: Path = WITH_KRONA,
    environment: Mapping[str, str] | None = None,
    output: IO[str] | None = None,
) -> Run:
    """Run the benchmark's script for one experiment, in a process of its own with the checkout's PEFT.

    Args:
        benchmark: where.
        experiment: the method's folder and the experiment's.
        starter: the script that runs it.
        environment: variables beside this process's own.
        output: where to write what it prints; by default it is printed.
    """
    before = _written(benchmark, experiment)
    path = str(Path("experiments", *experiment.split("/")))
    command = [sys.executable, str(starter), "run.py", "-v", path]
    code = call(command, benchmark, environment=environment, output=output)
    new = [path for path, when in _written(benchmark, experiment).items() if before.get(path) != when]
    return Run(code, read_result(new[0]) if new else None)


def call(
    command: list[str],
    benchmark: Benchmark,
    *,
    environment: Mapping[str, str] | None = None,
    output: IO[str] | None = None,
) -> int:
    """Run a program in the benchmark's folder with the checkout's PEFT and with this library; its exit code."""
    ours = Path(diffusekrona.__file__).parents[1]
    paths = [str(benchmark.source), str(ours), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    errors = None if output is None else subprocess.STDOUT
    process = subprocess.Popen(command, cwd=benchmark.folder, env=variables, stdout=output, stderr=errors)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reaches it, too, and it writes down how far it came
        raise


def _written(benchmark: Benchmark, experiment: str) -> dict[Path, int]:
    """An experiment's results, and when each was written."""
    stem = experiment.replace("/", "--")
    folders, names = [benchmark.folder / name for name in RESULTS], (f"{stem}.json", f"{stem}--*.json")
    return {path: path.stat().st_mtime_ns for folder in folders for name in names for path in folder.glob(name)}


def read_result(path: Path) -> Result:
    """A file of results.

    Raises:
        KronAError: it is none that we know.
    """
    result = Result(path, read_json(path))
    try:
        _ = result.experiment, result.problem, result.scores, result.accelerator, table([result])
    except (KeyError, TypeError, ValueError) as error:
        raise KronAError(f"{path} is no result of the benchmark as we know it: {error!r}.") from error
    return result


def table(results: Iterable[Result]) -> Table:
    """The rows of PEFT's comparison. Times and memory compare only on the same device."""
    found = Table("experiment", box=None, pad_edge=False)
    for header in ("parameters", "file, MB", "training, s", "memory, GB", "DINO", "drift"):
        found.add_column(header, justify="right")
    found.add_column("device")
    for one in results:
        training = one.training
        found.add_row(
            one.experiment,
            f"{training['num_trainable_params']:,}",
            f"{training['file_size'] / 1e6:.1f}",
            f"{training['train_time']:.0f}",
            f"{training['accelerator_memory_max'] / 1e9:.2f}",
            *(f"{one.scores[key]:.3f}" if key in one.scores else "–" for key in ("test dino_similarity", "drift")),
            one.accelerator,
        )
    return found
