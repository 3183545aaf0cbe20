"""The files of configs/cluster are right, and the checks that say so notice when they are not.

Everything is offline. `ray up` files go through Ray's own validation and a few rules of ours; KubeRay files go through
kuberay.py. Each part then breaks a good file on purpose and demands the complaint: a check that cannot fail proves
nothing.
"""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.kuberay import IMAGE, PROJECT, ROOT, SCHEMA, Document, file_problems, schema_problems

CLUSTER_FILES = ROOT / "configs" / "cluster"
RAY_UP_FILES = ["aws.yaml", "on_premise.yaml"]
KUBERNETES_FILES = [
    "database.yaml",
    "ingress.yaml",
    "keys.yaml",
    "monitoring.yaml",
    "promote.yaml",
    "rayjob.yaml",
    "rayservice.yaml",
    "redis.yaml",
    "reward_server.yaml",
    "storage.yaml",
]
RAY_UP_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())

Where = tuple[str | int, ...]  # keys and list indices, from the list of documents down
DELETE = object()


def load(name: str) -> list[Document]:
    """The documents of a file. Through JSON, so that two uses of one YAML anchor become two objects."""
    documents = yaml.safe_load_all((CLUSTER_FILES / name).read_text())
    return [json.loads(json.dumps(document)) for document in documents]


def changed(documents: list[Document], path: Where, value: object) -> list[Document]:
    """A copy with the value at the path replaced, added, or (DELETE) removed."""
    documents = copy.deepcopy(documents)
    parent: Any = documents
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return documents


def test_every_cluster_file_is_checked_here() -> None:
    files = sorted(path.name for path in CLUSTER_FILES.glob("*.yaml"))
    assert files == sorted([*RAY_UP_FILES, *KUBERNETES_FILES])


# ---------------------------------------------------------------------------------------------------------- ray up


def ray_up_problems(config: Document) -> list[str]:
    """What is wrong with a `ray up` file."""
    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except (jsonschema.ValidationError, click.ClickException, ValueError, AssertionError) as error:
        return [f"ray refuses it: {error}"]
    return [
        *provider_problems(config),
        *node_type_problems(prepared),
        *ray_up_docker_problems(prepared["docker"]),
        *ray_up_security_problems(prepared),
        *ray_up_command_problems(prepared),
    ]


def provider_problems(config: Document) -> Iterator[str]:
    # Ray's schema lists the provider's keys and then allows any other.
    known = RAY_UP_SCHEMA["properties"]["provider"]["properties"]
    yield from (f"provider.{key} is not a key Ray knows" for key in config["provider"] if key not in known)
    if config["provider"]["type"] == "local":
        # Ray cuts these down to the number of machines with no more than a warning.
        low, high, machines = config["min_workers"], config["max_workers"], len(config["provider"]["worker_ips"])
        if not 0 <= low <= high <= machines:
            yield f"min_workers {low} <= max_workers {high} <= {machines} machines does not hold"


def node_type_problems(prepared: Document) -> Iterator[str]:
    if not 0 < prepared["idle_timeout_minutes"] <= 60:
        yield "idle_timeout_minutes is not in (0, 60]: idle GPU nodes cost money"
    for name, node_type in prepared["available_node_types"].items():
        low, high = node_type["min_workers"], node_type["max_workers"]
        if not 0 <= low <= high <= prepared["max_workers"]:
            yield f"{name}: min_workers {low} <= max_workers {high} <= {prepared['max_workers']} does not hold"
    if prepared["provider"]["type"] == "local":
        return  # Ray finds out what these machines have
    types, head = prepared["available_node_types"], prepared["head_node_type"]
    if not any(kind["resources"].get("GPU") and kind["max_workers"] for name, kind in types.items() if name != head):
        yield "no worker type has GPUs"
    if types[head]["resources"].get("GPU"):
        yield "the head pays for GPUs that it must not use"


