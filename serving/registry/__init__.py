"""The registry: the versions of the served model, which of them answers, and how that changes."""
