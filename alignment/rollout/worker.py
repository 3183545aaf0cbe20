"""Rollout's foothold in vLLM: importing this module is what makes a process one of our engines'.

vLLM imports it where an engine's weights are, because engines of ours name it as their `worker_extension_cls`. A plugin
of vLLM would be loaded in other people's processes too, and only where raylign is installed, not where its code is.
"""

from alignment.rollout.weights import install

install()


class EngineWorker:
    """Adds nothing to vLLM's worker."""
