"""Scores of generated images: CLIP-I, CLIP-T and DINO as the paper defines them, LPIPS, and drift."""

from typing import TYPE_CHECKING

from ..lazy import loaded_at_first_use

__all__ = [
    "Encoders",
    "Evaluation",
    "EvaluationError",
    "ImageFolders",
    "Lpips",
    "Score",
    "SheetSettings",
    "SubjectScores",
    "draw_sheet",
    "evaluate_folders",
    "evaluate_subject",
    "find_images",
    "measure_drift",
]

CLIP = "openai/clip-vit-base-patch32"
"""The paper's encoder for CLIP-I and CLIP-T: ViT-B/32 (Appendix C)."""

DINO = "facebook/dino-vits16"
"""The paper's encoder for DINO: ViT-S/16 (Appendix C)."""

VGG16 = "timm/vgg16.tv_in1k"
"""Weights of torchvision's VGG-16 in safetensors, for LPIPS."""

if TYPE_CHECKING:
    from ..errors import EvaluationError
    from .encoders import Encoders
    from .evaluate import evaluate_folders, evaluate_subject, measure_drift
    from .folders import ImageFolders, find_images
    from .metrics import Score
    from .perceptual import Lpips
    from .result import Evaluation, SubjectScores
    from .settings import SheetSettings
    from .sheet import draw_sheet
else:
    __getattr__ = loaded_at_first_use(
        __name__,
        __all__,
        "..errors",
        ".settings",
        ".metrics",
        ".result",
        ".folders",
        ".sheet",
        ".perceptual",
        ".encoders",
        ".evaluate",
    )
