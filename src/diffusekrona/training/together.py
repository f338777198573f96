"""Several adapters trained on one base, whose images share its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..pipeline import InjectedAdapter
from ..tuner.batch import Batch
from ..tuner.compat import only_active
from ..tuner.injected import adapters_by_sample, krona_layers
from .batches import Asked
from .families import Family
from .run_state import LossPart, RunState


class Member(NamedTuple):
    """An adapter in training beside others.

    Attributes:
        krona: the adapter in the pipeline.
        state: of its run.
        accelerator: its own, since fp16's scale is an adapter's own.
    """

    krona: InjectedAdapter
    state: RunState
    accelerator: Accelerator

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let the pipeline have this adapter, and no other, for a while."""
        with active_alone(self.krona.components, [self.krona.name]):
            yield


@contextmanager
def active_alone(components: dict[str, Any], adapter_names: list[str]) -> Iterator[None]:
    """Let the models of a pipeline have these adapters, and no others, for a while."""
    layers = [layer for component in components.values() for layer in krona_layers(component).values()]
    with only_active(layers, adapter_names):
        yield


class _Question(NamedTuple):
    """What the denoiser is asked for a member's part of the loss."""

    member: Member
    part: LossPart
    asked: Asked
    text: dict[str, Tensor]
    share: float


class Together:
    """Computes gradients of several members' losses, in one pass of the base for all images of a size.

    Those of each are what they are when it is trained alone, to rounding: its images, noise, levels and prompts are its
    own, and no sample of a batch knows of another.

    Args:
        family: of the pipeline.
        accelerator: the device.
    """

    def __init__(self, family: Family, accelerator: Accelerator) -> None:
        self._family, self._accelerator = family, accelerator

    def gradients(self, members: Sequence[Member]) -> list[float]:
        """Add up the gradients of each member's loss over its next step's batches; the losses."""
        totals = {member.krona.name: 0.0 for member in members}
        for questions in _rounds(members):
            for alike in _by_shape(questions):
                for one, loss in zip(alike, self._backward(alike), strict=True):
                    totals[one.member.krona.name] += loss
        return [totals[member.krona.name] for member in members]

    def _backward(self, questions: Sequence[_Question]) -> list[float]:
        """Gradients of questions whose latents have one shape; their shares of their members' losses."""
        targets = self._targets(questions)
        names = [one.member.krona.name for one in questions for _ in one.asked.wordings]
        # With gradient checkpointing, the backward pass calls the layers again.
        with adapters_by_sample(self._family.denoiser, Batch(names)):
            answers = self._answers(questions)
            losses = [
                one.part.batches.loss_of(one.asked, answer, target) * one.share
                for one, answer, target in zip(questions, answers, targets, strict=True)
            ]
            scaled = [_scaled(loss, one.member.accelerator) for loss, one in zip(losses, questions, strict=True)]
            torch.stack(scaled).sum().backward()
        return [float(loss.detach()) for loss in losses]

    def _targets(self, questions: Sequence[_Question]) -> list[Tensor]:
        """What each prediction should be; where a prompt is to be kept, what the base says."""
        kept = [one for one in questions if one.part.prompt is not None]
        if not kept:
            return [one.part.batches.target(one.asked) for one in questions]
        with torch.no_grad(), active_alone({"": self._family.denoiser}, []):
            of_base = iter(self._answers([one._replace(text=_base_text(one)) for one in kept]))
        return [
            next(of_base) if one.part.prompt is not None else one.part.batches.target(one.asked) for one in questions
        ]

    def _answers(self, questions: Sequence[_Question]) -> list[Tensor]:
        """The denoiser's predictions for each."""
        asked = [one.asked for one in questions]
        noisy, timesteps, sizes = (
            torch.cat([getattr(one, name) for one in asked]) for name in ("noisy", "timesteps", "sizes")
        )
        with self._accelerator.autocast():
            answer = self._family.predict(noisy, timesteps, _joined([one.text for one in questions]), sizes)
        return list(answer.split([len(one.noisy) for one in asked]))


def _rounds(members: Sequence[Member]) -> Iterator[list[_Question]]:
    """What is asked at the same place of each member's step."""
    queues = [list(_places(member)) for member in members]
    for place in range(max(len(queue) for queue in queues)):
        yield [_question(*queue[place]) for queue in queues if place < len(queue)]


def _places(member: Member) -> Iterator[tuple[Member, LossPart, int]]:
    for number in member.state.numbers:
        for part in member.state.parts:
            yield member, part, number


def _question(member: Member, part: LossPart, number: int) -> _Question:
    asked = part.batches.asked(number, part.prompt)
    with member.alone(), member.accelerator.autocast():
        text = part.batches.texts(asked.wordings)
    return _Question(member, part, asked, text, part.weight / member.state.config.gradient_accumulation_steps)


def _base_text(one: _Question) -> dict[str, Tensor]:
    """What the base's own text encoders say of the prompt that is to be kept."""
    with active_alone(one.member.krona.components, []), one.member.accelerator.autocast():
        return one.part.batches.texts(one.asked.wordings)


def _by_shape(questions: Sequence[_Question]) -> Iterator[list[_Question]]:
    def shape(one: _Question) -> tuple[int, ...]:
        return tuple(one.asked.noisy.shape[1:])

    for _, alike in groupby(sorted(questions, key=shape), shape):
        yield list(alike)


def _scaled(loss: Tensor, accelerator: Accelerator) -> Tensor:
    return loss if accelerator.scaler is None else accelerator.scaler.scale(loss)


def _joined(texts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Encoded prompts one after the other, those that are shorter with zeros at their end."""
    return {name: torch.cat(_evened([text[name] for text in texts])) for name in texts[0]}


def _evened(tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].dim() < 2:
        return tensors
    longest = max(tensor.shape[1] for tensor in tensors)
    return [torch.cat([one, one.new_zeros(len(one), longest - one.shape[1], *one.shape[2:])], 1) for one in tensors]
