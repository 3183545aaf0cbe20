"""`raylign bench serve`, the benchmark of the endpoint: its costs beside plain vLLM and beside Ray Serve LLM alone."""
