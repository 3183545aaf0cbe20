"""Replicas: the engine and the scorer that answer, how they are chosen and asked, and what runs inside them."""
