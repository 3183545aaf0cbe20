"""vLLM as this project runs it, for rollout engines and for the replicas of an endpoint.

vLLM is imported inside functions, because the import takes 10 s and only processes with an engine need it.
"""
