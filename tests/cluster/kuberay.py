"""The rules a KubeRay file of ours must keep, as plain functions over its parsed documents.

First the schema (kuberay_schema.json, strict), then what no schema knows: that versions agree, that the files mean what
our own code reads, that nothing runs as root or without limits, that the network lets in only what is needed. A check
yields its complaints as sentences, none if all is well. test_cluster_files.py breaks good files to prove that every
check bites.
"""

import ipaddress
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import ray
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from alignment.config import check_config
from alignment.errors import ConfigError
from cluster.config import load_run
from cluster.plan import plan
from serving.app import ENGINE_NAME, INGRESS_NAME, REPLICA_CPUS
from serving.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"raylign:{PROJECT['version']}-gpu"
CLAIM = yaml.safe_load((ROOT / "configs" / "cluster" / "storage.yaml").read_text())["metadata"]["name"]

Document = dict[str, Any]  # one YAML document, as parsed


def kuberay_problems(documents: list[Document]) -> list[str]:
    """What is wrong with a KubeRay file."""
    by_schema = [problem for document in documents for problem in schema_problems(document)]
    if by_schema:
        return by_schema  # what follows takes for granted what the schema promises
    resource = next(document for document in documents if document["kind"] in ("RayJob", "RayService"))
    cluster, pods = cluster_of(resource), pods_of(resource)
    return [
        *version_problems(cluster, pods),
        *scaling_problems(cluster),
        *access_problems(cluster),
        *(problem for name, pod in pods.items() for problem in pod_problems(name, pod)),
        *container_problems("autoscaler", cluster.get("autoscalerOptions", {})),
        *network_problems(documents, pods),
        *(job_problems(resource["spec"]) if resource["kind"] == "RayJob" else service_problems(resource["spec"])),
    ]


def schema_problems(document: Document) -> Iterator[str]:
    if document.get("kind") not in SCHEMA["$defs"]:
        yield f"kind {document.get('kind')} is none we ship"
        return
    schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"{document['kind']}.{'.'.join(map(str, error.absolute_path))}: {error.message}"


def cluster_of(resource: Document) -> Document:
    """The RayCluster inside a RayJob or RayService."""
    cluster: Document = resource["spec"]["rayClusterSpec" if resource["kind"] == "RayJob" else "rayClusterConfig"]
    return cluster


def pods_of(resource: Document) -> dict[str, Document]:
    """Pod templates by name: head, every worker group, and the submitter of a RayJob."""
    cluster = cluster_of(resource)
    pods = {"head": cluster["headGroupSpec"]["template"]}
    pods |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in resource["spec"]:
        pods["submitter"] = resource["spec"]["submitterPodTemplate"]
    return pods


def version_problems(cluster: Document, pods: dict[str, Document]) -> Iterator[str]:
    if cluster.get("rayVersion") != ray.__version__:
        yield f"rayVersion {cluster.get('rayVersion')} is not the installed Ray {ray.__version__}"
    for name, pod in pods.items():
        for container in pod["spec"]["containers"]:
            if container.get("image") != IMAGE:
                yield f"{name}: image {container.get('image')} is not {IMAGE}"


def scaling_problems(cluster: Document) -> Iterator[str]:
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "the v2 autoscaler is not on"
    for group in cluster["workerGroupSpecs"]:
        low, now, high = group["minReplicas"], group.get("replicas", group["minReplicas"]), group["maxReplicas"]
        if not low <= now <= high:
            yield f"{group['groupName']}: minReplicas {low} <= replicas {now} <= maxReplicas {high} does not hold"


def access_problems(cluster: Document) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches port 8265 could run code"
    if cluster["headGroupSpec"].get("serviceType") != "ClusterIP" or cluster["headGroupSpec"].get("enableIngress"):
        yield "the head is exposed outside the cluster"


def pod_problems(name: str, pod: Document) -> Iterator[str]:
    spec = pod["spec"]
    yield from pod_security_problems(name, spec)
    for container in spec["containers"] + spec.get("initContainers", []):
        yield from container_problems(f"{name}/{container['name']}", container)
    if name != "submitter":  # it does one thing and ends
        yield from volume_problems(name, spec)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe not in spec["containers"][0]:
                yield f"{name}: no {probe}"


def pod_security_problems(name: str, spec: Document) -> Iterator[str]:
    context = spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield f"{name}: the pod may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: no seccomp profile"
    # The head's autoscaler talks to Kubernetes; nothing else has a reason to hold its credentials.
    if name != "head" and spec.get("automountServiceAccountToken") is not False:
        yield f"{name}: the service account token is mounted"


