"""Adapter files of one format as files of another: exactly, or by the nearest Kronecker products."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from ..bases.architectures import CLASSES, PIPELINES, build_pipeline
from ..errors import AdapterFileError, FactorShapeError, KronAError
from ..kron.nearest import Approximation, Delta, Kronecker, LowRank, choose_factors, nearest_kronecker, total_error
from ..kron.shapes import fewest_parameters, packed, stacked
from ..storage import TensorFile
from ..tuner.names import in_component, layer_of
from .formats import Format
from .formats.krona import SavedAdapter
from .formats.lora import LoRA
from .formats.updates import KroneckerUpdate, Update, flat
from .kronecker import as_krona
from .layouts.layout import Place
from .layouts.names import layout_by
from .merge_base import folder_components
from .read import opened, read_adapters, updates_in
from .unused import STRICT, Reading, Unused, few
from .write import Say, check_output, write

Progress = Callable[[int, int], None]
"""Called with how many layers are done and how many there are."""


@dataclass(frozen=True)
class Conversion:
    """What came of a conversion.

    Attributes:
        layers: how many were converted.
        parameters: of the new adapter.
        errors: layer → ‖ΔW − Σ A ⊗ B‖ / ‖ΔW‖; empty where the conversion is exact.
        total_error: the same over all layers together.
    """

    layers: int
    parameters: int
    errors: dict[str, float] = field(default_factory=dict)
    total_error: float = 0.0


@dataclass(frozen=True)
class Target:
    """The factors to approximate with.

    Attributes:
        factors: (a1, a2) of every layer; None to choose them by the budget.
        budget: parameters of the new adapter; of at most 1, a share of the old one's.
        num_terms: products that are summed. None is one for given factors; within a budget it is whichever of 1, 2, 4,
            … and the most that it allows comes nearest. An update of low rank, such as a LoRA's, needs several.
    """

    factors: tuple[int, int] | None = None
    budget: float | None = None
    num_terms: int | None = None

    def __post_init__(self) -> None:
        if (self.factors is None) == (self.budget is None):
            raise KronAError("Give either factors, (a1, a2), or a budget of parameters to choose them by.")
        if self.num_terms is not None and self.num_terms < 1:
            raise KronAError(f"num_terms must be at least 1, not {self.num_terms}.")
        if self.budget is not None and not self.budget > 0:
            raise KronAError(f"The budget must be above 0, not {self.budget}.")


def convert(
    source: Path,
    output: Path,
    to: Format = "krona",
    model: str | Path | None = None,
    target: Target | None = None,
    on_layer: Progress | None = None,
    reading: Reading = STRICT,
    whole: bool = False,
    say: Say | None = None,
) -> Conversion:
    """Write an adapter file or folder in another format.

    Args:
        source: KronA, LoKr, LoHa, LoRA, whole updates, or the paper authors' checkpoint.
        output: a path that ends in .safetensors; for "krona" also a folder.
        to: the format, see `save_krona`.
        model: what the adapter is for, one of `architectures.PIPELINES` or a folder in Diffusers' layout; by default
            whichever of the former it fits.
        target: to approximate by the nearest Kronecker products of such factors; by default nothing but an exact
            conversion will do.
        on_layer: called after each layer that is approximated.
        reading: what to do about tensors that cannot be used, and where programs disagree.
        whole: as in `save_krona`.
        say: is told before writing how large an exact LoRA gets.

    Raises:
        AdapterFileError: the source cannot be read, or does not fit the model; or the format cannot hold it.
        FactorShapeError: some layer cannot take the factors, or none are within the budget.
        OSError: the output cannot be written.
    """
    check_output(output, to)
    components = components_for(source, model, reading)
    if target is not None:
        updates = _approximable(updates_in(source, components, reading), source, reading)
        return write_nearest(updates, components, source, output, to, target, on_layer)
    adapters = read_adapters(source, components, reading)
    write(output, adapters, components, to, whole=whole, say=say)
    return _conversion(adapters, {})


def write_nearest(
    updates: Mapping[Place, Update],
    components: Mapping[str, nn.Module],
    source: Path,
    output: Path,
    to: Format,
    target: Target,
    on_layer: Progress | None,
) -> Conversion:
    """Write the nearest Kronecker products to updates of these models as an adapter; see `convert`."""
    fits = approximated(updates, target, on_layer)
    nearest = {place: KroneckerUpdate(packed(fit.A), packed(fit.B)) for place, fit in fits.items()}
    adapters = as_krona(nearest, components, source)
    write(output, adapters, components, to)
    return _conversion(adapters, fits)


def _approximable(updates: Mapping[Place, Update], source: Path, reading: Reading) -> dict[Place, Update]:
    """Those of some updates that are the same for every base, without their biases; the rest is unused."""
    unused = Unused(str(source), reading.on_unused)
    bound = [in_component(*place) for place, update in updates.items() if not update.has_delta]
    if bound:
        unused.add(
            f"{source} has {len(bound)} layers whose updates depend on the base's weights (DoRA's, or of a method that "
            f"multiplies them), so nothing is nearest to them: {few(bound)}. Merge them with `diffusekrona merge`."
        )
    biased = [in_component(*place) for place, update in updates.items() if update.bias is not None]
    if biased:
        unused.add(
            f"{source} changes the biases of {len(biased)} layers, which no adapter of ours does: {few(biased)}."
        )
    norms = [in_component(*place) for place, update in updates.items() if update.of_norm and not update.bias_only]
    if norms:
        unused.add(f"{source} changes {len(norms)} norms, which no adapter of ours does: {few(norms)}.")
    found = {place: update for place, update in updates.items() if update.has_delta and not update.of_norm}
    unused.report(len(found))
    return found


def components_for(source: Path, model: str | Path | None, reading: Reading = STRICT) -> dict[str, nn.Module]:
    """The models, without weights, that an adapter is for.

    Raises:
        AdapterFileError: no model is given, and the adapter fits none that is known.
    """
    if model is not None:
        return build_pipeline(str(model)) if str(model) in PIPELINES else folder_components(Path(model))
    files = opened(source)
    names, problems = _candidates(files), dict[str, str]()
    # Pipelines have encoders in common: what the whole file fits goes before what fits a part of it.
    for how in dict.fromkeys((replace(reading, on_unused="error"), reading)):
        fitting: list[tuple[int, str, dict[str, nn.Module]]] = []
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which the reading that counts repeats
                components = build_pipeline(name)
                try:
                    updates = updates_in(source, components, how, files)
                except AdapterFileError as error:
                    problems[name] = str(error)
                    continue
            if all(_fits(update, components[part], layer) for (part, layer), update in updates.items()):
                fitting.append((len(updates), name, components))
            else:
                problems[name] = "its layers have other shapes"
        if fitting:
            return _best(source, fitting)
    raise AdapterFileError(
        f"{source} fits none of {', '.join(names)}; say what it is for, with the folder of its base model.\n  "
        + "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
    )


def _best(source: Path, fitting: list[tuple[int, str, dict[str, nn.Module]]]) -> dict[str, nn.Module]:
    """Of models by how many layers of a file fit each, with their names: the one that most do.

    Raises:
        AdapterFileError: as many fit several families, whose layers other programs call by other names.
    """
    most = max(count for count, *_ in fitting)
    best = [(name, components) for count, name, components in fitting if count == most]
    if len({CLASSES.get(name) for name, _ in best}) > 1:
        alike = ", ".join(name for name, _ in best)
        raise AdapterFileError(f"{source} fits {alike} alike; say which it is for, or the folder of its base model.")
    return best[0][1]


def _candidates(files: Mapping[str, TensorFile]) -> list[str]:
    """The pipelines that an adapter may be for, by the names of its layers."""
    names = {name for file in files.values() for name in file.tensors}
    layout = layout_by(names)
    if layout is not None and (found := [name for name, kind in CLASSES.items() if kind in layout.models]):
        return found
    of_unet = any(
        re.search(r"(down|up|input|output)_blocks|mid_block|middle_block|lora_te|text_encoder", n) for n in names
    )
    return [name for name in PIPELINES if (name in CLASSES) != of_unet]


def approximated(
    updates: Mapping[Place, Update], target: Target, on_layer: Progress | None = None
) -> dict[Place, Approximation]:
    """The nearest Kronecker products of each layer's update, a convolution's with the kernel in its columns.

    A budget is shared out by the parameters that the layers have now; layers whose share is less than what the
    smallest factors take get that. For all layers of one size, the factors are
    chosen by the one whose update is largest. One dense update is in memory at a time.
    """
    sizes, norms = {}, {}
    for place, update in updates.items():
        delta = _delta(update)
        sizes[place], norms[place] = _size(delta), _norm_bound(delta)
    best: dict[Place, Approximation] = {}
    for num_terms in _numbers_of_terms(updates, sizes, target):
        chosen = _chosen_factors(updates, sizes, norms, target, num_terms)
        fits: dict[Place, Approximation] = {}
        for place, update in updates.items():
            fits[place] = nearest_kronecker(_delta(update), *chosen[place], num_terms)
            if on_layer is not None:
                on_layer(len(fits), len(updates))
        best = fits if not best else min(best, fits, key=lambda one: total_error(one.values()))
    return best


def _numbers_of_terms(
    updates: Mapping[Place, Update], sizes: Mapping[Place, tuple[int, int]], target: Target
) -> list[int]:
    if target.num_terms is not None or target.budget is None:
        return [target.num_terms or 1]
    least = sum(fewest_parameters(*size) for size in sizes.values())
    most = max(1, int(_parameters_allowed(updates, target) / least))
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def _parameters_allowed(updates: Mapping[Place, Update], target: Target) -> float:
    assert target.budget is not None
    return target.budget * sum(u.parameters for u in updates.values()) if target.budget <= 1 else target.budget


def _chosen_factors(
    updates: Mapping[Place, Update],
    sizes: Mapping[Place, tuple[int, int]],
    norms: Mapping[Place, float],
    target: Target,
    num_terms: int,
) -> dict[Place, tuple[int, int]]:
    if target.factors is not None:
        return dict.fromkeys(updates, target.factors)
    alike: dict[tuple[int, int, int], list[Place]] = {}
    for place, budget in _budgets(updates, sizes, _parameters_allowed(updates, target), num_terms).items():
        alike.setdefault((*sizes[place], budget), []).append(place)
    chosen: dict[Place, tuple[int, int]] = {}
    for (_, _, budget), places in alike.items():
        largest = max(places, key=lambda place: norms[place])
        chosen |= dict.fromkeys(places, choose_factors(_delta(updates[largest]), budget, num_terms))
    return chosen


def _budgets(
    updates: Mapping[Place, Update], sizes: Mapping[Place, tuple[int, int]], left: float, num_terms: int
) -> dict[Place, int]:
    """How many parameters each layer may have of those that are left."""
    fewest = {size: num_terms * fewest_parameters(*size) for size in set(sizes.values())}
    least = {place: fewest[size] for place, size in sizes.items()}
    if sum(least.values()) > left:
        raise FactorShapeError(
            f"A budget of {int(left):,} parameters is too small: with the smallest factors, these {len(least)} layers "
            f"take {sum(least.values()):,}."
        )
    open_, budgets = dict.fromkeys(updates), {}
    while open_:
        share = left / sum(updates[place].parameters for place in open_)
        short = [place for place in open_ if share * updates[place].parameters < least[place]]
        for place in short or list(open_):
            budgets[place] = least[place] if short else int(share * updates[place].parameters)
            left -= budgets[place]
            del open_[place]
    return budgets


def _delta(update: Update) -> Delta:
    """ΔW as `approximate` takes it: structured where the file holds it so."""
    if isinstance(update, LoRA) and update.mid is None:
        return LowRank(update.scale * update.up.float().flatten(1), flat(update.down.float()))
    if isinstance(update, KroneckerUpdate) and update.layout == "kron":
        return Kronecker(update.scale * stacked(update.A), stacked(update.B))
    return flat(update.delta())


def _size(delta: Delta) -> tuple[int, int]:
    if isinstance(delta, LowRank):
        return delta.up.shape[0], delta.down.shape[1]
    if isinstance(delta, Kronecker):
        return delta.A.shape[1] * delta.B.shape[1], delta.A.shape[2] * delta.B.shape[2]
    return delta.shape[0], delta.shape[1]


def _norm_bound(delta: Delta) -> float:
    """At least ‖ΔW‖, and as large for one term."""
    if isinstance(delta, LowRank):
        return float(delta.up.double().norm() * delta.down.double().norm())
    if isinstance(delta, Kronecker):
        return float((delta.A.double().flatten(1).norm(dim=1) * delta.B.double().flatten(1).norm(dim=1)).sum())
    return float(delta.double().norm())


def _fits(update: Update, component: nn.Module, name: str) -> bool:
    weight = component.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    if not update.has_delta or update.bias_only:
        return True
    rows, columns = _size(_delta(update))
    return rows == len(weight) and columns == weight[0].numel()


def _conversion(adapters: Mapping[str, SavedAdapter], fits: Mapping[Place, Approximation]) -> Conversion:
    tensors = [(key, tensor) for saved in adapters.values() for key, tensor in saved.tensors.items()]
    return Conversion(
        layers=len({layer_of(key) for key, _ in tensors} - {""}),
        parameters=sum(tensor.numel() for _, tensor in tensors),
        errors={in_component(part, name): fit.error for (part, name), fit in fits.items()},
        total_error=total_error(fits.values()),
    )
