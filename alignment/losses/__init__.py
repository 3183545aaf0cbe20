"""Losses as pure functions of tensors, per pair or per token; the training step reduces them."""