def ray_up_docker_problems(docker: Document) -> Iterator[str]:
    if not docker["image"].startswith(f"rayproject/ray:{ray.__version__}-"):
        yield f"docker.image {docker['image']} does not hold the installed Ray {ray.__version__}"
    if not any(re.fullmatch(r"-v \S+:/checkpoints", option) for option in docker["run_options"]):
        yield "docker.run_options mounts no shared /checkpoints"


def ray_up_security_problems(prepared: Document) -> Iterator[str]:
    for name, node_type in prepared["available_node_types"].items():
        if prepared["provider"]["type"] == "aws" and not node_type["node_config"].get("SecurityGroupIds"):
            yield f"{name}: no SecurityGroupIds: the group that Ray makes lets SSH in from everywhere"
    if "-e RAY_AUTH_MODE=token" not in prepared["docker"]["run_options"]:
        yield "docker.run_options does not turn token authentication on"
    if "/home/ray/.ray/auth_token" not in prepared["file_mounts"]:
        yield "file_mounts does not bring the token to the nodes"
    if not any("--dashboard-host=127.0.0.1" in command for command in prepared["head_start_ray_commands"]):
        yield "the dashboard, which runs what it is sent, does not listen on loopback only"


def ray_up_command_problems(prepared: Document) -> Iterator[str]:
    for kind in ("head", "worker"):
        # As `ray up` runs them. Ray has joined those for all nodes with each kind's own.
        commands = [command for command in prepared[f"{kind}_setup_commands"] if "pip install" in command]
        wheel = f"/home/ray/raylign/dist/raylign-{PROJECT['version']}-py3-none-any.whl"
        if not any(command.endswith(f"--no-deps {wheel}") for command in commands):
            yield f"{kind}: does not install {wheel}"
        if not any(
            "--no-deps" in command and re.search(r"-r \S*(locks/gpu|head)\.txt", command) for command in commands
        ):
            yield f"{kind}: does not install a lock"
    if not any("--autoscaling-config=~/ray_bootstrap_config.yaml" in c for c in prepared["head_start_ray_commands"]):
        yield "the head starts without an autoscaler"
    if not any("--address=$RAY_HEAD_IP:6379" in command for command in prepared["worker_start_ray_commands"]):
        yield "workers do not join the head"


@pytest.mark.parametrize("name", RAY_UP_FILES)
def test_a_ray_up_file_passes_rays_validation_and_our_rules(name: str) -> None:
    assert ray_up_problems(load(name)[0]) == []


