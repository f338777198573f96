"""What can go wrong with scores, as an error that a caller may want to catch."""

from ..errors import KronAError


class EvaluationError(KronAError):
    """An encoder cannot be had or does not fit, or the images to compare do not go together."""
