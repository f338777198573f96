"""The studies by name, in the order in which they are worth running."""

from __future__ import annotations

from ..study import Study
from .beyond import Beyond
from .factors import Factors
from .init import Init
from .methods import Methods
from .modules import Modules
from .rank import Rank
from .sampling import Guidance, Images, InferenceSteps, Steps
from .stability import Stability

STUDIES: dict[str, type[Study]] = {
    study.name: study
    for study in (Stability, Methods, Factors, Init, Modules, Steps, Images, Guidance, InferenceSteps, Rank, Beyond)
}