TYPES = ("available_node_types",)
BROKEN_RAY_UP_FILES: dict[str, tuple[str, Where, object, str]] = {
    # what is broken: (file, where, the wrong value, a part of the complaint)
    "a key with a typo": ("aws.yaml", ("idle_timeout_minute",), 5, "idle_timeout_minute"),
    "a docker key with a typo": ("aws.yaml", ("docker", "imgae"), "x", "imgae"),
    "a provider key with a typo": ("aws.yaml", ("provider", "regoin"), "x", "provider.regoin"),
    "a node type key with a typo": ("aws.yaml", (*TYPES, "gpu_worker", "maxworkers"), 1, "maxworkers"),
    "a word for a number": ("aws.yaml", ("max_workers",), "four", "'four' is not of type 'integer'"),
    "no head group": ("aws.yaml", (*TYPES, "head"), DELETE, "head_node_type"),
    "no head group named": ("aws.yaml", ("head_node_type",), DELETE, "head_node_type"),
    "min above the total": ("aws.yaml", (*TYPES, "gpu_worker", "min_workers"), 9, "min_workers"),
    "max below min": ("aws.yaml", (*TYPES, "gpu_worker", "max_workers"), -1, "does not hold"),
    "no GPU": ("aws.yaml", (*TYPES, "gpu_worker", "resources"), {}, "no worker type has GPUs"),
    "GPUs on the head": ("aws.yaml", (*TYPES, "head", "resources", "GPU"), 8, "the head pays"),
    "never idle": ("aws.yaml", ("idle_timeout_minutes",), 1e9, "idle_timeout_minutes"),
    "another Ray": ("aws.yaml", ("docker", "image"), "rayproject/ray:2.9.0-gpu", "2.9.0"),
    "no image": ("aws.yaml", ("docker", "image"), DELETE, "image"),
    "no authentication": ("aws.yaml", ("docker", "run_options"), [], "token authentication"),
    "no shared folder": ("aws.yaml", ("docker", "run_options"), [], "no shared /checkpoints"),
    "no token": ("aws.yaml", ("file_mounts",), {}, "token to the nodes"),
    "an open dashboard": ("aws.yaml", ("head_start_ray_commands", 1), "ray start --head", "loopback"),
    "a head without autoscaler": ("aws.yaml", ("head_start_ray_commands",), [], "without an autoscaler"),
    "workers on their own": ("aws.yaml", ("worker_start_ray_commands",), ["ray start"], "do not join"),
    "nothing installed": ("aws.yaml", ("worker_setup_commands",), [], "worker: does not install"),
    "a wheel by chance": ("on_premise.yaml", ("setup_commands", 2), "pip install dist/*.whl", "does not install /home"),
    "no lock": ("aws.yaml", ("head_setup_commands", 1), "true", "head: does not install a lock"),
    "SSH from everywhere": (
        "aws.yaml",
        (*TYPES, "head", "node_config", "SecurityGroupIds"),
        DELETE,
        "SSH in from every",
    ),
    "no head machine": ("on_premise.yaml", ("provider", "head_ip"), DELETE, "head_ip"),
    "a key at the wrong level": ("on_premise.yaml", ("worker_ips",), [], "worker_ips"),
    "more workers than machines": ("on_premise.yaml", ("max_workers",), 5, "4 machines does not hold"),
    "min above max": ("on_premise.yaml", ("min_workers",), 5, "does not hold"),
}


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"), BROKEN_RAY_UP_FILES.values(), ids=BROKEN_RAY_UP_FILES.keys()
)
def test_a_broken_ray_up_file_is_refused(
    name: str, path: Where, value: object, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = ray_up_problems(changed(load(name), (0, *path), value)[0])
    printed = capsys.readouterr()  # where Ray says why it aborts; the exception is empty then
    assert problems
    assert complaint in " ".join([*problems, printed.out, printed.err])


def test_what_the_head_runs_needs_no_vllm() -> None:
    """It starts workers, engines and replicas elsewhere; aws.yaml's head has it not."""
    code = """
import sys; sys.modules["vllm"] = None
from pathlib import Path
import cluster.engines, cluster.final_error, cluster.worker, serving.app, serving.launch, serving.registry.served_model
from cluster.config import load_run
from cluster.launch import _engine_settings
assert _engine_settings(load_run(Path("configs/align/grpo_8b.yaml"), []), gpu=True).device == "cuda"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --------------------------------------------------------------------------------------------------------- KubeRay


@pytest.mark.parametrize("name", KUBERNETES_FILES)
def test_a_file_for_kubernetes_passes_the_schema_and_our_rules(name: str) -> None:
    assert file_problems(load(name)) == []


def test_the_schema_is_a_valid_schema_and_strict_everywhere() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    text = json.dumps(SCHEMA["$defs"])
    assert text.count('"properties":') == text.count('"additionalProperties": false')


def test_the_image_is_built_on_the_installed_ray_for_the_user_the_pods_run_as() -> None:
    dockerfile = (CLUSTER_FILES / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+?)-", dockerfile, re.MULTILINE) == [f"rayproject/ray:{ray.__version__}"]
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE) == ["1000:100"]
    assert IMAGE in dockerfile


def test_the_package_accepts_the_ray_the_images_hold() -> None:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    assert [ray.__version__ in requirement.specifier for requirement in requirements if requirement.name == "ray"] == [
        True
    ]


def test_the_shared_volume_can_be_mounted_by_several_nodes() -> None:
    (claim,) = load("storage.yaml")
    assert list(schema_problems(claim)) == []
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


JOB = (0, "spec")
SUBMITTER = (*JOB, "submitterPodTemplate", "spec")
CLUSTER = (*JOB, "rayClusterSpec")
SCALER = (*CLUSTER, "autoscalerOptions")
HEAD = (*CLUSTER, "headGroupSpec", "template")
GROUP = (*CLUSTER, "workerGroupSpecs", 0)
WORKER = (*GROUP, "template", "spec")
CONTAINER = (*WORKER, "containers", 0)
REQUESTS, LIMITS = (*CONTAINER, "resources", "requests"), (*CONTAINER, "resources", "limits")
INGRESS, EGRESS = (1, "spec", "ingress"), (1, "spec", "egress")
ANYWHERE = {"ipBlock": {"cidr": "0.0.0.0/0"}}

BROKEN_JOBS: dict[str, tuple[Where, object, str]] = {
    # what is broken: (where, the wrong value, a part of the complaint). First what the schema refuses; the API server
    # would drop such a key in silence, or pods would never come up.
    "a RayJob key with a typo": ((*JOB, "backOffLimit"), 1, "backOffLimit"),
    "a cluster key with a typo": ((*CLUSTER, "enableInTreeAutoScaling"), True, "enableInTreeAutoScaling"),
    "a key newer than this KubeRay": ((*CLUSTER, "networkPolicy"), {}, "networkPolicy"),
    "an autoscaler key with a typo": ((*SCALER, "idleTimeoutSecond"), 5, "idleTimeoutSecond"),
    "an autoscaler that does not exist": ((*SCALER, "version"), "v3", "'v3'"),
    "an authentication that does not exist": ((*CLUSTER, "authOptions", "mode"), "tokens", "'tokens'"),
    "a group key with a typo": ((*GROUP, "maxReplica"), 4, "maxReplica"),
    "a string for a number": ((*GROUP, "minReplicas"), "0", "'0' is not of type 'integer'"),
    "fewer than no replicas": ((*GROUP, "minReplicas"), -1, "does not hold"),
    "no maxReplicas": ((*GROUP, "maxReplicas"), DELETE, "'maxReplicas' is a required property"),
    "a number for a string": ((*GROUP, "rayStartParams"), {"num-cpus": 8}, "8 is not of type 'string'"),
    "a pod key with a typo": ((*WORKER, "volums"), [], "volums"),
    "a pod without containers": ((*WORKER, "containers"), [], "containers"),
    "a container key with a typo": ((*CONTAINER, "livenesProbe"), {}, "livenesProbe"),
    "a security key with a typo": ((*CONTAINER, "securityContext", "runAsNonroot"), True, "runAsNonroot"),
    "a resources key with a typo": ((*CONTAINER, "resources", "limit"), {}, "limit"),
    "a quantity that is none": ((*LIMITS, "memory"), "64 GB", "64 GB"),
    "a probe that asks nothing": ((*CONTAINER, "livenessProbe", "httpGet"), DELETE, "livenessProbe"),
    "a number in the environment": ((*CONTAINER, "env", 0, "value"), 0, "0 is not of type 'string'"),
    "a NetworkPolicy key with a typo": ((1, "spec", "policyType"), [], "policyType"),
    "a kind with a typo": ((1, "kind"), "NetworkPolice", "NetworkPolice"),
    "another API version": ((0, "apiVersion"), "ray.io/v2", "ray.io/v1"),
    # What our own rules refuse.
    "another Ray": ((*CLUSTER, "rayVersion"), "2.59.0", "rayVersion 2.59.0"),
    "an image without a version": ((*CONTAINER, "image"), "raylign:latest", "raylign:latest"),
    "min above max": ((*GROUP, "minReplicas"), 5, "does not hold"),
    "more replicas than max": ((*GROUP, "replicas"), 9, "does not hold"),
    "no autoscaler": ((*CLUSTER, "enableInTreeAutoscaling"), False, "autoscaler is not on"),
    "the old autoscaler": ((*SCALER, "version"), "v1", "autoscaler is not on"),
    "no authentication": ((*CLUSTER, "authOptions"), DELETE, "authOptions.mode"),
    "authentication off": ((*CLUSTER, "authOptions", "mode"), "disabled", "authOptions.mode"),
    "a public head": ((*CLUSTER, "headGroupSpec", "serviceType"), "LoadBalancer", "exposed"),
    "no memory limit": ((*LIMITS, "memory"), DELETE, "no memory limit"),
    "no cpu request": ((*REQUESTS, "cpu"), DELETE, "no cpu request"),
    "no resources": ((*CONTAINER, "resources"), {}, "no cpu limit"),
    "no autoscaler limits": ((*SCALER, "resources"), DELETE, "autoscaler: no cpu limit"),
    "no submitter limits": ((*SUBMITTER, "containers", 0, "resources"), {}, "submitter/submitter: no cpu limit"),
    "a request above its limit": ((*REQUESTS, "cpu"), "65", "requests more cpu"),
    "no GPU": ((*LIMITS, "nvidia.com/gpu"), DELETE, "room for 0"),
    "half of the GPUs requested": ((*REQUESTS, "nvidia.com/gpu"), "4", "GPUs requested and limited differ"),
    "KubeRay's own submitter": ((*JOB, "submitterPodTemplate"), DELETE, "submitter"),
    "a pod that may be root": ((*WORKER, "securityContext", "runAsNonRoot"), DELETE, "gpu: the pod may run as root"),
    "a pod that is root": ((*WORKER, "securityContext", "runAsUser"), 0, "gpu: the pod may run as root"),
    "a container that is root": ((*CONTAINER, "securityContext", "runAsUser"), 0, "gpu/ray-worker: may run as root"),
    "a privileged container": ((*CONTAINER, "securityContext", "privileged"), True, "privileged"),
    "a container that gains privileges": (
        (*CONTAINER, "securityContext", "allowPrivilegeEscalation"),
        DELETE,
        "can gain privileges",
    ),
    "all capabilities": ((*CONTAINER, "securityContext"), DELETE, "capabilities"),
    "no seccomp": ((*WORKER, "securityContext", "seccompProfile"), DELETE, "seccomp"),
    "the node's network": ((*WORKER, "hostNetwork"), True, "hostNetwork"),
    "the node's disk": ((*WORKER, "volumes", 0), {"name": "checkpoints", "hostPath": {"path": "/"}}, "hostPath"),
    "a worker with credentials": ((*WORKER, "automountServiceAccountToken"), DELETE, "service account"),
    "a secret in the file": ((*CONTAINER, "env", 0), {"name": "HF_TOKEN", "value": "x"}, "from a Secret"),
    "a volume that is not there": ((*WORKER, "volumes", 0, "name"), "checkpoint", "is not defined"),
    "another claim": ((*WORKER, "volumes", 0, "persistentVolumeClaim", "claimName"), "x", "gpu: /checkpoints"),
    "no shared folder": ((*HEAD, "spec", "containers", 0, "volumeMounts", 0), DELETE, "head: /checkpoints"),
    "shared memory on disk": ((*WORKER, "volumes", 1, "emptyDir"), {}, "/dev/shm"),
    "too much shared memory": ((*WORKER, "volumes", 1, "emptyDir", "sizeLimit"), "1Ti", "/dev/shm"),
    "no liveness probe": ((*CONTAINER, "livenessProbe"), DELETE, "gpu: no livenessProbe"),
    "no readiness probe": ((*HEAD, "spec", "containers", 0, "readinessProbe"), DELETE, "head: no readinessProbe"),
    "another command": ((*JOB, "entrypoint"), "python -m serving configs/align/demo.yaml", "python -m cluster"),
    "a recipe elsewhere": ((*JOB, "entrypoint"), "python -m cluster recipe.yaml", "python -m cluster"),
    "a recipe that is not there": ((*JOB, "entrypoint"), "python -m cluster configs/align/x.yaml", "cannot be read"),
    "smaller pods": ((*LIMITS, "cpu"), "8", "room for 4"),
    "fewer pods": ((*GROUP, "maxReplicas"), 0, "room for 0"),
    "no entrypoint": ((*JOB, "entrypoint"), DELETE, "entrypoint"),
    "another directory": ((*HEAD, "spec", "containers", 0, "workingDir"), "/", "workingDir"),
    "no retry": ((*JOB, "backoffLimit"), 0, "backoffLimit"),
    "a cluster that stays": ((*JOB, "shutdownAfterJobFinishes"), DELETE, "outlives"),
    "a drain that Ray does not know": ((*CONTAINER, "env", 1), DELETE, "gpu: no RAY_GRACEFUL"),
    "a drain that ends in SIGKILL": ((*WORKER, "terminationGracePeriodSeconds"), 30, "leaves less than 15 s"),
    "no NetworkPolicy": ((1,), DELETE, "gpu: no NetworkPolicy"),
    "a pod outside the policy": ((*HEAD, "metadata", "labels"), {}, "head: no NetworkPolicy"),
    "ingress from everyone": ((*INGRESS, 1, "from"), DELETE, "everyone"),
    "ingress from every pod": ((*INGRESS, 1, "from", 0, "podSelector"), {}, "no pod label"),
    "ingress from every address": ((*INGRESS, 1, "from", 0), ANYWHERE, "no pod label"),
    "ingress to every port": ((*INGRESS, 1, "ports"), DELETE, "more than"),
    "ingress to the GCS": ((*INGRESS, 1, "ports", 0, "port"), 6379, "more than"),
    "egress not restricted": ((1, "spec", "policyTypes"), ["Ingress"], "direction"),
    "egress to the metadata service": ((*EGRESS, 5, "to", 0, "ipBlock", "except"), [], "metadata service"),
    "egress to anywhere": ((*EGRESS, 5, "to"), DELETE, "connect to anything"),
}


@pytest.mark.parametrize(("path", "value", "complaint"), BROKEN_JOBS.values(), ids=BROKEN_JOBS.keys())
def test_a_broken_rayjob_is_refused(path: Where, value: object, complaint: str) -> None:
    assert complaint in "\n".join(file_problems(changed(load("rayjob.yaml"), path, value)))


BROKEN_ENTRYPOINTS = {
    # what is broken: (a setting added to the good ones, a part of the complaint)
    "a setting with a typo": ("cluster.worker=8", "did you mean 'workers'"),
    "a setting that does not exist": ("cluster.storage=/checkpoints", "cluster.storage: unknown key"),
    "a value out of range": ("optim.lr=-1", "optim.lr"),
    "checkpoints in the container": ("output=runs", "not the shared volume"),
    "an address that is no folder": ("output=s3://bucket/runs", "not the shared volume"),
    "no waiting for nodes": ("cluster.autoscaling=false", "autoscaling"),
    "more workers than GPUs": ("cluster.workers=33", "33 workers where there is room for 32"),
    "no workers": ("cluster.workers=0", "0 workers"),
    "more CPUs than there are": ("cluster.cpus_per_worker=65", "room for 0"),
}


@pytest.mark.parametrize(("added", "complaint"), BROKEN_ENTRYPOINTS.values(), ids=BROKEN_ENTRYPOINTS.keys())
def test_a_broken_entrypoint_is_refused(added: str, complaint: str) -> None:
    documents = load("rayjob.yaml")
    documents[0]["spec"]["entrypoint"] += f" {added}"
    assert complaint in "\n".join(file_problems(documents))


SERVICE_CLUSTER = (*JOB, "rayClusterConfig")
CLIENTS = (1, "spec", "ingress", 1)

BROKEN_SERVICES: dict[str, tuple[Where, object, str]] = {
    "a RayService key with a typo": ((*JOB, "serveConfig"), "", "serveConfig"),
    "a strategy that does not exist": ((*JOB, "upgradeStrategy", "type"), "NewClusters", "interrupts"),
    "no strategy": ((*JOB, "upgradeStrategy"), DELETE, "interrupts"),
    "another Ray": ((*SERVICE_CLUSTER, "rayVersion"), "2.59.0", "rayVersion 2.59.0"),
    "min above max": ((*SERVICE_CLUSTER, "workerGroupSpecs", 0, "maxReplicas"), 0, "does not hold"),
    "no authentication": ((*SERVICE_CLUSTER, "authOptions"), DELETE, "authOptions.mode"),
    "a broken serve config": ((*JOB, "serveConfigV2"), "applications: 1", "serve refuses it"),
    "old clusters cut off": ((*JOB, "rayClusterDeletionDelaySeconds"), 60, "rayClusterDeletionDelaySeconds"),
    "a head without checkpoints": (
        (*SERVICE_CLUSTER, "headGroupSpec", "template", "spec", "containers", 0, "volumeMounts", 0),
        DELETE,
        "head: /checkpoints",
    ),
    "a drain shorter than answers": (
        (*SERVICE_CLUSTER, "workerGroupSpecs", 0, "template", "spec", "containers", 0, "env", 0, "value"),
        "600",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S 600.0 is not longer than args.drain_timeout_s",
    ),
    "no GPU for the scorer": (
        (*SERVICE_CLUSTER, "workerGroupSpecs", 0, "maxReplicas"),
        4,
        "GPUs where there is room for 4",
    ),
    "fewer GPUs than engines": ((*SERVICE_CLUSTER, "workerGroupSpecs", 0, "maxReplicas"), 3, "room for 3"),
    "no NetworkPolicy": ((1,), DELETE, "gpu: no NetworkPolicy"),
    "everyone at the endpoint": ((*CLIENTS, "from"), [], "everyone"),
    "clients at the Jobs API": ((*CLIENTS, "ports", 0, "port"), 8265, "more than"),
    "a policy for no pod": ((1, "spec", "podSelector", "matchLabels"), {"app": "x"}, "no NetworkPolicy"),
}


BROKEN_DATABASES: dict[str, tuple[Where, object, str]] = {
    "a StatefulSet key with a typo": ((1, "spec", "replica"), 1, "replica"),
    "a Service key with a typo": ((0, "spec", "port"), [], "port"),
    "a pod that may be root": ((1, "spec", "template", "spec", "securityContext"), {}, "may run as root"),
    "whatever is newest": ((1, "spec", "template", "spec", "containers", 0, "image"), "postgres:latest", "no version"),
    "a password in the file": (
        (1, "spec", "template", "spec", "containers", 0, "env", 2),
        {"name": "POSTGRES_PASSWORD", "value": "x"},
        "from a Secret",
    ),
    "no probe": ((1, "spec", "template", "spec", "containers", 0, "livenessProbe"), DELETE, "no livenessProbe"),
    "everyone at the database": ((2, "spec", "ingress", 0, "from"), [], "everyone may reach port {5432}"),
    "more ports than there are": ((2, "spec", "ingress", 0, "ports", 0, "port"), 22, "more than"),
    "no NetworkPolicy": ((2,), DELETE, "no NetworkPolicy"),
}


@pytest.mark.parametrize(("path", "value", "complaint"), BROKEN_DATABASES.values(), ids=BROKEN_DATABASES.keys())
def test_a_broken_database_is_refused(path: Where, value: object, complaint: str) -> None:
    assert complaint in "\n".join(file_problems(changed(load("database.yaml"), path, value)))


@pytest.mark.parametrize(("path", "value", "complaint"), BROKEN_SERVICES.values(), ids=BROKEN_SERVICES.keys())
def test_a_broken_rayservice_is_refused(path: Where, value: object, complaint: str) -> None:
    assert complaint in "\n".join(file_problems(changed(load("rayservice.yaml"), path, value)))


BROKEN_SERVE_CONFIGS = {
    # what is broken: (text, the wrong text for it, a part of the complaint)
    "a top-level key with a typo": (
        "proxy_location:",
        "proxy_locatoin:",
        "ServeDeploySchema has no key proxy_locatoin",
    ),
    "an http key with a typo": ("port: 8000", "prot: 8000", "HTTPOptionsSchema has no key prot"),
    "an application key with a typo": (
        "route_prefix:",
        "route_prefx:",
        "ServeApplicationSchema has no key route_prefx",
    ),
    "a deployment key with a typo": ("autoscaling_config:", "autoscaling:", "DeploymentSchema has no key autoscaling"),
    "an autoscaling key with a typo": ("{min_replicas:", "{min_replica:", "AutoscalingConfig has no key min_replica"),
    "a deployment that does not exist": ("name: ingress", "name: Ingress", "no deployment Ingress"),
    "min above max": ("{min_replicas: 2", "{min_replicas: 5", "ingress: autoscaling_config"),
    "a word for a number": ("max_replicas: 4,", "max_replicas: none,", "max_replicas"),
    "no import_path": ("import_path:", "importpath:", "import_path"),
    "another application": ("serving:build", "serving.app:build", "import_path"),
    "an argument with a typo": ("max_num_seqs:", "max_seqs:", "args: max_seqs: unknown key; did you mean"),
    "an argument that does not exist": ("device: cuda", "api_keys_file: keys", "args: api_keys_file: unknown key"),
    "an argument out of range": ("min_replicas: 2  #", "min_replicas: 5  #", "args: the whole file: min_replicas (5)"),
    "no checkpoint": ("checkpoint: /", "# /", "args: checkpoint: is required"),
    "a checkpoint that changes": ("/checkpoints/step-00000955", "", "not one step's folder"),
    "a checkpoint elsewhere": ("checkpoint: /checkpoints/", "checkpoint: hub/", "shared volume"),
    "a device that is not there yet": ("device: cuda", "device: auto", "not cuda"),
    "a target out of reach": ("target_ongoing_requests: 32", "target_ongoing_requests: 64", "never scales"),
    "engines that find no GPU": ("max_replicas: 4\n", "max_replicas: 7\n", "room for 6"),
    "engines too large for a pod": ("max_num_seqs:", "tensor_parallel_size: 2\n      max_num_seqs:", "room for 0"),
    "a proxy that is impatient": ("request_timeout_s: 630", "request_timeout_s: 60", "running answers are cut"),
    "no limit in the proxy": ("request_timeout_s: 630", "keep_alive_timeout_s: 90", "running answers are cut"),
    "streams cut": ("drain_timeout_s: 660", "drain_timeout_s: 20", "running answers are cut"),
}


@pytest.mark.parametrize(("old", "new", "complaint"), BROKEN_SERVE_CONFIGS.values(), ids=BROKEN_SERVE_CONFIGS.keys())
def test_a_broken_serve_config_is_refused(old: str, new: str, complaint: str) -> None:
    documents = load("rayservice.yaml")
    text = documents[0]["spec"]["serveConfigV2"]
    assert text.count(old) == 1
    documents[0]["spec"]["serveConfigV2"] = text.replace(old, new)
    assert complaint in "\n".join(file_problems(documents))
