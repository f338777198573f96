"""A layer in whose batch each sample has its own adapter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kron.batched import Part, kron_linear_each, linear_with_krons
from ..kron.shapes import Layout
from .batch import Batch, Span
from .layer import KronALayer, can_fuse


class BatchedLayer:
    """What a layer does instead of adding its active adapters.

    Args:
        layer: the layer.
        batch: which adapter each sample has.
    """

    def __init__(self, layer: KronALayer, batch: Batch) -> None:
        self._layer, self._batch = layer, batch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = base(x) + s · Σ (A ⊗ B)x with the factors of each row's adapter; arguments for the base layer as ever."""
        layer, base, spans = self._layer, self._layer.base_layer, self._spans(x)
        names = list(dict.fromkeys(span.name for span in spans if span.name is not None))
        if not args and not kwargs and layer.is_plain(names) and can_fuse(base, x):
            return self._fused(base, x, spans, names)
        result: Tensor = base(x, *args, **kwargs)
        update = self._update(x, spans)
        return result if update is None else result + update.to(result.dtype)

    def update(self, x: Tensor) -> Tensor | None:
        """What is added to the base's output; None where no row has an adapter here."""
        return self._update(x, self._spans(x))

    def _spans(self, x: Tensor) -> list[Span]:
        return self._batch.spans(len(x), set(self._layer.krona_A.keys()))

    def _fused(self, base: nn.Linear, x: Tensor, spans: list[Span], names: list[str]) -> Tensor:
        pairs: list[tuple[Tensor, Tensor]] = []
        products: dict[str | None, range] = {None: range(0)}
        for name in names:
            own = self._layer.scaled_factors(name)
            products[name] = range(len(pairs), len(pairs) + len(own))
            pairs += own
        parts = [Part(start, stop, products[name]) for start, stop, name in spans]
        return linear_with_krons(x, base.weight, base.bias, pairs, parts)

    def _update(self, x: Tensor, spans: list[Span]) -> Tensor | None:
        found = {span: self._layer.delta(span.name, x[span.start : span.stop]) for span in spans if span.name}
        if not found:
            return None
        like = next(iter(found.values()))
        nothing = {span: like.new_zeros(span.stop - span.start, *like.shape[1:]) for span in spans if span not in found}
        return torch.cat([(found | nothing)[span] for span in spans])


class _Stacked(NamedTuple):
    """A term of each sample's adapter, samples × a1 × a2 and samples × b1 × b2; zeros where it has none of these."""

    A: Tensor
    B: Tensor
    layout: Layout


class CompiledBatchedLayer(BatchedLayer):
    """The same for a linear layer that `torch.compile` has compiled.

    The factors of a batch are copied into tensors of their own, so that what was compiled depends on their shapes, and
    not on which adapters they are of. Gradients do not flow to the factors.
    """

    def __init__(self, layer: KronALayer, batch: Batch) -> None:
        super().__init__(layer, batch)
        with torch.no_grad():
            self._stacked = list(_stacks(layer, batch))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `BatchedLayer.forward`."""
        result: Tensor = self._layer.base_layer(x, *args, **kwargs)
        update = self.update(x)
        return result if update is None else result + update.to(result.dtype)

    def update(self, x: Tensor) -> Tensor | None:
        """As `BatchedLayer.update`."""
        total = None
        for A, B, layout in self._stacked:
            delta = kron_linear_each(x.to(A.dtype), *(self._batch.repeated(factor, len(x)) for factor in (A, B)))
            if layout == "transposed":
                delta = delta.unflatten(-1, (A.shape[1], B.shape[1])).transpose(-1, -2).flatten(-2)
            total = delta if total is None else total + delta
        return total


def _stacks(layer: KronALayer, batch: Batch) -> Iterator[_Stacked]:
    base: Any = layer.get_base_layer()
    # A quantized weight may be of whole numbers, which factors are not.
    dtype, samples = base.weight.dtype if base.weight.is_floating_point() else None, len(batch.names)
    terms = [
        (number, layer.layout[name], tuple(A.shape), tuple(B.shape), row, A, B)
        for row, name in enumerate(batch.names)
        if name is not None and name in layer.krona_A
        for number, (A, B) in enumerate(layer.scaled_factors(name))
    ]
    for (_, layout, a_shape, b_shape), alike in groupby(sorted(terms, key=lambda one: one[:5]), lambda one: one[:4]):
        own = list(alike)
        like = own[0][5]
        left, right = (like.new_zeros(samples, *shape, dtype=dtype) for shape in (a_shape, b_shape))
        for *_, row, A, B in own:
            left[row], right[row] = A, B
        yield _Stacked(left, right, layout)
