"""Builds the endpoint as a Ray Serve application: an ingress in front of an autoscaled engine."""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from alignment.errors import ConfigError
from alignment.settings.load import check_config
from cluster.ray_access import check_token
from serving.candidate import CANDIDATE_NAME
from serving.config import Device, ServeConfig
from serving.engine import CandidateEngine, Engine, EngineSettings
from serving.ingress import Ingress
from serving.lease import LeaseTaken, lease_of
from serving.nodes import check_nodes
from serving.registry import Registry
from serving.routing import ConversationRouter
from serving.scoring import MAX_BATCH, SCORING_NAME, Scoring
from serving.served import ServedModel, publish, registry_of
from serving.store.opening import default_database

logger = logging.getLogger("ray.serve")

INGRESS_NAME = "ingress"
ENGINE_NAME = "engine"
"""The deployments' names; a Serve config file overrides a deployment's options by it."""
INGRESS_CPUS = 0.1
REPLICA_CPUS = 1.0
SCORING_CPUS = 0.1
AT_ONCE = 10_000
"""Requests in progress in a replica that only passes on."""
LOOK_BACK_S = 15.0
"""Over which autoscaling takes the mean of what there is to do; longer than Ray counts it, which is every 10 s."""
METRICS_S = 2.0
"""Between two reports of it; Ray Serve wants several of them in the time above."""
CANDIDATE_IDLE_S = 5.0
"""Seconds after the end of a canary of whole weights in which its replica ends."""
SCORING_DRAIN_S = 60.0
"""Seconds that what is being rated still gets when a scorer stops."""
SCORING_IDLE_S = 600.0
"""Seconds without a request after which a scorer that nobody wants to keep ends."""


def build(args: dict[str, Any]) -> Application:
    """Builds the application from the fields of `ServeConfig`; the import path for `serve run` is `serving:build`.

    Ray builds again whenever the configuration changes or the head starts again. Where another cluster's endpoint has
    the registry, as while this one is to replace it, nothing changes there.

    Raises:
        ConfigError: a field is unknown, missing or out of range; the text has a line for every problem.
        ClusterError: the Ray cluster answers those who have not its token.
        AlignmentError: the checkpoint cannot be served (see `serving.served.publish`).
        LeaseTaken: another endpoint has the registry, and `on_lease` is `refuse`.
    """
    config = check_config(args, kind=ServeConfig)
    if config.no_keys:
        raise ConfigError(
            "no_keys: is for `raylign serve` on 127.0.0.1; what listens here is Ray Serve's own http_options, which "
            "this configuration does not choose, so requests need keys: `raylign keys create`"
        )
    if ray.is_initialized():  # in a cluster that others have started, as KubeRay
        check_token(ray.get_runtime_context().gcs_address)
    owner, registry = cluster_id() or secrets.token_hex(8), registry_of(config)
    if ray.is_initialized():
        check_nodes(registry, config.feedback.database or default_database(registry.folder))
    lease = lease_of(registry)
    if lease is not None and not lease.owner.startswith(f"{owner}/"):
        if config.on_lease == "refuse":
            raise LeaseTaken.at_start(lease, registry)
        logger.warning("The registry belongs to %s. Until that has ended, this one changes no versions.", lease)
        config = config.model_copy(update={"promote": False})
    publication = publish(config, is_live=lease is not None)
    if publication.note:
        logger.warning("%s", publication.note)
    return application(config, publication.served_model, registry, owner)


def cluster_id() -> str | None:
    """What no other Ray cluster is called; None where none is connected."""
    if not ray.is_initialized():
        return None
    return str(ray._private.worker.global_worker.gcs_client.cluster_id.hex())


def application(config: ServeConfig, served: ServedModel, registry: Registry, owner: str) -> Application:
    """The same for a checkpoint that is published already, since proving a large one takes a while.

    Args:
        owner: of the registry's lease (see `serving.lease`); without a `/` a cluster's, and each application's of it is
            another one.
    """
    device = choose_device(config)
    limits = config.limits_on(device, num_cores=len(os.sched_getaffinity(0)))
    config = config.model_copy(update={"limits": limits})
    folder = str(registry.folder)
    settings = EngineSettings(config=config, registry=folder, device=device)
    engine = serve.deployment(Engine, name=ENGINE_NAME, **_engine_options(config, device)).bind(settings)
    scoring = serve.deployment(Scoring, name=SCORING_NAME, **_scoring_options(config, device))
    ingress = serve.deployment(serve.ingress()(Ingress), name=INGRESS_NAME, **_ingress_options(config))
    candidate = None
    if served.base_name is None:
        options = _candidate_options(config, device)
        candidate = serve.deployment(CandidateEngine, name=CANDIDATE_NAME, **options).bind(settings)
    scorer = scoring.bind(config, _scoring_device(config, device), folder)
    return ingress.bind(engine, candidate, scorer, config, served, folder, owner)


def choose_device(config: ServeConfig) -> Device:
    """Where the engine runs, after asking Ray if the configuration leaves it open."""
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def _ingress_options(config: ServeConfig) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": INGRESS_CPUS},
        "max_ongoing_requests": AT_ONCE,  # the limits are the engine's
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _scoring_device(config: ServeConfig, device: Device) -> Device:
    return device if config.rewards.num_gpus else "cpu"


def _scoring_options(config: ServeConfig, device: Device) -> dict[str, Any]:
    gpus = config.rewards.num_gpus if device == "cuda" else 0.0
    return {
        "ray_actor_options": {"num_cpus": SCORING_CPUS, "num_gpus": gpus},
        "autoscaling_config": {
            "min_replicas": config.rewards.min_replicas,
            "max_replicas": config.rewards.max_replicas,
            "target_ongoing_requests": MAX_BATCH,
            "downscale_delay_s": SCORING_IDLE_S,
        },
        "max_ongoing_requests": 2 * MAX_BATCH,  # one batch in progress, one waiting
        "max_queued_requests": config.max_queued_requests,
        # One that still waits for a GPU ends no sooner, and an endpoint that ends waits for it.
        "graceful_shutdown_timeout_s": min(config.drain_timeout_s, SCORING_DRAIN_S),
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 2,
    }


def _engine_options(config: ServeConfig, device: Device) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": REPLICA_CPUS},
        "placement_group_bundles": _bundles(config, device),
        "placement_group_strategy": "PACK",
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_S,
            "metrics_interval_s": METRICS_S,
        },
        "request_router_config": RequestRouterConfig(request_router_class=ConversationRouter),
        "max_ongoing_requests": config.max_num_seqs,
        "max_queued_requests": config.max_queued_requests,
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,  # an engine that died is replaced
        # Each attempt loads the whole model, and what failed twice (memory, a bad file) fails a third time.
        "max_constructor_retry_count": 2,
    }


def _candidate_options(config: ServeConfig, device: Device) -> dict[str, Any]:
    """As of the engine; there is no replica until one is asked to stay."""
    return _engine_options(config, device) | {
        "autoscaling_config": {
            "min_replicas": 0,
            "max_replicas": 1,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": CANDIDATE_IDLE_S,
            "look_back_period_s": CANDIDATE_IDLE_S,
            "metrics_interval_s": METRICS_S,
        },
    }


def _bundles(config: ServeConfig, device: Device) -> list[dict[str, float]]:
    """The replica's process and its first GPU together, then one bundle per further GPU."""
    if device == "cpu":
        return [{"CPU": REPLICA_CPUS}]
    return [{"CPU": REPLICA_CPUS, "GPU": 1.0}] + [{"GPU": 1.0}] * (config.tensor_parallel_size - 1)
