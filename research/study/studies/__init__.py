"""The studies by name, in the order in which they are worth running."""

from __future__ import annotations

from ..study import Study
from .beyond import Beyond
from .configurations import FactorShapes, Init, Modules
from .methods import Methods
from .rank import Rank
from .sampling import Guidance, Images, InferenceSteps, Steps
from .stability import Stability

STUDIES: dict[str, type[Study]] = {
    study.name: study
    for study in (
        Stability,
        Methods,
        FactorShapes,
        Init,
        Modules,
        Steps,
        Images,
        Guidance,
        InferenceSteps,
        Rank,
        Beyond,
    )
}
