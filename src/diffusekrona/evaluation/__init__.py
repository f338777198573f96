"""Scores of generated images: CLIP-I, CLIP-T and DINO as the paper defines them, and drift."""

from ..errors import EvaluationError
from .encoders import Encoders
from .evaluate import evaluate_folders, evaluate_subject, measure_drift
from .folders import ImageFolders, find_images
from .metrics import Score
from .result import Evaluation, SubjectScores

__all__ = [
    "Encoders",
    "Evaluation",
    "EvaluationError",
    "ImageFolders",
    "Score",
    "SubjectScores",
    "evaluate_folders",
    "evaluate_subject",
    "find_images",
    "measure_drift",
]
