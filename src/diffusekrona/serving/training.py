"""Many subjects trained by the workers of a Ray cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from ..errors import KronAError, TrainingInterrupted
from ..training.many import Ended, check_all, train_many
from ..training.output import Output
from ..training.subjects import Subject
from .cluster import connected

RETRIES = 3
"""How often a worker's subjects are begun again, from their checkpoints, where the worker dies."""


def train_over_ray(
    subjects: Sequence[Subject], address: str, at_once: int = 4, on_end: Callable[[Ended], None] | None = None
) -> list[Ended]:
    """`train_many` by the workers of a cluster, `at_once` subjects in each of their tasks.

    Where a worker dies, another goes on from its checkpoints. A worker has a GPU if the cluster has any, and one core
    otherwise. Every worker finds the base, the pictures and the output by the same paths.

    Args:
        subjects: with their settings.
        address: of the cluster, or "local" for a cluster of this machine, which ends with the training.
        at_once: how many subjects share a batch.
        on_end: called when a subject ends.

    Raises:
        KronAError: as `train_many`; Ray is missing, or the cluster cannot be reached.
        TrainingInterrupted: the user stopped it; each subject's last checkpoint is there.
    """
    check_all(subjects, at_once)
    earlier = {one.name for one in subjects if one.settings.output.resume and Output(one.settings).is_complete}
    tasks = [_resumable(part) for part in _parts(subjects, at_once)]
    ended: list[Ended] = []
    with connected(address) as ray:
        resources = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
        work = ray.remote(max_retries=RETRIES, **resources)(train_many)
        pending = {work.remote(part, at_once): part for part in tasks}
        try:
            while pending:
                (ready, *_), _ = ray.wait(list(pending))
                for one in _result(ray, ready, pending.pop(ready)):
                    if one.state == "earlier" and one.name not in earlier:  # by a worker that died after it
                        one = replace(one, state="trained")
                    ended.append(one)
                    if on_end is not None:
                        on_end(one)
        except KeyboardInterrupt as interrupt:
            for reference in pending:
                ray.cancel(reference, force=True)
            raise TrainingInterrupted(0, None) from interrupt
    return sorted(ended, key=lambda one: one.name)


def _parts(subjects: Sequence[Subject], size: int) -> Iterator[list[Subject]]:
    rest = iter(subjects)
    while part := list(islice(rest, size)):
        yield part


def _resumable(subjects: Sequence[Subject]) -> list[Subject]:
    """Subjects whose checkpoints, where there are any by then, are this training's own."""
    for subject in subjects:
        if subject.settings.output.overwrite:
            shutil.rmtree(Output(subject.settings).folder, ignore_errors=True)
    return [
        replace(one, settings=one.settings.replace(output=one.settings.output.replace(resume=True))) for one in subjects
    ]


def _result(ray: Any, reference: Any, subjects: Sequence[Subject]) -> list[Ended]:
    """What became of a task's subjects; all that it did not finish are set aside where it failed."""
    try:
        ended: list[Ended] = ray.get(reference)
        return ended
    except (KronAError, ray.exceptions.RayError) as error:
        reason = f"Its worker failed: {str(error).strip().splitlines()[-1]}"
        return [_unfinished(subject, reason) for subject in subjects]


def _unfinished(subject: Subject, reason: str) -> Ended:
    output = Output(subject.settings)
    if output.is_complete:
        return Ended(subject.name, "trained", path=str(output.path))
    return Ended(subject.name, "set aside", reason)
