"""The HTTP front: checks of requests, routes, the web page and the metrics. It imports neither vLLM nor torch."""
