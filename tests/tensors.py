"""Random factors and inputs in any layout, what a function makes of them, and how large its tensors get."""

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusekrona.kron.shapes import FactorShapes

sides = st.sampled_from([1, 2, 3, 4, 5, 7, 17])
shapes_of_factors = st.builds(FactorShapes, sides, sides, sides, sides)
leading = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 3)])


def contiguous(t: Tensor) -> Tensor:
    return t


def transposed(t: Tensor) -> Tensor:
    """The same values with the last two dimensions, or the only one, laid out backwards in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else strided(t)


def strided(t: Tensor) -> Tensor:
    """The same values, every other element of a buffer, not from its start."""
    return torch.stack([torch.full_like(t, 99.0), t], dim=-1)[..., 1]


def batch_last(t: Tensor) -> Tensor:
    """The same values with the first dimension innermost in memory."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t


def expanded(t: Tensor) -> Tensor:
    """The first entry along the first dimension for all of it, with stride 0."""
    return t[:1].expand_as(t) if t.dim() and t.shape[0] else t


layouts = st.sampled_from([contiguous, transposed, strided, batch_last, expanded])


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], output_gradient: Tensor
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, output_gradient.to(y.dtype))]


def laid_out(function: Callable[..., Tensor], layout: Sequence[Callable[[Tensor], Tensor]]) -> Callable[..., Tensor]:
    """The function of the same values, each laid out in memory in its own way."""
    return lambda *leaves: function(*(lay(leaf) for lay, leaf in zip(layout, leaves, strict=True)))


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def assert_only_wanted_gradients(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    output_gradient: Tensor,
    wanted: Sequence[int],
    expected: list[Tensor],
) -> None:
    """The inputs marked in `wanted` get their expected gradient, the others none."""
    leaves = [t.requires_grad_(bool(flag)) for t, flag in zip(inputs, wanted, strict=True)]
    y = function(*leaves)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(output_gradient)
    for leaf, gradient, flag in zip(leaves, expected, wanted, strict=True):
        assert (leaf.grad is not None) == bool(flag)
        if flag:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-12)


def random_inputs(
    shapes: FactorShapes, lead: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((*lead, shapes.h), (shapes.a1, shapes.a2), (shapes.b1, shapes.b2), (*lead, shapes.d))
    *inputs, output_gradient = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return inputs, output_gradient


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor that any operation returns has; views of one tensor do not count."""

    def __init__(self, apart_from: Tensor | None = None) -> None:
        super().__init__()
        self.elements = 0
        self._known = None if apart_from is None else apart_from.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self._known:
                self.elements = max(self.elements, tensor.numel())
        return result
