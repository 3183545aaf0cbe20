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
from serving.config import Device, ServeConfig
from serving.feedback.store.opening import default_database
from serving.http.ingress import Ingress, ModelDeployments
from serving.registry.lease import LeaseTaken, lease_of
from serving.registry.model_id import ModelId
from serving.registry.models import EndpointModel, ServedModels, publish_models
from serving.registry.nodes import check_nodes
from serving.registry.served_model import registry_of
from serving.replica.candidate import CANDIDATE_NAME
from serving.replica.engine import CandidateEngine, Engine
from serving.replica.engine_arguments import EngineSettings
from serving.replica.routing import ConversationRouter
from serving.replica.scoring import MAX_BATCH, SCORING_NAME, Scoring

logger = logging.getLogger("ray.serve")

INGRESS_NAME = "ingress"
ENGINE_NAME = "engine"
"""Names of the deployments. A Serve config file overrides the options of a deployment by its name."""
INGRESS_CPUS = 0.1
REPLICA_CPUS = 1.0
SCORING_CPUS = 0.1
INGRESS_REQUESTS = 10_000
"""Most requests in progress in an ingress, which only passes them on."""
LOOK_BACK_S = 15.0
"""Seconds over which autoscaling averages the requests in progress; Ray counts them every 10 s."""
METRICS_S = 2.0
"""Seconds between two reports of that number; Ray Serve needs several reports in the time above."""
CANDIDATE_IDLE_S = 5.0
"""Seconds after the end of a canary of whole weights within which its replica ends."""
SCORING_DRAIN_S = 60.0
"""Seconds that a scorer that stops has for the requests in progress."""
SCORING_IDLE_S = 600.0
"""Seconds without a request after which a scorer ends, if more of them run than have to."""


def build(args: dict[str, Any]) -> Application:
    """Builds the application from the fields of `ServeConfig`. The import path for `serve run` is `serving:build`.

    Ray calls this again whenever the configuration changes or the head starts again. If the registry belongs to another
    cluster's endpoint, for example while this endpoint replaces that one, nothing in the registry changes.

    Raises:
        ConfigError: a field is unknown, missing or out of range; the text has a line for every problem.
        ClusterError: the Ray cluster answers also clients without its token.
        AlignmentError: the checkpoint cannot be served (see `serving.registry.served_model.publish`).
        LeaseTaken: the registry belongs to another endpoint, and `on_lease` is `refuse`.
    """
    config = check_config(args, kind=ServeConfig)
    if config.no_keys:
        raise ConfigError(
            "no_keys: is for `raylign serve` on 127.0.0.1; what listens here is Ray Serve's own http_options, which "
            "this configuration does not choose, so requests need keys: `raylign keys create`"
        )
    if ray.is_initialized():  # in a cluster that something else has started, as KubeRay
        check_token(ray.get_runtime_context().gcs_address)
    owner, registry = cluster_id() or secrets.token_hex(8), registry_of(config)
    if ray.is_initialized():
        check_nodes(registry, config.feedback.database or default_database(registry.folder))
    lease = lease_of(registry)
    may_promote = lease is None or lease.owner.startswith(f"{owner}/")
    if lease is not None and not may_promote:
        if config.on_lease == "refuse":
            raise LeaseTaken.at_start(lease, registry)
        logger.warning("The registry belongs to %s. Until that has ended, this one changes no versions.", lease)
    publication = publish_models(config, is_live=lease is not None, may_promote=may_promote)
    for note in publication.notes:
        logger.warning("%s", note)
    return application(config, publication.models, owner)


def cluster_id() -> str | None:
    """Returns an id that no other Ray cluster has; None where no cluster is connected."""
    if not ray.is_initialized():
        return None
    return str(ray._private.worker.global_worker.gcs_client.cluster_id.hex())


def application(config: ServeConfig, models: ServedModels[EndpointModel], owner: str) -> Application:
    """Builds the application for checkpoints that are published already; publishing a large one takes a while.

    Args:
        models: the models, each with the version that answers at the start.
        owner: owner of the registry's lease (see `serving.registry.lease`). Without a `/` it is a cluster, and each of
            its applications becomes an owner of its own.
    """
    limits = config.limits_on(choose_device(config), num_cores=len(os.sched_getaffinity(0)))
    deployments = {str(name): _model_deployments(model, suffix=_suffix(models, name)) for name, model in models.items()}
    ingress = serve.deployment(serve.ingress()(Ingress), name=INGRESS_NAME, **_ingress_options(config))
    return ingress.bind(config.model_copy(update={"limits": limits}), models, owner, deployments)


def deployment_names(models: ServedModels[EndpointModel], model_id: ModelId) -> tuple[str, ...]:
    """Returns the names of a model's deployments; those of the first model have the names that a Serve config file
    gives them."""
    return tuple(name + _suffix(models, model_id) for name in (ENGINE_NAME, SCORING_NAME, CANDIDATE_NAME))


def _suffix(models: ServedModels[EndpointModel], model_id: ModelId) -> str:
    return "" if model_id == models.first.id else f"-{model_id.folder_name}"


def _model_deployments(model: EndpointModel, *, suffix: str) -> ModelDeployments[Application]:
    """Returns the deployments of a model.

    Args:
        suffix: the end of their names, by which they differ from those of other models.
    """
    config, folder = model.config, str(model.registry.folder)
    device = choose_device(config)
    settings = EngineSettings(config=config, registry=folder, device=device)
    engine = serve.deployment(Engine, name=ENGINE_NAME + suffix, **_engine_options(config, device)).bind(settings)
    scoring = serve.deployment(Scoring, name=SCORING_NAME + suffix, **_scoring_options(config, device))
    candidate = None
    if model.served_model.base_name is None:
        options = _candidate_options(config, device)
        candidate = serve.deployment(CandidateEngine, name=CANDIDATE_NAME + suffix, **options).bind(settings)
    scorer = scoring.bind(config, _scoring_device(config, device), folder)
    return ModelDeployments(engine=engine, scoring=scorer, candidate=candidate)


def choose_device(config: ServeConfig) -> Device:
    """Returns where the engine runs. It asks Ray, if the configuration leaves it open."""
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def _ingress_options(config: ServeConfig) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": INGRESS_CPUS},
        "max_ongoing_requests": INGRESS_REQUESTS,  # the engine's own limits count
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
        # A scorer that still waits for a GPU ends no sooner, and an endpoint that ends waits for it.
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
        "health_check_period_s": 2.0,  # so that an engine that died is replaced soon
        # Each attempt loads the whole model. What failed twice (memory, a bad file) would fail a third time.
        "max_constructor_retry_count": 2,
    }


def _candidate_options(config: ServeConfig, device: Device) -> dict[str, Any]:
    """Returns the engine's options, but there is no replica until one is asked to stay."""
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
    """Returns the replica's process and its first GPU as one bundle, and one bundle per further GPU."""
    if device == "cpu":
        return [{"CPU": REPLICA_CPUS}]
    return [{"CPU": REPLICA_CPUS, "GPU": 1.0}] + [{"GPU": 1.0}] * (config.tensor_parallel_size - 1)
