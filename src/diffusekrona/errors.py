"""The errors that a caller may want to catch. Each is a `ValueError` whose text says what was found and what to do."""


class KronAError(ValueError):
    """Base of every error that diffusekrona raises on purpose."""


class ConfigError(KronAError):
    """A `KronAConfig` field holds a value that no layer could use."""


class FactorShapeError(KronAError):
    """A layer's size is not divisible by the factors asked for it, or the layer is not linear."""


class AdapterNameError(KronAError):
    """An adapter name is taken, or no adapter has it."""


class AdapterFileError(KronAError):
    """An adapter file is missing, damaged, not finite, or made for another architecture."""


class MergeError(KronAError):
    """A merge would give non-finite weights, or the weights to unmerge are not the ones that were merged."""


class DatasetError(KronAError):
    """Images, or the captions beside them, are missing, unreadable or unusable."""
