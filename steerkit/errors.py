"""Every error that steerkit raises on purpose, and its one warning.

    SteerkitError
    ├── AmountError (ValueError)              a magnitude or a bound that cannot be applied
    ├── ArtefactError (ValueError)            a file that is damaged, foreign or cannot be written
    ├── AttachError (RuntimeError)            a Controller used at the wrong moment
    ├── BaseModelMismatchError (ValueError)   an artefact that belongs to another model
    ├── CalibrationError (ValueError)         a target or a budget that no amount meets
    ├── ConditionError (ValueError)           a condition or a schedule that decides nothing
    ├── DependentConceptsError (ValueError)   bounds at one layer that cannot all be met
    ├── LayerError (IndexError)               a layer that does not exist
    ├── MissingDependencyError (ImportError)  an optional package that is not installed
    ├── NotReachedError (RuntimeError)        a steering request that no row received
    ├── ObjectiveError (ValueError)           objectives, weights or a Gramian that cannot be combined
    ├── PairsError (ValueError)               preference pairs that cannot be trained on
    ├── PolicyError (ValueError)              a policy that no preference vector can be taken from
    ├── ReportError (ValueError)              figures that cannot be compared, or that are not there
    ├── RewardError (ValueError)              a reward function that failed, or what it returned
    ├── SamplesError (ValueError)             amounts for another number of samples than the batch has
    ├── ScorerError (ValueError)              a scorer that failed, or what it returned
    ├── TextsError (ValueError)               texts that cannot be read or fitted
    ├── TrainingError (RuntimeError)          a training run that broke one of its promises
    └── UnsupportedModelError (TypeError)     a model whose blocks cannot be steered correctly
    SteerkitWarning (UserWarning)             the result is valid and probably not what you want

Each inherits the builtin that a caller would expect and keeps the offending values as attributes. Messages say
what is required, what was found and what to do.
"""

from typing import Any


class SteerkitError(Exception):
    """Base class; keyword arguments become attributes, so that a caller can act on the values."""

    def __init__(self, message: str, **values: Any) -> None:
        super().__init__(message)
        self.__dict__.update(values)


class AmountError(SteerkitError, ValueError):
    """A magnitude or a bound is not a number, not finite, not a probability, or of the wrong shape."""


class ArtefactError(SteerkitError, ValueError):
    """A file is not a steerkit artefact, is damaged, or cannot be written."""


class AttachError(SteerkitError, RuntimeError):
    """A Controller was attached twice, to a compiled model, or used while detached."""


class BaseModelMismatchError(SteerkitError, ValueError):
    """An artefact was made on another model than the one it is used with."""


class CalibrationError(SteerkitError, ValueError):
    """A target cannot be reached, or a budget is broken by the smallest amount; `curve` holds what was tried."""


class ConditionError(SteerkitError, ValueError):
    """A condition or a schedule is of the wrong kind, always holds, never holds, or would change nothing."""


class DependentConceptsError(SteerkitError, ValueError):
    """Two bounds at one layer cannot be met together."""


class LayerError(SteerkitError, IndexError):
    """A layer index does not exist, in the model or in the concept."""


class MissingDependencyError(SteerkitError, ImportError):
    """An optional package is needed and not installed."""


class NotReachedError(SteerkitError, RuntimeError):
    """No forward pass took an intervention to any position."""


class ObjectiveError(SteerkitError, ValueError):
    """Objectives cannot be combined: a preference off the simplex, a negative power, no Gramian, no parameters."""


class PairsError(SteerkitError, ValueError):
    """Preference pairs are missing, incomplete, equal on both sides, or too few."""


class PolicyError(SteerkitError, ValueError):
    """A policy's change of the weights cannot be read, is zero, is not finite, or is not of the form asked for."""


class ReportError(SteerkitError, ValueError):
    """Arms of a report are of other prompts or share a name, or an arm or measure is not there."""


class RewardError(SteerkitError, ValueError):
    """A reward function raised, or returned NaN, infinity, no number, or another number of rewards than completions."""


class SamplesError(SteerkitError, ValueError):
    """Per-sample amounts were given for another number of samples than the forward pass holds."""


class ScorerError(SteerkitError, ValueError):
    """A scorer raised, or returned NaN, infinity, no number, or another number of scores than completions."""


class TextsError(SteerkitError, ValueError):
    """Texts are missing, too few, of the wrong type, or cannot be tokenised."""


class TrainingError(SteerkitError, RuntimeError):
    """A run did not start from its reference, the twins did not see the same rows, or a folder holds another run."""


class UnsupportedModelError(SteerkitError, TypeError):
    """The model is not a decoder whose blocks hand one residual stream from each to the next."""


class SteerkitWarning(UserWarning):
    """Something is valid and probably not wanted, such as a probe at chance."""
