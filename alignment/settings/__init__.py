"""Settings: every key of a run's YAML file, and how a file becomes a checked configuration."""