def volume_problems(name: str, spec: Document) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    container = spec["containers"][0]
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    yield from (f"{name}: volume {key} is not defined" for key in mounts.values() if key not in volumes)
    if volumes.get(mounts.get("/checkpoints", ""), {}).get("persistentVolumeClaim", {}).get("claimName") != CLAIM:
        yield f"{name}: /checkpoints is not the claim {CLAIM} of storage.yaml"
    shared_memory = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
    memory = container.get("resources", {}).get("limits", {}).get("memory", 0)
    if shared_memory.get("medium") != "Memory" or "sizeLimit" not in shared_memory:
        yield f"{name}: /dev/shm is not a memory volume with a sizeLimit"
    elif amount(shared_memory["sizeLimit"]) >= amount(memory):
        yield f"{name}: /dev/shm could fill the container's whole memory limit"


def container_problems(name: str, container: Document) -> Iterator[str]:
    """Also for autoscalerOptions, whose resources and securityContext KubeRay gives to the autoscaler's container."""
    resources, context = container.get("resources", {}), container.get("securityContext", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for resource in ("cpu", "memory"):
        if resource not in requests:
            yield f"{name}: no {resource} request"
        if resource not in limits:
            yield f"{name}: no {resource} limit"
    for resource in requests.keys() & limits.keys():
        if amount(requests[resource]) > amount(limits[resource]):
            yield f"{name}: requests more {resource} than its limit"
    if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
        yield f"{name}: GPUs requested and limited differ, which Kubernetes refuses"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: can gain privileges"
    if "ALL" not in context.get("capabilities", {}).get("drop", []):
        yield f"{name}: keeps Linux capabilities"
    if context.get("runAsUser") == 0 or context.get("runAsNonRoot") is False:
        yield f"{name}: may run as root"
    for variable in container.get("env", []):
        if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]) and "value" in variable:
            yield f"{name}: {variable['name']} is written out; take it from a Secret"


def amount(quantity: str | float) -> Decimal:
    """A Kubernetes quantity as a number: "200m" is 0.2, "4Gi" is 4·2^30. No exponents: nobody here writes 1e3."""
    number = re.split("[a-zA-Z]", str(quantity))[0]
    suffix = str(quantity).removeprefix(number)
    if suffix == "m":
        return Decimal(number) / 1000
    thousands = ["", "K", "M", "G", "T", "P", "E"].index(suffix.removesuffix("i").upper())
    return Decimal(number) * Decimal(1024 if suffix.endswith("i") else 1000) ** thousands


def network_problems(documents: list[Document], pods: dict[str, Document]) -> Iterator[str]:
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    for name, pod in pods.items():
        labels = pod.get("metadata", {}).get("labels", {}).items()
        if not any(labels >= policy["podSelector"].get("matchLabels", {}).items() for policy in policies):
            yield f"{name}: no NetworkPolicy selects the pod"
    for policy in policies:
        if set(policy.get("policyTypes", [])) != {"Ingress", "Egress"}:
            yield "the NetworkPolicy leaves a direction open"
        for rule in policy.get("ingress", []):
            yield from ingress_problems(rule, own=policy["podSelector"])
        for rule in policy.get("egress", []):
            yield from egress_problems(rule)


def ingress_problems(rule: Document, own: Document) -> Iterator[str]:
    ports = {port.get("port") for port in rule.get("ports", [])} or {"any"}
    if not rule.get("from"):
        yield f"everyone may reach port {ports}"
    for peer in rule.get("from", []):
        if peer == {"podSelector": own}:
            continue  # Ray's nodes among themselves
        labels = peer.get("podSelector", {}).get("matchLabels", {})
        if not labels:
            yield f"port {ports} is open to peers that no pod label names: {peer}"
        elif not ports <= ({8265, 8000} if "kuberay-operator" in labels.values() else {8000}):
            yield f"port {ports} is more than {labels} needs"


def egress_problems(rule: Document) -> Iterator[str]:
    metadata_service = ipaddress.ip_address("169.254.169.254")
    blocks = [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]
    for block in blocks:
        excepted = any(metadata_service in ipaddress.ip_network(network) for network in block.get("except", []))
        if metadata_service in ipaddress.ip_network(block["cidr"]) and not excepted:
            yield "pods may ask the cloud's metadata service for the node's credentials"
    if not rule.get("to") and {port.get("port") for port in rule.get("ports", [])} != {53}:
        yield "pods may connect to anything"


def job_problems(spec: Document) -> Iterator[str]:
    yield from entrypoint_problems(spec.get("entrypoint", ""), spec["rayClusterSpec"])
    # Seen with Ray 2.60: the entrypoint runs in the directory `ray start` ran in; its paths are relative to it.
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    if head.get("workingDir") != "/home/ray/raylign":
        yield "head: workingDir is not where the image keeps configs/"
    if not spec.get("backoffLimit"):
        yield "backoffLimit 0: a lost node ends the run"
    if not spec.get("shutdownAfterJobFinishes") or not spec.get("ttlSecondsAfterFinished"):
        yield "the cluster outlives its job"
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode" and "submitterPodTemplate" not in spec:
        yield "KubeRay's own submitter pod has no security context"


