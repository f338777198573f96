"""krona_report: what an adapter is, layer by layer: shapes, parameters, ranks and cost."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .kron.costs import BALANCE, StepCost, frozen_step, krona_step, lokr_step, lora_step, merging_pays
from .kron.shapes import FactorShapes, UpdateShapes, lora_parameters
from .tuner.compat import BaseTunerLayer, ModulesToSaveWrapper
from .tuner.components import adaptable_components, adapter_names, named_adapter
from .tuner.injected import krona_layers
from .tuner.layer import KronALayer
from .tuner.names import in_component

if TYPE_CHECKING:
    from rich.table import Table

LORA_RANK = 4
"""The rank of the LoRA that the paper compares with (Table 2)."""

TOKENS = 1024
"""Inputs of a layer per step that costs are predicted for: what most layers of SDXL see of a picture of 1024²."""


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    Attributes:
        name: dotted name, with the component's in front.
        update: what is trained here; `shapes` are those of A and B.
        rank: the rank the update has at any scale but 0, rank(A)·rank(B), or for several terms the most that their
            ranks allow; None where the factors hold no values (meta device) or not only finite ones.
    """

    name: str
    update: UpdateShapes
    rank: int | None

    @property
    def shapes(self) -> FactorShapes:
        """Of A and B, a convolution's B without its kernel."""
        return self.update.factors

    @property
    def size(self) -> tuple[int, int]:
        """d × h of the weight, a convolution's with the kernel in h."""
        return self.shapes.d, self.shapes.a2 * self.update.b_columns

    @property
    def parameters(self) -> int:
        """Trainable parameters, a1·a2 + b1·b2 for one term."""
        return self.update.parameters

    @property
    def lora_parameters(self) -> int:
        """What LoRA of rank 4 would train here."""
        return lora_parameters(*self.size, LORA_RANK)

    @property
    def highest_rank(self) -> int:
        """The rank the update can reach."""
        return self.update.highest_rank

    def step_costs(self, tokens: int = TOKENS) -> dict[str, StepCost]:
        """What a training step of this layer takes without an adapter, with this one and with others."""
        d, h = self.size
        # A convolution counts as the linear layer that its unfolded image would go through.
        shapes = self.shapes._replace(b2=self.update.b_columns)
        frozen = frozen_step(d, h, tokens)
        krona = krona_step(shapes, tokens, merged=merging_pays(shapes, tokens))
        return {
            "frozen": frozen,
            "KronA": StepCost(*(f + (k - f) * self.update.num_terms for f, k in zip(frozen, krona, strict=True))),
            f"LoRA r={LORA_RANK}": lora_step(d, h, LORA_RANK, tokens),
            "LoKr factor 8": lokr_step(d, h, None, 8, tokens),
        }


