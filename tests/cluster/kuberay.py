"""The rules a file of ours for Kubernetes must keep, as plain functions over its parsed documents.

First the schema (kuberay_schema.json, strict), then what no schema knows: that versions agree, that the files mean what
our own code reads, that nothing runs as root or without limits, that the network lets in only what is needed, and all
that is (reach.py). A check yields its complaints as sentences, none if all is well. test_cluster_files.py breaks good
files to prove that every check bites.
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

import jsonschema
import pydantic
import ray
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from alignment.errors import ConfigError
from alignment.settings.load import check_config
from cluster.config import load_run
from cluster.plan import plan
from serving.app import ENGINE_NAME, INGRESS_NAME, REPLICA_CPUS, application
from serving.config import ServeConfig
from serving.registry.models import EndpointModel, ServedModels
from serving.registry.served_model import ServedModel
from serving.registry.versions import Registry
from tests.cluster.reach import (
    CLIENT,
    OPERATOR,
    PROMETHEUS,
    ROOT,
    Document,
    Place,
    Pod,
    allowed,
    needs_of,
    pods_of,
    reach_problems,
    selects,
)

SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"raylign:{PROJECT['version']}-gpu"
RAY = ("RayJob", "RayService")
VISITORS = {"kuberay-operator": {8265, 8000}, "prometheus": {8080, 8000}}
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
ANY_PORT = 34567
"""One of those that Ray picks."""
KILL_MARGIN_S = 15
"""Between the end of Ray's drain and SIGKILL: what is left is ended then."""
CLAIM = yaml.safe_load((ROOT / "configs" / "cluster" / "storage.yaml").read_text())["metadata"]["name"]


def file_problems(documents: list[Document]) -> list[str]:
    """What is wrong with a file for Kubernetes by itself."""
    by_schema = [problem for document in documents for problem in schema_problems(document)]
    if by_schema:
        return by_schema  # what follows takes for granted what the schema promises
    pods = {pod.name: pod for document in documents for pod in pods_of(document)}
    if empty := [name for name, pod in pods.items() if not pod.spec["containers"]]:
        return [f"{name}: no containers" for name in empty]
    return [
        *(problem for pod in pods.values() for problem in pod_problems(pod)),
        *network_problems(documents, pods),
        *(problem for document in documents if document["kind"] in RAY for problem in ray_problems(document)),
    ]


def ray_problems(resource: Document) -> Iterator[str]:
    cluster = cluster_of(resource)
    if cluster.get("rayVersion") != ray.__version__:
        yield f"rayVersion {cluster.get('rayVersion')} is not the installed Ray {ray.__version__}"
    yield from scaling_problems(cluster)
    yield from access_problems(cluster)
    yield from container_problems("autoscaler", cluster.get("autoscalerOptions", {}))
    yield from (problem for pod in pods_of(resource) for problem in drain_problems(pod))
    yield from job_problems(resource["spec"]) if resource["kind"] == "RayJob" else service_problems(resource["spec"])


def place_problems(documents: list[Document]) -> list[str]:
    """What is wrong with all files together: who cannot reach whom, and what they count on that is not there."""
    place = Place.of(documents)
    claims = {document["metadata"]["name"] for document in documents if document["kind"] == "PersistentVolumeClaim"}
    return [
        *(problem for document in documents for problem in reach_problems(place, needs_of(document))),
        *visitor_problems(place),
        *(problem for pod in place.pods.values() for problem in claim_problems(pod, claims)),
        *(problem for document in documents for problem in route_problems(place, document)),
        *(problem for document in documents for problem in scrape_problems(place, document)),
        *budget_problems(place),
    ]


def visitor_problems(place: Place) -> Iterator[str]:
    """Who comes from outside these files, and has to be let in."""
    for pod in place.pods.values():
        if pod.labels.get("ray.io/node-type") == "head" and not allowed(place, pod, "ingress", OPERATOR, 8265):
            yield f"{pod.name}: the operator may not deploy"
        if "ray.io/node-type" in pod.labels and not allowed(place, pod, "ingress", PROMETHEUS, 8080):
            yield f"{pod.name}: Prometheus may not read its metrics"
        if "serve" in ports_of(pod) and not allowed(place, pod, "ingress", CLIENT, ports_of(pod)["serve"]):
            yield f"{pod.name}: clients may not ask it"
        if not all(_may_meet(place, pod, other) for other in place.pods.values() if _are_of_one_ray(pod, other)):
            yield f"{pod.name}: Ray's nodes may not reach each other"


