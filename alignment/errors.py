"""The errors that raylign raises. All can be pickled, because Ray sends them from one process to another."""


class AlignmentError(Exception):
    """Base of every error that raylign raises on purpose; its text says what happened and what to do."""


class ConfigError(AlignmentError):
    """The run cannot start as configured: unknown key, value out of range, two settings that exclude each other."""


class DataError(AlignmentError):
    """The preference data cannot be used: unreadable source, or more bad rows than the configuration allows."""


class NoPreference(DataError):
    """A row is valid, and it has nothing to train on: it prefers none of its answers, as a tie does."""

    reason = "that prefer no answer"
    """Describes such rows, for the report of rows that were left out."""


class NothingToImitate(NoPreference):
    """A row is valid, and none of its answers should be imitated: they are rated bad, or all the same."""

    reason = "whose answers are not rated good"


class WithoutWeight(NoPreference):
    """A row is valid, and its weight of 0 says that it is not trained on."""

    reason = "of weight 0"


class ModelError(AlignmentError):
    """A model or tokenizer cannot be loaded, or cannot do what the algorithm needs."""


class DivergenceError(AlignmentError):
    """The loss or the gradient is no longer finite; it is raised before a checkpoint with such weights is written."""


class RolloutError(AlignmentError):
    """Completions could not be sampled: an engine failed or was late more often than it may be restarted."""


class EngineLost(RolloutError):
    """The engine has died. Its work can be given to another engine, or to the same one after a restart."""


class RewardError(AlignmentError):
    """A reward is missing, late or not a number, after the attempts that the configuration allows."""


class ConversationError(AlignmentError):
    """An environment of one's own has failed, or does not keep its contract; the text names it and the row."""


class GuardError(AlignmentError):
    """A guard has stopped the run; the text says which guard, at which step, and with which value."""


class CheckpointError(AlignmentError):
    """A checkpoint is damaged, incomplete, or belongs to another run."""


class StorageError(CheckpointError):
    """A storage of checkpoints does not answer, or does not take what it is given."""


class ClusterError(AlignmentError):
    """The machines could not finish the run: workers died more often than allowed, or Ray could not be reached."""


class ServingError(AlignmentError):
    """The endpoint cannot be started or changed as configured."""