def entrypoint_problems(entrypoint: str, cluster: Document) -> Iterator[str]:
    words = shlex.split(entrypoint)
    if words[:3] != ["python", "-m", "cluster"] or not re.fullmatch(r"configs/align/\w+\.yaml", "".join(words[3:4])):
        yield f"entrypoint {entrypoint} is not python -m cluster configs/align/RECIPE.yaml [key=value ...]"
        return
    try:
        run = load_run(ROOT / words[3], words[4:])
    except ConfigError as error:
        yield f"entrypoint: {error}"
        return
    if run.output != "/checkpoints":
        yield f"entrypoint: output={run.output} is not the shared volume"
    if not run.cluster.autoscaling:
        yield "entrypoint: without cluster.autoscaling a cluster that has no workers yet is refused"
    room = room_for(plan(run).resources, cluster)
    if not 0 < run.cluster.workers <= room:
        yield f"entrypoint: {run.cluster.workers} workers where there is room for {room}"


def room_for(resources: dict[str, float], cluster: Document) -> int:
    """How many bundles of these resources (as Ray counts them) the worker pods hold when all of them are up."""
    room = 0
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        has = {"CPU": limits.get("cpu", 0), "GPU": limits.get("nvidia.com/gpu", 0)}
        room += group["maxReplicas"] * min(int(amount(has[name]) / Decimal(each)) for name, each in resources.items())
    return room


def service_problems(spec: Document) -> Iterator[str]:
    yield from serve_problems(spec.get("serveConfigV2", ""), spec)
    if spec.get("upgradeStrategy", {}).get("type") != "NewCluster":
        yield "an upgrade interrupts the service"


def serve_problems(text: str, spec: Document) -> Iterator[str]:
    """What is wrong with the Serve config of a RayService. Serve itself accepts unknown keys."""
    config = yaml.safe_load(text)
    try:
        ServeDeploySchema.model_validate(config)
    except pydantic.ValidationError as error:
        yield f"serve refuses it: {error}"
        return
    http = config.get("http_options", {})
    yield from unknown_keys(config, ServeDeploySchema)
    yield from unknown_keys(http, HTTPOptionsSchema)
    for application in config["applications"]:
        yield from unknown_keys(application, ServeApplicationSchema)
        if application["import_path"] != "serving:build":
            yield f"import_path {application['import_path']} is not serving:build"
        for deployment in application.get("deployments", []):
            yield from deployment_problems(deployment)
        try:
            endpoint = check_config(application.get("args", {}), kind=ServeConfig)
        except ConfigError as error:
            yield f"args: {error}"
        else:
            yield from endpoint_problems(endpoint, http, spec)


def endpoint_problems(endpoint: ServeConfig, http: Document, spec: Document) -> Iterator[str]:
    if not endpoint.checkpoint.startswith("/checkpoints/"):
        yield "args.checkpoint is not on the shared volume"
    if endpoint.device != "cuda":
        yield "args.device is not cuda: the endpoint is built before a GPU node is up"
    if endpoint.target_ongoing_requests >= endpoint.max_num_seqs:
        yield "args.target_ongoing_requests is not below max_num_seqs: the engine never scales"
    bundle = {"CPU": REPLICA_CPUS, "GPU": float(endpoint.tensor_parallel_size)}
    room = room_for(bundle, spec["rayClusterConfig"])
    if endpoint.max_replicas > room:
        yield f"args.max_replicas {endpoint.max_replicas} where there is room for {room}"
    # An answer may take the first of these; each that follows waits for what the one before allows.
    waits = {
        "args.request_timeout_s": endpoint.request_timeout_s,
        "http_options.request_timeout_s": http.get("request_timeout_s") or 0,
        "args.drain_timeout_s": endpoint.drain_timeout_s,
        "rayClusterDeletionDelaySeconds": spec.get("rayClusterDeletionDelaySeconds", 60),
    }
    for (first, shorter), (then, longer) in itertools.pairwise(waits.items()):
        if shorter >= longer:
            yield f"{then} {longer} is not longer than {first} {shorter}: running answers are cut"


def deployment_problems(deployment: Document) -> Iterator[str]:
    name, scaling = deployment["name"], deployment.get("autoscaling_config") or {}
    yield from unknown_keys(deployment, DeploymentSchema)
    yield from unknown_keys(scaling, AutoscalingConfig)
    if name not in (INGRESS_NAME, ENGINE_NAME):
        yield f"serving.app has no deployment {name}"
    try:
        AutoscalingConfig.model_validate(scaling)
    except pydantic.ValidationError as error:
        yield f"{name}: autoscaling_config: {error}"


def unknown_keys(value: Document, model: type[pydantic.BaseModel]) -> Iterator[str]:
    yield from (f"{model.__name__} has no key {key}" for key in value if key not in model.model_fields)
