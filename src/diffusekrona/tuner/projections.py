"""Adapters of an attention's projections where Diffusers has fused these (`fuse_qkv_projections`).

Fusing copies the weights of to_q, to_k and to_v into one new layer, to_qkv, and calls that instead. An adapter stays
on the single projections, whose names and shapes say what it is, and is brought to the rows of the fused layer that
are theirs: its update is added to that layer's output, and merging it changes these rows, too. So it makes no
difference whether an adapter or the fusing comes first, and saved adapters are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from ..errors import KronAError, MergeError
from ..kron.exact import Keep
from .compat import BaseTunerLayer
from .layer import KronALayer, krona_layer_in
from .merged import MergedWeight, Terms
from .names import unwrapped_name

FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""Name of a fused projection → those that it is made of, in the order of their rows."""

_FUSE, _UNFUSE = "fuse_projections", "unfuse_qkv_projections"


class _Whole(NamedTuple):
    """A fused projection that an attention has, used or not: its own name, and those that it is made of."""

    name: str
    singles: tuple[str, ...]


class FusedRows:
    """The rows of a fused projection that are a copy of one adapted layer's weight.

    Args:
        attention: what has both.
        whole: name of the fused projection.
        first: the first row.
        layer: the adapted layer, whose weight is as it was when it was copied.
    """

    def __init__(self, attention: nn.Module, whole: str, first: int, layer: KronALayer) -> None:
        self.attention, self.whole, self.layer = attention, whole, layer
        self.first, self.last = first, first + layer.out_features
        self._merged = layer.merged_copy()
        fused = self.fused()
        assert fused is not None
        self.linear = _base(fused)
        self._handles = (
            self.linear.register_forward_pre_hook(self._before),
            self.linear.register_forward_hook(self._after),
        )

    def fused(self) -> nn.Module | None:
        """The fused projection; None once it is unfused or replaced."""
        found = getattr(self.attention, self.whole, None)
        return found if isinstance(found, nn.Module) else None

    def remove(self) -> None:
        """Add updates no more."""
        for handle in self._handles:
            handle.remove()

    def check(self, terms: Terms, keep: Keep | None = None) -> None:
        """Raise `MergeError` if these rows cannot hold these terms."""
        if self._is_there():
            self._merged.check(self._rows(), terms, keep)

    def check_undoable(self) -> None:
        """Raise `MergeError` if these rows were cast while merged."""
        if self._is_there():
            self._merged.check_undoable(self._rows())

    def set(self, terms: Terms, keep: Keep | None = None) -> None:
        """Make these terms those that the rows hold."""
        if not self._is_there() or terms.keys() == self._merged.terms.keys():
            return
        # What is merged into the whole comes last, as it can be taken out exactly only then.
        on_whole = krona_layer_in(self.fused())
        of_whole = dict(on_whole.merged_terms) if on_whole else {}
        kept = on_whole.kept if on_whole else None
        if on_whole and of_whole:
            on_whole.set_merged({})
        self._merged.set(self._rows(), terms, keep)
        if on_whole and of_whole:
            on_whole.set_merged(of_whole, kept)

    def fold(self, terms: Terms) -> None:
        """`set` for good."""
        self.set(terms)
        self._merged = MergedWeight()

    def _is_there(self) -> bool:
        fused = self.fused()
        if fused is None or _base(fused) is not self.linear:
            return False
        weight: Any = self.linear.weight
        if weight.is_meta:
            raise MergeError(f"{self.whole}, which this layer is fused into, is offloaded; take it back, or unfuse it")
        return True

    def _rows(self) -> nn.Module:
        """The rows as a layer of their own."""
        rows = nn.Linear(self.layer.in_features, self.last - self.first, bias=False, device="meta")
        weight: Any = self.linear.weight
        rows.weight = nn.Parameter(weight.detach()[self.first : self.last], requires_grad=False)
        return rows

    def _before(self, linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.layer.unmerge_if_disabled()

    def _after(self, linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        update = self.layer.update(inputs[0])
        if update is None:
            return output
        return output + functional.pad(update.to(output.dtype), (self.first, output.shape[-1] - self.last))


def bring_to_fused(model: nn.Module) -> None:
    """Let the adapters of single projections act in the fused ones, now and when these are fused later."""
    for module in model.modules():
        if hasattr(type(module), _FUSE) and any(krona_layer_in(child) for child in module.children()):
            _bring(module)
            _replace_method(module, fuse_projections)
        if hasattr(type(module), _UNFUSE):
            _replace_method(module, unfuse_qkv_projections)


def leave_fused(model: nn.Module) -> None:
    """Undo `bring_to_fused` where no adapter is left."""
    adapted = any(isinstance(module, KronALayer) for module in model.modules())
    for module in model.modules():
        if not any(krona_layer_in(child) for child in module.children()):
            _give_back_method(module, fuse_projections)
        if not adapted:
            _give_back_method(module, unfuse_qkv_projections)


def unused_layers(model: nn.Module) -> dict[str, str]:
    """Fused projections that a model still has and no longer calls, by name, each with why."""
    return {
        unwrapped_name(f"{name}.{whole.name}" if name else whole.name): "the projections are unfused again"
        for name, module in model.named_modules()
        for whole in _wholes(module)
        if not is_fused(module)
    }


def is_copy(attention: nn.Module, child: str) -> bool:
    """Whether a layer of an attention is a fused copy of others that it has."""
    return child in {whole.name for whole in _wholes(attention)}


def in_use(model: nn.Module, layer: str) -> tuple[str, int] | None:
    """Where a single projection of a model is really called: the fused one's name, and its first row in that.

    None for a layer that is called itself.
    """
    parent, _, single = layer.rpartition(".")
    attention = model.get_submodule(parent)
    for whole in _wholes(attention):
        if single in whole.singles and is_fused(attention):
            return f"{parent}.{whole.name}" if parent else whole.name, _first_row(attention, whole, single)
    return None


def fuse_projections(self: Any, *args: Any, **kwargs: Any) -> None:
    """Fuse an attention's projections as Diffusers does, and bring their adapters along.

    Raises:
        KronAError: they are fused, the fused one has adapters of its own, and would be made anew without them.
    """
    for whole in _wholes(self):
        layer = krona_layer_in(getattr(self, whole.name))
        if layer and layer.krona_A and not hasattr(type(self), "unfuse_projections"):
            raise KronAError(
                f"{whole.name} has the adapter(s) {', '.join(layer.krona_A)}, and fusing the projections again would "
                "drop them; unload them with unload_krona first, or do not fuse twice."
            )
    getattr(type(self), _FUSE)(self, *args, **kwargs)
    _bring(self)


def unfuse_qkv_projections(self: Any, *args: Any, **kwargs: Any) -> None:
    """Unfuse a model's projections as Diffusers does.

    Raises:
        KronAError: an adapter is on a fused projection itself, and would be dropped.
    """
    for name, module in self.named_modules():
        for whole in _wholes(module) if is_fused(module) else ():
            layer = krona_layer_in(getattr(module, whole.name))
            if layer and layer.krona_A:
                raise KronAError(
                    f"{name}.{whole.name} has the adapter(s) {', '.join(layer.krona_A)}, which unfusing the "
                    "projections would drop; unload them with unload_krona first, and load them again afterwards."
                )
    getattr(type(self), _UNFUSE)(self, *args, **kwargs)


def _replace_method(module: nn.Module, function: Any) -> None:
    # A bound method is copied with its module, and pickled by its name, under which a new process finds Diffusers' own.
    vars(module).setdefault(function.__name__, MethodType(function, module))


def _give_back_method(module: nn.Module, function: Any) -> None:
    method = vars(module).get(function.__name__)
    if isinstance(method, MethodType) and method.__func__ is function:
        del vars(module)[function.__name__]


def _bring(attention: nn.Module) -> None:
    for whole in _wholes(attention):
        linear = _base(getattr(attention, whole.name))
        for single in whole.singles:
            layer = krona_layer_in(getattr(attention, single))
            if layer is None or (layer.fused_rows is not None and layer.fused_rows.linear is linear):
                continue
            if layer.fused_rows is not None:
                layer.fused_rows.remove()
            layer.fused_rows = FusedRows(attention, whole.name, _first_row(attention, whole, single), layer)


def _wholes(module: nn.Module) -> Iterator[_Whole]:
    if getattr(module, "fused_projections", None) is None:
        return
    for name, singles in FUSED_PROJECTIONS.items():
        if all(isinstance(getattr(module, one, None), nn.Module) for one in (name, *singles)):
            yield _Whole(name, singles)


def is_fused(attention: nn.Module) -> bool:
    """Whether an attention calls its fused projections. A UNet's keeps them, and says so, when it is unfused."""
    if not getattr(attention, "fused_projections", False):
        return False
    if hasattr(type(attention), "unfuse_projections"):
        return True
    name: str = type(getattr(attention, "processor", None)).__name__
    return name.startswith("Fused")


def _first_row(attention: nn.Module, whole: _Whole, single: str) -> int:
    before = whole.singles[: whole.singles.index(single)]
    return sum(int(_base(getattr(attention, one)).out_features) for one in before)


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
