"""Rollout: completions sampled from a model."""
