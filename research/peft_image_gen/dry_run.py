"""The benchmark's own code on a tiny base: does every experiment train, save and load? Its numbers say nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from diffusekrona.errors import KronAError

from .checkout import CONFIG, EXPERIMENTS, METHOD, PARAMS, Benchmark, put_experiments, read_json
from .needs import check_programs
from .runs import WITH_KRONA, Run, call, run_experiment
from .tiny_base import write_all

ON_CPU, RELOADED = (Path(__file__).parent / name for name in ("on_cpu.py", "reloaded.py"))
STEPS = 4


@dataclass(frozen=True)
class Tried:
    """What came of one experiment.

    Attributes:
        experiment: the method's folder and the experiment's.
        run: of the benchmark's script.
        log: what it printed.
        loaded: what `reloaded.py` says of its file; empty if there is none.
    """

    experiment: str
    run: Run
    log: Path
    loaded: dict[str, float]

    @property
    def problem(self) -> str | None:
        """What is not as it should be."""
        if found := self.run.problem:
            return f"{found}. {self.log} has what it printed, which ends with:\n{_end(self.log)}"
        if not self.loaded:
            return f"it saved no adapter that can be loaded; {self.log} has what it printed:\n{_end(self.log)}"
        if self.loaded["same"] != self.loaded["saved"]:
            return f"of {self.loaded['saved']:.0f} saved tensors only {self.loaded['same']:.0f} load as they were"
        if not self.loaded["change"] > 0:
            return "the loaded adapter changes nothing"
        return None


def dry_run(benchmark: Benchmark, folder: Path, peers: Sequence[str], steps: int = STEPS) -> Iterator[Tried]:
    """Run our experiments and the benchmark's `peers` in a copy of its folder, one after the other.

    Args:
        benchmark: of which nothing is changed.
        folder: for the copy and all that is written.
        peers: experiments of the benchmark.
        steps: of each training.

    Raises:
        KronAError: a package is missing, Python is too old, or the benchmark has not these peers.
    """
    check_programs(benchmark)
    for peer in peers:
        if not (benchmark.folder / "experiments" / peer / CONFIG).is_file():
            raise KronAError(f"The benchmark has no experiment {peer} any more; it has {_experiments(benchmark)}.")
    copy = replace(benchmark, folder=folder / "image-gen")
    shutil.copytree(benchmark.folder, copy.folder)
    put_experiments(copy, EXPERIMENTS)
    short = write_all(folder, steps)
    for experiment in (*(f"{METHOD}/{name}" for name in EXPERIMENTS), *peers):
        yield _try(copy, experiment, folder, short)


def _try(copy: Benchmark, experiment: str, folder: Path, short: dict[str, Any]) -> Tried:
    """Train one experiment, its own learning rate and all but what makes it short, and load what it saved."""
    own = copy.folder / "experiments" / experiment / PARAMS
    own.write_text(json.dumps((read_json(own) if own.is_file() else {}) | short), encoding="utf-8")
    name = experiment.replace("/", "--")
    saved, log = folder / "saved" / name, folder / f"{name}.txt"
    saved.mkdir(parents=True)
    environment = {"TMPDIR": str(saved), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as output:
        run = run_experiment(copy, experiment, starter=ON_CPU, environment=environment, output=output)
    files = sorted(saved.glob("*/adapter_model.safetensors"))
    loaded = _load(copy, folder, files[0].parent, log) if files else {}
    return Tried(experiment, run, log, loaded)


def _load(copy: Benchmark, folder: Path, checkpoint: Path, log: Path) -> dict[str, float]:
    told = folder / f"{log.stem}.loaded.txt"
    command = [sys.executable, str(WITH_KRONA), str(RELOADED), str(folder / "base"), str(checkpoint)]
    with told.open("w", encoding="utf-8") as output:
        code = call(command, copy, output=output)
    lines = told.read_text(encoding="utf-8").splitlines()
    if code:
        with log.open("a", encoding="utf-8") as output:
            output.write("\n".join(lines))
        return {}
    found: dict[str, float] = json.loads(lines[-1])
    return found


def table(tried: Sequence[Tried]) -> Table:
    """For the terminal."""
    found = Table("experiment", box=None, pad_edge=False)
    for header in ("parameters", "file, bytes", "loss", "DINO", "drift", "tensors loaded", "change"):
        found.add_column(header, justify="right")
    for one in tried:
        result = one.run.result
        if result is None:
            found.add_row(one.experiment, *["–"] * 7)
            continue
        training, scores = result.training, result.scores
        found.add_row(
            one.experiment,
            f"{training['num_trainable_params']:,}",
            f"{training['file_size']:,}",
            f"{training['metrics'][-1]['train loss']:.3f}" if training["metrics"] else "–",
            f"{scores['test dino_similarity']:.3f}" if scores else "–",
            f"{scores['drift']:.1e}" if scores else "–",
            f"{one.loaded['same']:.0f} of {one.loaded['saved']:.0f}" if one.loaded else "no",
            f"{one.loaded['change']:.1e}" if one.loaded else "–",
        )
    return found


def _end(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])


def _experiments(benchmark: Benchmark) -> str:
    root = benchmark.folder / "experiments"
    return ", ".join(sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in root.glob(f"*/*/{CONFIG}")))
