"""AdapterStore: any number of adapters on one pipeline, in memory as far as a budget goes."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ..errors import KronAError, StoreFullError
from ..tuner.components import adaptable_components
from .batch import krona_batch
from .listing import Listing
from .loading import LoadedAdapter, Loader, State, bytes_of, state_of
from .slots import Slots

DEFAULT_BUDGET = 2 << 30
"""Bytes of factors: some 270 adapters of SDXL with the default factors, in bfloat16."""


class _Held(NamedTuple):
    """An adapter that is in memory, and its file's state as it was read."""

    adapter: LoadedAdapter
    state: State


class AdapterStore:
    """Adapters of a folder, or of the hub, each loaded when it is first asked for, and dropped when others need room.

    Factors of adapters that are in memory take up to `budget` bytes; those that were not used for longest make room.
    A batch's adapters stay until it is drawn. An adapter whose file was replaced is read again. What cannot be loaded
    raises its error for its own name, each time that it is asked for, and costs no other adapter anything.

    One thread draws; `prefetch` and `load` may be called from any other meanwhile.

    Args:
        pipe: the pipeline, or a single module.
        adapters: a folder of adapters, each a `.safetensors` file or a folder of its own, by name; or ids of hub
            repositories, which are their names.
        budget: bytes for factors.

    Raises:
        KronAError: there is no such folder, or no id is given.

    Examples:
        store = AdapterStore(pipe, "adapters", budget=1 << 30)
        with store.batch(["dog", None, "cat"]):
            images = pipe(["a dog", "a hen", "a cat"]).images
    """

    def __init__(self, pipe: Any, adapters: str | PathLike[str] | Iterable[str], budget: int = DEFAULT_BUDGET) -> None:
        if budget < 1:
            raise KronAError(f"budget must be at least 1 byte, not {budget}.")
        self._pipe, self.listing, self._budget = pipe, Listing(adapters), budget
        self._loader = Loader(adaptable_components(pipe))
        self._slots = Slots(pipe)
        self._lock = Lock()
        self._held: OrderedDict[str, _Held] = OrderedDict()  # those that were used last at the end
        self._loading: dict[str, Future[LoadedAdapter]] = {}
        self._promised: dict[str, int] = {}  # bytes of what is being loaded
        self._in_use: Counter[str] = Counter()
        self._prefetching: ThreadPoolExecutor | None = None

    def names(self) -> list[str]:
        """All adapters that can be asked for, sorted; what is added to the folder later is among them."""
        return self.listing.names()

    def __contains__(self, name: object) -> bool:
        return name in self.listing

    def loaded(self) -> list[str]:
        """The adapters that are in memory, those that were used last at the end."""
        with self._lock:
            return list(self._held)

    @property
    def bytes(self) -> int:
        """How many bytes of the budget are taken."""
        with self._lock:
            return self._taken()

    @contextmanager
    def batch(self, names: Sequence[str | None]) -> Iterator[None]:
        """Let each sample of a batch have its own adapter, or none, as `krona_batch` does.

        Args:
            names: an adapter for each prompt, or for each image; None for the base alone.

        Raises:
            AdapterNameError: there is none of a name.
            AdapterFileError: one cannot be read, or is for another model.
            StoreFullError: these adapters do not fit into the budget together.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        with (
            self.kept(wanted) as adapters,
            self._slots.filled(adapters) as slots,
            krona_batch(self._pipe, [None if name is None else slots[name] for name in names]),
        ):
            yield

    @contextmanager
    def kept(self, names: Iterable[str]) -> Iterator[dict[str, LoadedAdapter]]:
        """Load adapters, and keep them in memory while the block runs.

        Raises:
            KronAError: as `batch`.
        """
        wanted = list(names)
        with self._lock:
            self._in_use.update(wanted)
        try:
            yield {name: self.load(name) for name in wanted}
        finally:
            with self._lock:
                self._in_use.subtract(wanted)
                self._in_use = +self._in_use

    def load(self, name: str) -> LoadedAdapter:
        """Have an adapter in memory; the next ones may drop it again.

        Raises:
            KronAError: as `batch`.
        """
        return self._load(name, frozenset())

    def prefetch(self, names: Iterable[str | None]) -> None:
        """Begin to load the adapters of the next batch, in another thread.

        One for which there is no room beside the running batch's, and these, is left for later. What is wrong with one
        is told when it is asked for.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        with self._lock:
            missing = [name for name in wanted if name not in self._held and name not in self._loading]
            if not missing:
                return
            if self._prefetching is None:
                self._prefetching = ThreadPoolExecutor(1, "krona-prefetch")
            thread = self._prefetching
        for name in missing:
            thread.submit(self._prefetch, name, frozenset(wanted))

    def close(self) -> None:
        """Drop all adapters, and leave the pipeline without the store's places for them."""
        if self._prefetching is not None:
            self._prefetching.shutdown(cancel_futures=True)
            self._prefetching = None
        with self._lock:
            self._held.clear()
        self._slots.close()

    def _prefetch(self, name: str, beside: frozenset[str]) -> None:
        with suppress(KronAError):
            self._load(name, beside)

    def _load(self, name: str, keep: frozenset[str]) -> LoadedAdapter:
        """An adapter from memory or its file; `keep` are those that may not be dropped for it, beside those in use."""
        source = self.listing.source(name)
        state = state_of(source)
        with self._lock:
            held = self._held.get(name)
            if held is not None and held.state == state:
                self._held.move_to_end(name)
                return held.adapter
            others = self._loading.get(name)
            if others is None:
                self._held.pop(name, None)
                self._make_room(name, bytes_of(source), keep)
                pending = self._loading[name] = Future()
        if others is None:
            self._read(name, source, state, pending, keep)
            return pending.result()
        try:
            return others.result()
        except StoreFullError:  # beside what another thread keeps
            return self._load(name, keep)

    def _read(
        self,
        name: str,
        source: Path,
        state: State,
        pending: Future[LoadedAdapter],
        keep: frozenset[str],
    ) -> None:
        try:
            adapter = self._loader.load(source)
            with self._lock:
                self._promised.pop(name, None)
                self._make_room(name, adapter.bytes, keep)  # more than the file's, where the dtype is another
                self._promised.pop(name, None)
                self._held[name] = _Held(adapter, state)
            pending.set_result(adapter)
        except BaseException as error:
            pending.set_exception(error)
        finally:
            with self._lock:
                self._promised.pop(name, None)
                self._loading.pop(name, None)

    def _make_room(self, name: str, size: int, keep: frozenset[str]) -> None:
        """Drop adapters until there is room for one more, and promise it the room; none is dropped if all would not do.

        Raises:
            StoreFullError: there is no room beside those that stay.
        """
        free = [one for one in self._held if one not in self._in_use and one not in keep and one != name]
        lacking = self._taken() + size - self._budget
        dropped = []
        for one in free:
            if lacking <= 0:
                break
            dropped.append(one)
            lacking -= self._held[one].adapter.bytes
        if lacking > 0:
            raise StoreFullError(
                f"The adapter {name!r} takes {size:,} bytes, for which the budget of {self._budget:,} has no room "
                "beside the adapters in use. Give the store a larger budget, or draw fewer at once."
            )
        for one in dropped:
            del self._held[one]
        self._promised[name] = size

    def _taken(self) -> int:
        return sum(held.adapter.bytes for held in self._held.values()) + sum(self._promised.values())
