"""Measuring cells, in one process or in several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from diffusekrona.errors import KronAError

from .cells import Cell
from .measuring import Measurer
from .records import Record, Records
from .settings import StudySettings

_measurer: Measurer | None = None
"""A worker process's own."""


def measure(
    settings: StudySettings,
    cells: Iterable[Cell],
    records: Records,
    workers: int = 1,
    on_record: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure cells, equal ones once; each is kept as soon as it is known.

    Args:
        settings: of all studies.
        cells: in the order of their importance.
        records: where the measurements go.
        workers: processes; each has its share of the CPU's cores. With a GPU, more than one process share it.
        on_record: told how many of the cells are done.

    Raises:
        KronAError: a model could not be trained; all others are measured first. Or a process was killed.
    """
    different = list({cell.key: cell for cell in cells}.values())
    groups = list(_by_model(different))
    done, failed = 0, []
    for outcome in _outcomes(settings, groups, workers):
        if isinstance(outcome, Exception):
            failed.append(outcome)
            continue
        for record in outcome:
            records.add(record)
            done += 1
            on_record(done, len(different))
    if failed:
        raise KronAError(
            f"{len(failed)} of {len(groups)} models could not be measured. The first: {failed[0]}"
        ) from failed[0]


def _by_model(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Cells of one model together, in the order of the first of each."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.model_key, []).append(cell)
    yield from groups.values()


def _outcomes(
    settings: StudySettings, groups: Sequence[list[Cell]], workers: int
) -> Iterator[list[Record] | Exception]:
    if workers == 1 or len(groups) < 2:
        measurer = Measurer(settings)
        for group in groups:
            yield _tried(measurer, group)
        return
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (settings, threads)) as pool:
        waiting: list[Future[Any]] = [pool.submit(_measure_here, group) for group in groups]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as error:
            raise KronAError(
                "A process of the study was killed, perhaps for want of memory. What it was at is not measured; run "
                "the study again, with fewer --workers."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(settings: StudySettings, threads: int) -> None:
    global _measurer
    torch.set_num_threads(threads)
    _measurer = Measurer(settings)


def _measure_here(group: list[Cell]) -> list[Record] | Exception:
    assert _measurer is not None
    return _tried(_measurer, group)


def _tried(measurer: Measurer, group: list[Cell]) -> list[Record] | Exception:
    try:
        return measurer.measure(group)
    except KronAError as error:
        return KronAError(f"{group[0].spec}, {group[0].subject}, seed {group[0].seed}: {error}")
