"""Would Q, K and V gain from sharing their products with x? `python -m benchmarks.shared_input`.

In self-attention all three see the same x. Stacked, their A's (4, 64) read x once where three layers read it three
times, and add to its gradient once. What is measured here is the most that sharing could give: one autograd step for
all three projections together, which independent modules could only come near to. Writes
`benchmarks/results/shared_input.md`.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusekrona.kron.fused import linear_with_kron

from .measuring import median_ratio, timed_in_turns

RESULT = Path(__file__).parent / "results" / "shared_input.md"
SHAPES = ((1024, 1280), (4096, 640), (4608, 3072))
A1, A2 = 4, 64
Parts = list[Tensor]  # W, A and B of Q, of K, of V


class Shared(torch.autograd.Function):
    """Three projections of x with their adapters, A first, the products with x stacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """Y of Q, K and V, each n × d."""
        ctx.save_for_backward(x, *parts)
        weights, stacked, last = parts[0::3], torch.cat(parts[1::3]), parts[2::3]
        n, b2 = len(x), last[0].shape[1]
        AX = torch.bmm(stacked.expand(n, -1, -1), x.view(n, A2, b2))
        answers = []
        for i, (W, B) in enumerate(zip(weights, last, strict=True)):
            y = functional.linear(x, W)
            y.view(n, A1, -1).add_(AX[:, A1 * i : A1 * (i + 1)] @ B.T)
            answers.append(y)
        return tuple(answers)

    @staticmethod
    def backward(ctx: Any, *gys: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of each A and B."""
        x, *parts = ctx.saved_tensors
        weights, stacked, last = parts[0::3], torch.cat(parts[1::3]), parts[2::3]
        n, b2 = len(x), last[0].shape[1]
        gx = gys[0] @ weights[0]
        for gy, W in zip(gys[1:], weights[1:], strict=True):
            gx.addmm_(gy, W)
        gAX = torch.cat([(gy.view(n * A1, -1) @ B).view(n, A1, b2) for gy, B in zip(gys, last, strict=True)], 1)
        X = x.view(n, A2, b2)
        gx.view(n, A2, b2).baddbmm_(stacked.T.expand(n, -1, -1), gAX)
        gA = torch.bmm(gAX, X.mT).sum(0)
        AX = torch.bmm(stacked.expand(n, -1, -1), X)
        gradients: list[Tensor | None] = [gx]
        for i, gy in enumerate(gys):
            rows = slice(A1 * i, A1 * (i + 1))
            gB = (AX[:, rows].reshape(n * A1, b2).T @ gy.view(n * A1, -1)).T
            gradients += [None, gA[rows], gB]
        return tuple(gradients)


def apart(x: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """Three layers as they are."""
    return tuple(linear_with_kron(x, parts[i], None, [(parts[i + 1], parts[i + 2])]) for i in (0, 3, 6))


def together(x: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """One step for all."""
    answers: tuple[Tensor, ...] = Shared.apply(x, *parts)
    return answers


def frozen(x: Tensor, parts: Parts) -> tuple[Tensor, ...]:
    """No adapters."""
    return tuple(functional.linear(x, W) for W in parts[0::3])


class Step:
    """Forward and backward."""

    def __init__(self, run: Any, x: Tensor, parts: Parts, gradients: Parts) -> None:
        self.run, self.x, self.parts, self.gradients = run, x, parts, gradients

    def __call__(self) -> None:
        for tensor in (self.x, *self.parts):
            tensor.grad = None
        torch.autograd.backward(self.run(self.x, self.parts), self.gradients)


def actions(tokens: int, size: int) -> dict[str, Step]:
    """The three ways, on the same tensors; they agree."""
    torch.manual_seed(0)
    x = torch.randn(tokens, size, requires_grad=True)
    parts: Parts = []
    for _ in range(3):
        parts += [
            torch.randn(size, size) / size**0.5,
            (torch.randn(A1, A2) / A2).requires_grad_(),
            torch.randn(size // A1, size // A2).requires_grad_(),
        ]
    gradients = [torch.randn(tokens, size) for _ in range(3)]
    steps = {run.__name__: Step(run, x, parts, gradients) for run in (frozen, apart, together)}
    found = []
    for name in ("apart", "together"):
        steps[name]()
        found.append([tensor.grad for tensor in (x, *parts) if tensor.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)
    return steps


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    lines = ["| tokens × width | frozen, ms | apart / frozen | together / frozen | together / apart |"]
    lines += ["|---|---|---|---|---|"]
    for tokens, size in SHAPES:
        seconds = timed_in_turns(actions(tokens, size), rounds)
        floor, ours, shared = seconds["frozen"], seconds["apart"], seconds["together"]
        lines.append(
            f"| {tokens} × {size} | {1e3 * statistics.median(floor):.1f} | {median_ratio(ours, floor):.3f} "
            f"| {median_ratio(shared, floor):.3f} | {median_ratio(shared, ours):.3f} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    note = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds."
    RESULT.write_text(f"{__doc__}\n{note}\n\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