def _are_of_one_ray(pod: Pod, other: Pod) -> bool:
    return "/" in pod.name and pod.name.partition("/")[0] == other.name.partition("/")[0]


def _may_meet(place: Place, pod: Pod, other: Pod) -> bool:
    return all(allowed(place, pod, way, other.labels, ANY_PORT) for way in ("egress", "ingress"))


def is_worker(pod: Pod) -> bool:
    return pod.labels.get("ray.io/node-type") == "worker"


def ports_of(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in pod.container.get("ports", [])}


def route_problems(place: Place, document: Document) -> Iterator[str]:
    """An Ingress leads to a Service that is there."""
    if document["kind"] != "Ingress":
        return
    for path in (path for rule in document["spec"]["rules"] for path in rule["http"]["paths"]):
        service = path["backend"]["service"]
        if not place.targets(service["name"], service["port"]["number"]):
            yield f"Ingress {document['metadata']['name']}: there is no Service {service['name']}"


def claim_problems(pod: Pod, claims: set[str]) -> Iterator[str]:
    for volume in pod.spec.get("volumes", []):
        name = volume.get("persistentVolumeClaim", {}).get("claimName")
        if name is not None and name not in claims:
            yield f"{pod.name}: there is no claim {name}"


def budget_problems(place: Place) -> Iterator[str]:
    budgets = [document["spec"] for document in place.documents if document["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        if not any(selects(budget["selector"], pod.labels) for pod in place.pods.values()):
            yield f"the PodDisruptionBudget for {budget['selector']} is for no pod"
    for pod in place.pods.values():
        matching = [budget for budget in budgets if selects(budget["selector"], pod.labels)]
        if is_worker(pod) and not matching:
            yield f"{pod.name}: all its nodes may be drained at once"
        if len(matching) > 1:
            yield f"{pod.name}: two PodDisruptionBudgets, with which Kubernetes evicts nothing"


def drain_problems(pod: Pod) -> Iterator[str]:
    """Ray ends what runs on a node within a time of its own, that Kubernetes has to leave it."""
    if "ray.io/node-type" not in pod.labels:
        return
    grace, drain = pod.spec.get("terminationGracePeriodSeconds", 30), pod.value(DRAIN)
    if drain is None:
        yield f"{pod.name}: no {DRAIN}: Ray drains for 30 s, whatever else is configured"
    elif float(drain) + KILL_MARGIN_S > grace:
        yield f"{pod.name}: {DRAIN} {drain} leaves less than {KILL_MARGIN_S} s of terminationGracePeriodSeconds {grace}"


def schema_problems(document: Document) -> Iterator[str]:
    if document.get("kind") not in SCHEMA["$defs"]:
        yield f"kind {document.get('kind')} is none we ship"
        return
    schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        yield f"{document['kind']}.{'.'.join(map(str, error.absolute_path))}: {error.message}"


def scrape_problems(place: Place, document: Document) -> Iterator[str]:
    """What Prometheus is told to ask is there and lets it in, and nothing of Ray is left out."""
    spec = document.get("spec", {})
    if document["kind"] == "ScrapeConfig":
        targets = [target for each in spec["staticConfigs"] for target in each["targets"]]
        if len(targets) != 1:
            yield f"{targets}: an endpoint has one address, behind which any ingress tells the figures of all"
        for target in targets:
            host, _, port = target.rpartition(":")
            pods = place.targets(host, int(port)) or []
            if not pods:
                yield f"{target}: there is no such Service"
            for pod, pod_port in pods:
                if not allowed(place, pod, "ingress", PROMETHEUS, pod_port):
                    yield f"{target}: {pod.name} does not let Prometheus in"
    if document["kind"] == "PodMonitor":
        ports = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
        for pod in place.pods.values():
            if ports <= ports_of(pod).keys() and selects(spec["selector"], pod.labels):
                continue
            if pod.labels.get("ray.io/node-type") in ("head", "worker"):
                yield f"{pod.name}: is not scraped"


def cluster_of(resource: Document) -> Document:
    """The RayCluster inside a RayJob or RayService."""
    cluster: Document = resource["spec"]["rayClusterSpec" if resource["kind"] == "RayJob" else "rayClusterConfig"]
    return cluster


def scaling_problems(cluster: Document) -> Iterator[str]:
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "the v2 autoscaler is not on"
    for group in cluster["workerGroupSpecs"]:
        low, now, high = group["minReplicas"], group.get("replicas", group["minReplicas"]), group["maxReplicas"]
        if not 0 <= low <= now <= high:
            yield f"{group['groupName']}: minReplicas {low} <= replicas {now} <= maxReplicas {high} does not hold"


def access_problems(cluster: Document) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches port 8265 could run code"
    if cluster["headGroupSpec"].get("serviceType") != "ClusterIP" or cluster["headGroupSpec"].get("enableIngress"):
        yield "the head is exposed outside the cluster"


def pod_problems(pod: Pod) -> Iterator[str]:
    yield from pod_security_problems(pod.name, pod.spec)
    for container in pod.spec["containers"] + pod.spec.get("initContainers", []):
        yield from container_problems(f"{pod.name}/{container['name']}", container)
        yield from image_problems(f"{pod.name}/{container['name']}", container.get("image", ""))
    if pod.spec.get("restartPolicy") in ("Never", "OnFailure"):
        return  # it does one thing and ends
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if probe not in pod.container:
            yield f"{pod.name}: no {probe}"
        elif not pod.container[probe].keys() & {"httpGet", "exec", "tcpSocket", "grpc"}:
            yield f"{pod.name}: its {probe} asks nothing"
    if "ray.io/node-type" in pod.labels:
        yield from volume_problems(pod.name, pod.spec)


def image_problems(name: str, image: str) -> Iterator[str]:
    if image.startswith("raylign"):
        if image != IMAGE:
            yield f"{name}: image {image} is not {IMAGE}"
    elif not re.fullmatch(r"\w+:\d+\.\d+(\.\d+)?", image):
        yield f"{name}: image {image} has no version"


def pod_security_problems(name: str, spec: Document) -> Iterator[str]:
    """The `restricted` Pod Security Standard, and no credentials for Kubernetes but the autoscaler's."""
    context = spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield f"{name}: the pod may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: no seccomp profile"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{name}: {key} reaches into the node"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"{name}: hostPath reaches into the node"
    # The head's autoscaler talks to Kubernetes; nothing else has a reason to hold its credentials.
    if not name.endswith("/head") and spec.get("automountServiceAccountToken") is not False:
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
    if context.get("privileged"):
        yield f"{name}: is privileged"
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


def network_problems(documents: list[Document], pods: dict[str, Pod]) -> Iterator[str]:
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    for name, pod in pods.items():
        if "administration" in pod.labels.values() and not policies:
            continue  # promote.yaml's is in keys.yaml
        selecting = [policy for policy in policies if selects(policy["podSelector"], pod.labels)]
        directions = {way for policy in selecting for way in policy["policyTypes"]}
        if not directions:
            yield f"{name}: no NetworkPolicy selects the pod"
        elif directions != {"Ingress", "Egress"}:
            yield f"{name}: the NetworkPolicy leaves a direction open"
    for policy in policies:
        chosen = [pod for pod in pods.values() if selects(policy["podSelector"], pod.labels)]
        for rule in policy.get("ingress", []):
            yield from ingress_problems(rule, policy["podSelector"], chosen)
        for rule in policy.get("egress", []):
            yield from egress_problems(rule)


def ingress_problems(rule: Document, own: Document, pods: list[Pod]) -> Iterator[str]:
    ports = {port.get("port") for port in rule.get("ports", [])} or {"any"}
    served = [port for pod in pods if "ray.io/node-type" not in pod.labels for port in ports_of(pod).values()]
    open_ports = set(served) or {8000}  # of Ray's ports, only that of the endpoint
    if not rule.get("from"):
        yield f"everyone may reach port {ports}"
    for peer in rule.get("from", []):
        if peer == {"podSelector": own}:
            continue  # Ray's nodes among themselves
        labels = peer.get("podSelector", {}).get("matchLabels", {})
        beside = {port for name, more in VISITORS.items() if name in labels.values() for port in more}
        if not labels:
            yield f"port {ports} is open to peers that no pod label names: {peer}"
        elif not ports <= open_ports | beside:
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
    for each in config["applications"]:
        yield from unknown_keys(each, ServeApplicationSchema)
        if each["import_path"] != "serving:build":
            yield f"import_path {each['import_path']} is not serving:build"
        for deployment in each.get("deployments", []):
            yield from deployment_problems(deployment)
        try:
            endpoint = check_config(each.get("args", {}), kind=ServeConfig)
        except ConfigError as error:
            yield f"args: {error}"
        else:
            yield from endpoint_problems(endpoint, http, spec)


def endpoint_problems(endpoint: ServeConfig, http: Document, spec: Document) -> Iterator[str]:
    if not endpoint.checkpoint.startswith("/checkpoints/"):
        yield "args.checkpoint is not on the shared volume"
    if endpoint.device != "cuda":
        yield "args.device is not cuda: the endpoint is built before a GPU node is up"
        return
    if endpoint.target_ongoing_requests >= endpoint.max_num_seqs:
        yield "args.target_ongoing_requests is not below max_num_seqs: the engine never scales"
    bundle = {"CPU": REPLICA_CPUS, "GPU": float(endpoint.tensor_parallel_size)}
    room = room_for(bundle, spec["rayClusterConfig"])
    if endpoint.max_replicas > room:
        yield f"args.max_replicas {endpoint.max_replicas} where there is room for {room}"
    gpus = room_for({"GPU": 1.0}, spec["rayClusterConfig"])
    if (wanted := gpus_wanted(endpoint)) > gpus:
        yield f"all deployments together may want {wanted:g} GPUs where there is room for {gpus}"
    if re.search(r"/checkpoints/step-\d+$", endpoint.checkpoint) is None:
        yield "args.checkpoint is not one step's folder: which one it means may change from start to start"
    service = {"kind": "RayService", "metadata": {"name": "service"}, "spec": spec}
    drains = [float(pod.value(DRAIN) or 30) for pod in pods_of(service) if is_worker(pod)]
    # An answer may take the first of these; each that follows waits for what the one before allows.
    waits = {
        "args.request_timeout_s": endpoint.request_timeout_s,
        "http_options.request_timeout_s": http.get("request_timeout_s") or 0,
        "args.drain_timeout_s": endpoint.drain_timeout_s,
        DRAIN: min(drains),
        "rayClusterDeletionDelaySeconds": spec.get("rayClusterDeletionDelaySeconds", 60),
    }
    for (first, shorter), (then, longer) in itertools.pairwise(waits.items()):
        if shorter >= longer:
            yield f"{then} {longer} is not longer than {first} {shorter}: running answers are cut"


def gpus_wanted(endpoint: ServeConfig) -> float:
    """GPUs of all replicas that an endpoint's deployments may have at once."""
    served = ServedModel(name="assistant", source="/model", base_name=None, adapter=None, lora_capacity=None)
    model = EndpointModel(config=endpoint, served_model=served, registry=Registry(Path("/nowhere")))
    gpus = 0.0
    for deployment in build_app(application(endpoint, ServedModels([model]), owner=""), name="app").deployments:
        bundles = deployment._replica_config.placement_group_bundles or [deployment.ray_actor_options or {}]
        each = sum(bundle.get("GPU", bundle.get("num_gpus", 0)) for bundle in bundles)
        scaling = deployment._deployment_config.autoscaling_config
        gpus += each * (scaling.max_replicas if scaling else deployment.num_replicas)
    return float(gpus)


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
