"""What our experiments train on FLUX.2 klein 4B, counted on its layers without weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from rich.table import Table

from diffusekrona.bases.architectures import build
from diffusekrona.kron.costs import BALANCE, StepCost, frozen_step, lokr_step, lora_step
from diffusekrona.report import KronAReport, krona_report
from diffusekrona.tuner.config import KronAConfig

from .checkout import EXPERIMENTS, OURS

MODEL = "flux2-klein-4b"
TOKENS = 2 * (1024 + 512)
"""Inputs of a single block in a step: two pictures of 512², and their texts."""


@dataclass(frozen=True)
class Count:
    """One experiment.

    Attributes:
        name: of the experiment, or of a peer's method.
        parameters: that are trained.
        ranks: the lowest and the highest rank that the update of a layer can reach; None for a peer's.
        step: the predicted training step of the adapted layers over the frozen ones', in fp32 on a CPU.
    """

    name: str
    parameters: int
    ranks: tuple[int, int] | None
    step: float


def read_config(name: str) -> KronAConfig:
    """The adapter of one of our experiments."""
    found = PeftConfig.from_pretrained(str(OURS / name))
    assert isinstance(found, KronAConfig)
    return found


def report_of(name: str) -> KronAReport:
    """An experiment's layers."""
    return krona_report(_adapted(read_config(name)))


def count_all() -> list[Count]:
    """Our experiments, and LoRA's and LoKr's of the benchmark."""
    reports = {name: report_of(name) for name in EXPERIMENTS}
    counts = [
        Count(name, one.parameters, _ranks(one), one.predicted_steps(TOKENS)["KronA"]) for name, one in reports.items()
    ]
    sizes = [layer.size for layer in next(iter(reports.values())).layers]
    targets = sorted(read_config(EXPERIMENTS[0]).target_modules or ())
    lora, lokr = LoraConfig(r=32, target_modules=targets), LoKrConfig(r=32, target_modules=targets)
    peers = {
        "lora/flux2-klein-default": (lora, [lora_step(d, h, 32, TOKENS) for d, h in sizes]),
        "lokr/flux2-klein-lr1e-3": (lokr, [lokr_step(d, h, 32, -1, TOKENS) for d, h in sizes]),
    }
    frozen = _time([frozen_step(d, h, TOKENS) for d, h in sizes])
    for name, (config, steps) in peers.items():
        trained, _ = _adapted(config).get_nb_trainable_parameters()
        counts.append(Count(name, trained, None, _time(steps) / frozen))
    return counts


def table(counts: list[Count]) -> Table:
    """For the terminal."""
    found = Table("experiment", box=None, pad_edge=False)
    for header in ("parameters", "highest ranks", "step / frozen, predicted"):
        found.add_column(header, justify="right")
    for one in counts:
        ranks = "–" if one.ranks is None else "{} to {}".format(*one.ranks)
        found.add_row(one.name, f"{one.parameters:,}", ranks, f"{one.step:.2f}")
    return found


def _ranks(report: KronAReport) -> tuple[int, int]:
    ranks = [layer.highest_rank for layer in report.layers]
    return min(ranks), max(ranks)


def _adapted(config: PeftConfig) -> Any:
    with torch.device("meta"), warnings.catch_warnings():
        return get_peft_model(build(MODEL), config)


def _time(costs: list[StepCost]) -> float:
    return sum(cost.time(BALANCE) for cost in costs)
