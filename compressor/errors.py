"""Errors a user can cause. Each message is one line: what came, what was expected, what to do."""


class CompressorError(Exception):
    """Base of every error a user can cause; the command line prints it in one line and exits with code 2."""


class Interrupted(Exception):  # noqa: N818  (it is no error)
    """Ctrl-C, on its way through the command line."""


class RecipeError(CompressorError):
    """A setting, flag or recipe that cannot be used."""


class ModelError(CompressorError):
    """A model that cannot be found, loaded, scored or pruned."""


class DataError(CompressorError):
    """A dataset that cannot be found or read, or that has nothing to offer."""


class PlanError(CompressorError):
    """A pruning plan or a target that does not fit the model."""


class ArtefactError(CompressorError):
    """A directory of results that is missing, damaged, in the way, or of another model."""
