"""Ray Serve LLM without raylign, for `raylign bench serve` to compare with.

`python -m serving.bench.ray_serve_llm MODEL PORT MAX_NUM_SEQS`
"""

from __future__ import annotations

import logging
import sys
import threading

from cluster.ray_access import require_token
from serving.bench.servers import MODEL_NAME, engine_settings
from serving.launch import OBJECT_STORE_BYTES


def main(model: str, port: int, max_num_seqs: int) -> None:
    """Serves a model until the process is ended."""
    require_token()
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    ray.init(
        num_cpus=4,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {name.replace("-", "_"): value for name, value in engine_settings(max_num_seqs).items()}
    config = LLMConfig(
        model_loading_config={"model_id": MODEL_NAME, "model_source": model},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        engine_kwargs={**settings, "enforce_eager": True, "enable_chunked_prefill": False},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), route_prefix="/")
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
