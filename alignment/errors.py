"""What can go wrong, by the place in the circle where it does. All are picklable: they cross Ray's process borders."""


class AlignmentError(Exception):
    """Base of every error that raylign raises on purpose; its text is written for the person who has to act on it."""


class ConfigError(AlignmentError):
    """The run cannot start as configured: unknown key, value out of range, two settings that exclude each other."""


class DataError(AlignmentError):
    """The preference data cannot be used: unreadable source, or more bad rows than the configuration allows."""


class NoPreference(DataError):
    """A row is in order, and there is nothing in it to learn from: it prefers none of its answers, as a tie does."""

    reason = "that prefer no answer"
    """What such rows are, for the account of what was left out."""


class NothingToImitate(NoPreference):
    """A row is in order, and its answers are rated bad, or no better than each other."""

    reason = "whose answers are not rated good"


class WithoutWeight(NoPreference):
    """A row is in order, and its weight of 0 says that it is not to be learned from."""

    reason = "of weight 0"


class ModelError(AlignmentError):
    """A model or tokenizer cannot be loaded, or cannot do what the algorithm needs."""


class DivergenceError(AlignmentError):
    """The loss or the gradient is no longer finite; raised before anything poisoned is written to a checkpoint."""


class RolloutError(AlignmentError):
    """Completions could not be sampled: an engine failed or was late, more often than it is restarted."""


class RewardError(AlignmentError):
    """A reward is missing, late or not a number, after the attempts that the configuration allows."""


class GuardError(AlignmentError):
    """A guard has stopped the run; the text says which, at which step, and the figure."""


class CheckpointError(AlignmentError):
    """A checkpoint is damaged, incomplete, or belongs to another run."""


class ClusterError(AlignmentError):
    """The machines could not finish the run: workers died more often than allowed, or Ray could not be reached."""


class ServingError(AlignmentError):
    """The endpoint cannot be started as asked."""
