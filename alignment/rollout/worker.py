"""vLLM imports this module in the processes of our engines, and the import prepares those processes.

Our engines name `EngineWorker` as their `worker_extension_cls`, so vLLM imports this module in the process that holds
an engine's weights. A plugin of vLLM would not do: it would also be loaded by engines that are not ours, and it would
need raylign to be installed, while this module only needs raylign's code.
"""

from alignment.rollout.weights import install

install()


class EngineWorker:
    """Adds no method to vLLM's worker; the import of its module is what matters."""