@dataclass(frozen=True)
class KronAReport:
    """All adapted layers of a model. Printing it gives a table with one row for each kind of layer.

    Attributes:
        adapter_name: the adapter.
        layers: one entry per adapted layer.
        base_parameters: parameters of the adapted components without any adapter.
    """

    adapter_name: str
    layers: list[LayerReport]
    base_parameters: int

    @property
    def parameters(self) -> int:
        """Trainable parameters in all."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def lora_parameters(self) -> int:
        """What LoRA of rank 4 would train in the same layers."""
        return sum(layer.lora_parameters for layer in self.layers)

    @property
    def share(self) -> float:
        """Trainable parameters over the base's."""
        return self.parameters / self.base_parameters

    def predicted_steps(self, tokens: int = TOKENS, balance: float = BALANCE) -> dict[str, float]:
        """Training steps of the adapted layers over the frozen ones', with this adapter and with others instead.

        Args:
            tokens: inputs of each layer per step.
            balance: multiply-adds that the machine does while it moves one tensor element; that of a CPU if left out.
        """
        return _predicted_steps(self.layers, tokens, balance)

    def table(self, every_layer: bool = False) -> Table:
        """The report as a rich table, one row per kind of layer or per layer."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape(f"KronA adapter {self.adapter_name!r}"),
            box=box.SIMPLE,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        steps = self.predicted_steps()
        rows = [(layer.name, [layer]) for layer in self.layers] if every_layer else list(self._kinds())
        for header, total in (
            ("layer" if every_layer else "layers", str(len(self.layers))),
            ("d × h", ""),
            ("A", ""),
            ("B", ""),
            ("parameters", f"{self.parameters:,}"),
            ("LoRA r=4", f"{self.lora_parameters:,}"),
            ("rank", ""),
            ("step", f"{steps['KronA']:.2f}"),
        ):
            table.add_column(header, footer=total, justify="right", no_wrap=True)
        for name, layers in rows:
            table.add_row(escape(name), *_cells(layers))
        table.show_footer = True
        table.caption_justify = "left"
        table.caption = (
            f"{self.parameters:,} trainable parameters, {self.share:.3%} of the base's {self.base_parameters:,}.\n"
            "rank: has / can reach. step: predicted training step over the frozen layers',\n"
            f"{TOKENS:,} tokens each, fp32 on a CPU; "
            + ", ".join(f"{name}: {step:.2f}" for name, step in steps.items() if name != "KronA")
            + "."
        )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=80)
        console.print(self.table())
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text).rstrip()

    def _kinds(self) -> Iterator[tuple[str, list[LayerReport]]]:
        def kind(layer: LayerReport) -> tuple[FactorShapes, tuple[tuple[int, ...], ...]]:
            return layer.shapes, tuple(layer.update.tensors.values())

        for _, same in groupby(sorted(self.layers, key=kind), key=kind):
            layers = list(same)
            yield str(len(layers)), layers


def krona_report(model: Any, adapter_name: str | None = None) -> KronAReport:
    """Report on an adapter of a pipeline or module, on any device, also on meta.

    Args:
        model: the pipeline or module that holds the adapter.
        adapter_name: which adapter; may be left out while there is just one.

    Raises:
        AdapterNameError: no such adapter.

    Examples:
        >>> from diffusekrona import KronAConfig, inject_krona
        >>> model = nn.Sequential(nn.Linear(128, 64))
        >>> krona = inject_krona(model, KronAConfig(a1=4, a2=8, target_modules=["0"]))
        >>> report = krona_report(model)
        >>> report.parameters, report.lora_parameters
        (288, 768)
        >>> report.layers[0].highest_rank
        64
    """
    components = adaptable_components(model)
    name = named_adapter(components, adapter_name)
    adapted = {part: module for part, module in components.items() if name in adapter_names(module)}
    layers = [
        LayerReport(in_component(part, layer_name), layer.shapes(name), _rank(layer, name))
        for part, module in adapted.items()
        for layer_name, layer in krona_layers(module).items()
        if name in layer.krona_A
    ]
    return KronAReport(name, layers, sum(map(_base_parameters, adapted.values())))


def _base_parameters(component: nn.Module) -> int:
    added: set[nn.Parameter] = set()
    for module in component.modules():
        if isinstance(module, BaseTunerLayer):
            parts = [getattr(module, attribute, None) for attribute in module.adapter_layer_names]
        else:
            parts = [module.modules_to_save] if isinstance(module, ModulesToSaveWrapper) else []
        for part in parts:
            added.update(part.parameters() if isinstance(part, nn.Module) else ())
    return sum(parameter.numel() for parameter in component.parameters() if parameter not in added)


def _predicted_steps(layers: list[LayerReport], tokens: int, balance: float) -> dict[str, float]:
    times: dict[str, float] = {}
    for layer in layers:
        for name, cost in layer.step_costs(tokens).items():
            times[name] = times.get(name, 0) + cost.time(balance)
    floor = times.pop("frozen")
    return {name: time / floor for name, time in times.items()}


def _rank(layer: KronALayer, name: str) -> int | None:
    factors = [factor.detach() for factor in layer.parameters_of(name).values()]
    if any(factor.is_meta or not bool(factor.isfinite().all()) for factor in factors):
        return None
    # The product of the ranks is the update's rank: Theorem E.2.
    ranks = [_matrix_rank(A) * _matrix_rank(B) for A, B in layer.factors(name)]
    return min(sum(ranks), layer.shapes(name).highest_rank)


def _matrix_rank(factor: Tensor) -> int:
    return int(torch.linalg.matrix_rank(factor.detach().float()))


def _cells(layers: list[LayerReport]) -> list[str]:
    shapes, update = layers[0].shapes, layers[0].update
    kernel = "".join(f" × {side}" for side in update.kernel)
    through = "" if update.b_rank is None else f" × {update.b_rank}"
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    has = "–".join(map(str, ranks[:1] + ranks[1:][-1:])) or "?"
    return [
        f"{shapes.d} × {shapes.h}{kernel}",
        (f"{update.num_terms} × " if update.num_terms > 1 else "") + f"{shapes.a1} × {shapes.a2}",
        f"{shapes.b1}{through} × {shapes.b2}{kernel}",
        f"{sum(layer.parameters for layer in layers):,}",
        f"{sum(layer.lora_parameters for layer in layers):,}",
        f"{has} / {layers[0].highest_rank}",
        f"{_predicted_steps(layers[:1], TOKENS, BALANCE)['KronA']:.2f}",
    ]
