"""All methods at their best learning rates (Tables 3, 4 and 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..cells import BASE, Arm, Cell, Spec
from ..figures import against, beside
from ..markdown import arms_table, difference_table, learning_rate, number
from ..records import Records
from ..results import Results, best_of_each, quality
from ..settings import StudySettings
from ..study import Page, Study, spec_of

ADAPTERS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
WEIGHTS = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5)
"""Learning rates to choose from: for adapters, and for weights of the base itself."""

UNTRAINED = Arm("the base as it is", Spec(BASE))


@dataclass(frozen=True)
class Methods(Study):
    """Each method's learning rate is chosen from as many as any other's, on some subjects with a seed of its own.

    Args:
        methods: by label: the method's name, its options, and `rates`, the learning rates to choose from.
        search_subjects: how many of the open subjects the choice is made on.
        search_seeds: of the choice, apart from those of the comparison.
    """

    subjects: int | None = 6
    seeds: tuple[int, ...] = (0, 1)
    methods: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "KronA (4, 64)": {"method": "krona", "a1": 4, "a2": 64, "rates": ADAPTERS},
            "KronA (8, 64)": {"method": "krona", "a1": 8, "a2": 64, "rates": ADAPTERS},
            "KronA (4, 64), 2 terms": {"method": "krona", "a1": 4, "a2": 64, "num_terms": 2, "rates": ADAPTERS},
            "LoRA r=4": {"method": "lora", "rank": 4, "rates": ADAPTERS},
            "LoKr, factor 8": {"method": "lokr", "factor": 8, "rates": ADAPTERS},
            "LoHa r=4": {"method": "loha", "rank": 4, "rates": ADAPTERS},
            "SVDiff": {"method": "svdiff", "rates": ADAPTERS},
            "Custom Diffusion": {"method": "custom-diffusion", "rates": WEIGHTS},
            "DreamBooth": {"method": "dreambooth", "rates": WEIGHTS},
        }
    )
    search_subjects: int = 2
    search_seeds: tuple[int, ...] = (100,)

    name: ClassVar[str] = "methods"
    question: ClassVar[str] = (
        "KronA keeps more of the subject and follows the text better than LoRA, LoKr, LoHa, SVDiff, Custom Diffusion "
        "and DreamBooth, with the fewest parameters (Tables 3, 4 and 7)."
    )

    afterwards: ClassVar[str] = "each method at its best learning rate, if these are the search; then the page"

    def arms(self) -> Sequence[Arm]:
        """Every method at every learning rate."""
        return [arm for label in self.methods for arm in self._line(label)]

    def cells(self, settings: StudySettings, records: Records) -> list[Cell]:
        """The search, and once that is done, each method at its best learning rate."""
        search = self._search_cells(settings)
        if any(cell not in records for cell in search):
            return search
        compared = self._compared(self._search().results(settings, records))
        return [*search, *self.plain_cells(settings, [*compared, UNTRAINED])]

    def page(self, results: Results) -> Page:
        """Scores, parameters, file sizes and costs at the best learning rates, and what was chosen from."""
        search = self._search().results(results.settings, results.records)
        compared = self._compared(search)
        more = {
            "learning rate": learning_rate,
            "parameters": number(results, "parameters", ",.0f"),
            "memory": number(results, "memory", ",.1f", 1e6),
            "file": number(results, "bytes", ",.0f", 1e3),
            "ms a step": number(results, "seconds_per_step", ".0f", 1e-3),
        }
        note = (
            "Memory, in MB, is what a step takes beside the weights: gradients, AdamW's moments and what is kept for "
            "the backward pass; files are in kB; ms a step is beside the study's other processes. The differences are "
            f"those of each subject and seed to {compared[0].label}'s."
        )
        differences = difference_table(compared[1:], compared[0], results)
        table = arms_table([*compared, UNTRAINED], results, more)
        text = "\n\n".join([table, note, differences, self._searched(search)])
        return Page(text, {self.name: against(compared, results), **beside(self.name, [*compared, UNTRAINED], results)})

    def _line(self, label: str) -> list[Arm]:
        method = {name: value for name, value in self.methods[label].items() if name != "rates"}
        rates = self.methods[label]["rates"]
        return [Arm(label, spec_of(method, learning_rate=rate), series=label, x=rate) for rate in rates]

    def _search(self) -> Study:
        """The study of the learning rates, on subjects and seeds of its own."""
        return Methods(self.search_subjects, self.search_seeds, self.methods, self.search_subjects, self.search_seeds)

    def _search_cells(self, settings: StudySettings) -> list[Cell]:
        """Of all methods that have more than one learning rate to choose from."""
        unsettled = [label for label in self.methods if len(self._line(label)) > 1]
        return self._search().plain_cells(settings, [arm for label in unsettled for arm in self._line(label)])

    def _compared(self, search: Results) -> list[Arm]:
        """The arms that the search leaves to compare. Differences are to the first."""
        return best_of_each(self.arms(), search)

    def _searched(self, search: Results) -> str:
        """The search's outcome, as a Markdown table."""
        lines = ["The search:", "", "| | quality at each learning rate |", "|---|---|"]
        for label in self.methods:
            line = self._line(label)
            found = [f"{quality(search, arm).mean:.3f} at {arm.x:g}" for arm in line] if len(line) > 1 else ["one only"]
            lines.append(f"| {label} | {', '.join(found)} |")
        return "\n".join(lines)
