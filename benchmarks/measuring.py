"""Timing methods in turns, and counting the bytes that a step keeps and needs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .methods import Method


@dataclass(frozen=True)
class Shape:
    """One kind of attention projection: so many layers of d × h that each see `tokens` inputs."""

    name: str
    tokens: int
    h: int
    d: int
    layers: int


class Step:
    """Forward and backward of one layer. The input asks for a gradient, as inside a network.

    Args:
        layer: a base layer under one method.
        x: the input.
        output_gradient: of the layer's output.
        frozen: weights that are not the layer's parameters, but are there all the same.
        half: whether bfloat16 is computed in, by autocast.
    """

    def __init__(
        self, layer: nn.Module, x: Tensor, output_gradient: Tensor, frozen: Sequence[Tensor] = (), half: bool = False
    ) -> None:
        self.layer, self.output_gradient, self.frozen, self.half = layer, output_gradient, frozen, half
        self.x = x.detach().requires_grad_()

    def __call__(self) -> None:
        self._clear()
        self._forward().backward(self.output_gradient)

    def _forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            return self.layer(self.x)

    def _clear(self) -> None:
        for tensor in (self.x, *self.layer.parameters()):
            tensor.grad = None

    def saved_bytes(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, parameters left out."""
        own = {
            part.untyped_storage().data_ptr()
            for whole in (*self.frozen, *self.layer.parameters())
            for part in parts_of(whole)
        }
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            for part in parts_of(tensor):
                storage = part.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = self._forward()
        del y
        return sum(kept.values())

    def peak_bytes(self) -> int:
        """The most that is allocated at once during the step, beyond parameters, input and output gradient."""
        self()
        self._clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self._forward().backward(self.output_gradient)
        return most_allocated(profiler)


def most_allocated(profiler: profile) -> int:
    """The most bytes that were allocated at once while a profiler with `profile_memory` was on, over those before."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of: itself, or what a quantized one holds."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def steps(methods: Mapping[str, Method], shape: Shape) -> dict[str, Step]:
    """A step for each method on one shape, all with the same weight and input."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape.d, shape.h) / shape.h**0.5, requires_grad=False)
    x, output_gradient = torch.randn(1, shape.tokens, shape.h), torch.randn(1, shape.tokens, shape.d)
    found = {}
    for name, method in methods.items():
        base = nn.Linear(shape.h, shape.d, bias=False, device="meta")
        base.weight = weight
        found[name] = Step(method(base), x, output_gradient, [weight])
    return found


def timed_in_turns(
    actions: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each action in each round; within a round they run once each, in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    order, shuffle = list(actions), random.Random(0)
    for action in actions.values():  # what the first call sets up does not count
        action()
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            began = clock()
            actions[name]()
            seconds[name].append(clock() - began)
    return seconds


def median_ratio(seconds: list[float], floor: list[float]) -> float:
    """Median over the rounds of one action's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, floor, strict=True))
