"""The slots of a pipeline, into which the adapters of a batch are put and out of which they are taken again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..pipeline import put_adapter, unload_krona
from ..tuner.components import adaptable_components
from ..tuner.injected import krona_layers
from ..tuner.slots import Slot
from .loading import LoadedAdapter


class Slots:
    """As many slots of each structure as a batch has needed so far.

    Args:
        pipe: the pipeline.
        most: how many there are at most beside those in use; a slot has a place in every layer.
        prefix: how the slots' names begin, as adapters of the pipeline.
    """

    def __init__(self, pipe: Any, most: int = 32, prefix: str = "krona-store") -> None:
        self._pipe, self._most, self._prefix = pipe, most, prefix
        self._free: list[Slot] = []  # those that were used last at the end
        self._made = 0

    @contextmanager
    def filled(self, adapters: Mapping[str, LoadedAdapter]) -> Iterator[dict[str, str]]:
        """Give each adapter a slot while the block runs; the names are those that `krona_batch` takes."""
        taken: dict[str, Slot] = {}
        try:
            for name, adapter in adapters.items():
                taken[name] = self._take(adapter)
                taken[name].fill(adapter.contents)
            yield {name: slot.name for name, slot in taken.items()}
        finally:
            for slot in taken.values():
                slot.empty()
                self._free.append(slot)
            self._leave(self._most)

    def close(self) -> None:
        """Take all slots out of the pipeline."""
        self._leave(0)

    def _leave(self, most: int) -> None:
        while len(self._free) > most:
            unload_krona(self._pipe, self._free.pop(0).name)

    def _take(self, adapter: LoadedAdapter) -> Slot:
        for place in reversed(range(len(self._free))):
            if self._free[place].structure == adapter.structure:
                return self._free.pop(place)
        self._made += 1
        name = f"{self._prefix}-{self._made}"
        with _nothing_more_active(self._pipe):
            put = put_adapter(self._pipe, adapter.saved(), name)
        return Slot(name, adapter.structure, put.components)


@contextmanager
def _nothing_more_active(pipe: Any) -> Iterator[None]:
    """Leave those adapters active that are, and none in layers that have had none."""
    components = adaptable_components(pipe).values()
    before: dict[Any, list[str]] = {
        layer: list(layer.active_adapters) for part in components for layer in krona_layers(part).values()
    }
    trainable = [(parameter, parameter.requires_grad) for part in components for parameter in part.parameters()]
    yield
    for part in components:
        for layer in krona_layers(part).values():
            layer.set_adapter(before.get(layer, []), inference_mode=True)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)
