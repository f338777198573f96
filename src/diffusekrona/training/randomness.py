"""What is random in a run, as a function of the seed and of what it is for: there is no random state to keep."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch


def seed_for(seed: int, *purpose: int | str) -> int:
    """A seed of its own for each purpose, which tells nothing of those for others."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest(), "little")


def generator_for(seed: int, *purpose: int | str) -> torch.Generator:
    """A generator on the CPU, so that its numbers are the same on every device."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


@dataclass(frozen=True)
class Sample:
    """One image of one batch.

    Attributes:
        index: of the image.
        place: among all of the run's samples, which decides its noise.
    """

    index: int
    place: tuple[int | str, ...]


class Order:
    """Endless batches in random order, in which all images are used equally often.

    A batch's images are of one kind, such as a size; kinds take turns as often as they have images. What is in a batch
    depends on its number, so any number of processes can share it.

    Args:
        kinds: of each image.
        batch_size: images in a batch, of all processes together; may exceed the number of images.
        seed: decides the order.
        name: tells one order of a run from another.
    """

    def __init__(self, kinds: Sequence[Hashable], batch_size: int, seed: int, name: str) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(index)
        self._groups = list(groups.values())
        self._batch_size, self._seed, self._name = batch_size, seed, name
        self._turns: list[tuple[int, int]] = []
        self._turn = self._take_turns(len(kinds))
        self._passes: dict[int, tuple[int, list[int]]] = {}

    def batch(self, number: int) -> list[Sample]:
        """The images of a batch, numbered from 0."""
        while len(self._turns) <= number:
            self._turns.append(next(self._turn))
        group, batch = self._turns[number]
        first = batch * self._batch_size
        return [self._sample(group, position) for position in range(first, first + self._batch_size)]

    def _take_turns(self, images: int) -> Iterator[tuple[int, int]]:
        """(group, how many batches it had before) of each batch."""
        had = [0] * len(self._groups)
        number = 0
        while True:
            number += 1
            due = [len(group) * number / images - done for group, done in zip(self._groups, had, strict=True)]
            group = due.index(max(due))
            yield group, had[group]
            had[group] += 1

    def _sample(self, group: int, position: int) -> Sample:
        members = self._groups[group]
        done, rank = divmod(position, len(members))
        if self._passes.get(group, (None,))[0] != done:
            generator = generator_for(self._seed, self._name, group, done)
            self._passes[group] = done, torch.randperm(len(members), generator=generator).tolist()
        return Sample(members[self._passes[group][1][rank]], (self._name, group, position))
