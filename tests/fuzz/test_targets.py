"""The fuzzed readers, on valid files and on some hundred damaged ones; `make fuzz` goes on from there."""

import random

import pytest
import torch

from tests.fuzz.files import mutated
from tests.fuzz.targets import TARGETS, run
from tests.tensors import LargestTensor

MUTATIONS = 150


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_in_a_file_gives_an_adapter_or_one_of_our_errors(name: str) -> None:
    target, rng = TARGETS[name], random.Random(0)
    torch.manual_seed(0)
    seeds = list(target.seeds())
    for seed in seeds:
        run(target, seed)
    content = rng.choice(seeds)
    for _ in range(MUTATIONS):
        content = mutated(content if rng.random() < 0.7 else rng.choice(seeds), seeds, rng)
        with LargestTensor() as made:
            run(target, content)
        assert made.elements <= 1_000_000 + 1000 * len(content)
