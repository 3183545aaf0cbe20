"""Whom the pods of configs/cluster have to reach, told from what they run, and whether the NetworkPolicies let them.

A pod's needs come from its own arguments: a database from `feedback.database`, an endpoint from `data.path`, a reward
server from `rewards` and `eval_rewards`, a hub from the id of a model. Kubernetes' rule for policies is kept here as it
is: a pod that no policy selects may do anything, and one that is selected only what some policy allows.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from alignment.data.sources import DATABASES, ENDPOINTS, is_data_file
from alignment.models.folders import BUNDLED
from alignment.settings.data import SourceConfig
from alignment.settings.load import check_config
from cluster.config import ClusterRunConfig, load_run
from serving.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
Document = dict[str, Any]
DEFAULT_PORTS = {"http": 80, "https": 443, "redis": 6379, "rediss": 6379}
POSTGRESQL = 5432
HUB = "huggingface.co"
API_SERVER = "kubernetes.default.svc"
PODS = {
    "StatefulSet": ("spec", "template"),
    "Deployment": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
CLIENT = {"app.kubernetes.io/component": "endpoint-client"}


@dataclass(frozen=True, kw_only=True)
class Pod:
    """Pods that are made from one template."""

    name: str
    labels: dict[str, str]
    spec: Document

    @property
    def container(self) -> Document:
        """Its own container; others are KubeRay's."""
        container: Document = self.spec["containers"][0]
        return container

    @property
    def variables(self) -> dict[str, Document]:
        """Its environment by name."""
        return {variable["name"]: variable for variable in self.container.get("env", [])}

    def value(self, name: str) -> str | None:
        """A variable that is written out."""
        value: str | None = self.variables.get(name, {}).get("value")
        return value


@dataclass(frozen=True, kw_only=True)
class Need:
    """A connection that a pod has to open."""

    host: str
    port: int
    why: str
    variable: str | None = None
    """Name of the environment variable with the password or key for it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The documents of all files, as one cluster would hold them."""

    documents: list[Document]
    pods: dict[str, Pod] = field(default_factory=dict)

    @staticmethod
    def of(documents: list[Document]) -> Place:
        pods = {pod.name: pod for document in documents for pod in pods_of(document)}
        return Place(documents=documents, pods=pods)

    @property
    def policies(self) -> list[Document]:
        return [document["spec"] for document in self.documents if document["kind"] == "NetworkPolicy"]

    def targets(self, host: str, port: int) -> list[tuple[Pod, int]] | None:
        """The pods behind a name, and the port there; None if it is no name of this cluster's."""
        name = host.partition(".")[0]
        for document in self.documents:
            if document["kind"] == "RayService" and name == f"{document['metadata']['name']}-serve-svc":
                return [(pod, port) for pod in pods_of(document) if pod.labels["ray.io/node-type"] == "worker"]
            if document["kind"] == "Service" and name == document["metadata"]["name"]:
                ports = [each["targetPort"] for each in document["spec"]["ports"] if each["port"] == port]
                selector = {"matchLabels": document["spec"]["selector"]}
                chosen = [pod for pod in self.pods.values() if selects(selector, pod.labels)]
                return [(pod, target) for pod in chosen for target in ports]
        return None


def pods_of(document: Document) -> Iterator[Pod]:
    """The pods that Kubernetes or KubeRay makes for a document, with the labels that KubeRay adds."""
    kind = document["kind"]
    name = document["metadata"].get("name") or document["metadata"]["generateName"].rstrip("-")
    if kind in PODS:
        template = document
        for key in PODS[kind]:
            template = template[key]
        yield _pod(name, template, {})
    if kind in ("RayJob", "RayService"):
        cluster = document["spec"]["rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"]
        yield _pod(f"{name}/head", cluster["headGroupSpec"]["template"], {"ray.io/node-type": "head"})
        for group in cluster["workerGroupSpecs"]:
            labels = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
            yield _pod(f"{name}/{group['groupName']}", group["template"], labels)
        if "submitterPodTemplate" in document["spec"]:
            yield _pod(f"{name}/submitter", document["spec"]["submitterPodTemplate"], {})


def _pod(name: str, template: Document, labels: dict[str, str]) -> Pod:
    own = template.get("metadata", {}).get("labels", {})
    return Pod(name=name, labels=own | labels, spec=template["spec"])


# ------------------------------------------------------------------------------------------------ what pods need


def needs_of(document: Document) -> dict[str, list[Need]]:
    """The connections that a document's pods open, by the name of the pod."""
    pods = list(pods_of(document))
    if document["kind"] == "RayService":
        return _needs_of_service(document, pods)
    if document["kind"] == "RayJob":
        return _needs_of_job(pods, load_entrypoint(document["spec"]["entrypoint"]))
    return {pod.name: list(_needs_of_command(pod)) for pod in pods}


def load_entrypoint(entrypoint: str) -> ClusterRunConfig:
    """The run that a RayJob's entrypoint starts."""
    words = shlex.split(entrypoint)
    return load_run(ROOT / words[3], words[4:])


def _needs_of_service(document: Document, pods: list[Pod]) -> dict[str, list[Need]]:
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    served = [check_config(each.get("args", {}), kind=ServeConfig) for each in config["applications"]]
    needs: dict[str, list[Need]] = {pod.name: [] for pod in pods}
    for pod in pods:
        offline = pod.value("HF_HUB_OFFLINE") == "1"
        for endpoint in served:  # replicas run on workers, and the application is built on any node
            if database := endpoint.feedback.database:
                needs[pod.name] += _database(database, "feedback.database")
            models = (endpoint.checkpoint, endpoint.rewards.model, endpoint.rewards.reference)
            needs[pod.name] += [] if offline else [need for model in models for need in _model(model)]
        if pod.labels["ray.io/node-type"] == "head":
            needs[pod.name] += _head(document["spec"]["rayClusterConfig"])
    return needs


def _needs_of_job(pods: list[Pod], run: ClusterRunConfig) -> dict[str, list[Need]]:
    needs: dict[str, list[Need]] = {pod.name: [] for pod in pods}
    for pod in pods:
        if pod.labels.get("ray.io/node-type") == "head":
            needs[pod.name].append(Need(host=API_SERVER, port=443, why="the autoscaler"))
        if pod.labels.get("ray.io/node-type") == "worker":
            needs[pod.name] += needs_of_run(run)
    return needs


def needs_of_run(run: ClusterRunConfig) -> list[Need]:
    """What the workers of a run reach."""
    sources = [*run.data.sources, *([run.data.eval] if run.data.eval else [])]
    needs = [need for source in sources for need in _source(source)]
    models = [run.model.path, run.model.lora.start if run.model.lora else None]
    for scorer in (*run.rewards, *run.eval_rewards):
        if url := getattr(scorer, "url", None):
            needs.append(_url(url, f"scorer {scorer.name}", getattr(scorer, "key_env", None)))
        models.append(getattr(scorer, "path", None))
    return [*needs, *(need for model in models for need in _model(model))]


def _source(source: SourceConfig) -> Iterator[Need]:
    path = source.path or ""
    if path.startswith(ENDPOINTS):
        yield _url(path, "data.path", "RAYLIGN_KEY")
    elif path.startswith(DATABASES):
        yield from _database(path, "data.path")
    elif path and not path.startswith((".", "/", "~", "configs/")) and not is_data_file(path):
        yield Need(host=HUB, port=443, why=f"data {path}")


def _model(path: str | None) -> Iterator[Need]:
    if path and path != BUNDLED and not path.startswith((".", "/", "~", "runs/")):
        yield Need(host=HUB, port=443, why=f"model {path}", variable="HF_TOKEN")


def _database(url: str, why: str) -> list[Need]:
    parts = urlsplit(url)
    if not parts.scheme.startswith("postgresql"):
        return []
    assert parts.hostname is not None
    return [Need(host=parts.hostname, port=parts.port or POSTGRESQL, why=why, variable="PGPASSWORD")]


def _url(url: str, why: str, variable: str | None) -> Need:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return Need(host=parts.hostname, port=parts.port or DEFAULT_PORTS[parts.scheme], why=why, variable=variable)


def _head(cluster: Document) -> Iterator[Need]:
    yield Need(host=API_SERVER, port=443, why="the autoscaler")
    if options := cluster.get("gcsFaultToleranceOptions"):
        address = options["redisAddress"]
        yield _url(address if "://" in address else f"redis://{address}", "gcsFaultToleranceOptions", None)


def _needs_of_command(pod: Pod) -> Iterator[Need]:
    """Of our own command, as `raylign promote … --url=http://…`."""
    words = [*pod.container.get("command", []), *pod.container.get("args", [])]
    text = " ".join(words)
    if words[:2] in (["raylign", "promote"], ["raylign", "rollback"], ["raylign", "versions"]):
        (url,) = re.findall(r"--url[= ](\S+)", text)
        yield _url(url, "--url", "RAYLIGN_KEY")
    if words[:2] == ["raylign", "keys"]:
        database = (re.findall(r"--database[= ](\S+)", text) or [pod.value("RAYLIGN_DATABASE")])[0]
        if database is not None:
            yield from _database(database, "the keys' database")
        if given := re.findall(r"--key-from[= ](\S+)", text):
            assert given[0] in pod.variables, f"{pod.name}: {given[0]} is not set"
    if words[:2] == ["raylign", "reward-server"]:
        assert "RAYLIGN_REWARD_KEY" in pod.variables, f"{pod.name}: RAYLIGN_REWARD_KEY is not set"


# ------------------------------------------------------------------------------------------- what policies allow


def reach_problems(place: Place, needs: dict[str, list[Need]]) -> Iterator[str]:
    """Connections that some NetworkPolicy blocks, and passwords and keys that are not in a pod's environment."""
    for name, wanted in needs.items():
        pod = place.pods[name]
        has_names = bool(wanted) or "/" in name  # Ray's nodes find their head by name
        if has_names and not allowed(place, pod, "egress", None, 53):
            yield f"{name}: may not ask the DNS"
        for need in wanted:
            what = f"{name}: {need.why}: {need.host}:{need.port}"
            if need.variable and not _from_secret(pod, need.variable):
                yield f"{what}: {need.variable} does not come from a Secret"
            targets = place.targets(need.host, need.port)
            if targets is None and "." not in need.host:
                yield f"{what}: there is no such Service"
            elif targets is None:
                ports = (443, 6443) if need.host == API_SERVER else (need.port,)
                if not all(allowed(place, pod, "egress", ipaddress.ip_address("203.0.113.9"), port) for port in ports):
                    yield f"{what}: no egress"
            elif not targets:
                yield f"{what}: its Service has no pod or no such port"
            else:
                yield from _between(place, pod, targets, what)


def _between(place: Place, pod: Pod, targets: list[tuple[Pod, int]], what: str) -> Iterator[str]:
    for target, port in targets:
        if not allowed(place, pod, "egress", target.labels, port):
            yield f"{what}: no egress to {target.name}"
        if not allowed(place, target, "ingress", pod.labels, port):
            yield f"{what}: {target.name} lets nobody in from there"
        listening = {each["containerPort"] for each in target.container.get("ports", [])}
        if port not in listening:
            yield f"{what}: {target.name} has no port {port}"


def _from_secret(pod: Pod, name: str) -> bool:
    return "secretKeyRef" in pod.variables.get(name, {}).get("valueFrom", {})


Peer = dict[str, str] | ipaddress.IPv4Address | ipaddress.IPv6Address | None
"""Labels of a pod of the same namespace, an address outside, or None for anything at all."""


def allowed(place: Place, pod: Pod, direction: str, peer: Peer, port: int) -> bool:
    """Whether the policies let a pod connect to a peer (`egress`) or a peer to it (`ingress`)."""
    selecting = [
        policy
        for policy in place.policies
        if direction.capitalize() in policy["policyTypes"] and selects(policy["podSelector"], pod.labels)
    ]
    if not selecting:
        return True
    rules = [rule for policy in selecting for rule in policy.get(direction, [])]
    return any(_rule_allows(rule, "to" if direction == "egress" else "from", peer, port) for rule in rules)


def _rule_allows(rule: Document, key: str, peer: Peer, port: int) -> bool:
    ports = rule.get("ports")
    if ports and not any(each["port"] <= port <= each.get("endPort", each["port"]) for each in ports):
        return False
    return not rule.get(key) or any(_is_peer(each, peer) for each in rule[key])


def _is_peer(rule: Document, peer: Peer) -> bool:
    if isinstance(peer, dict):
        return "podSelector" in rule and selects(rule["podSelector"], peer)
    if peer is None or "ipBlock" not in rule:
        return False
    block = rule["ipBlock"]
    excepted = any(peer in ipaddress.ip_network(network) for network in block.get("except", []))
    return peer in ipaddress.ip_network(block["cidr"]) and not excepted


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod in; an empty one takes all."""
    for expression in selector.get("matchExpressions", []):
        has, values = labels.get(expression["key"]), expression.get("values", [])
        matches = {
            "In": has in values,
            "NotIn": has not in values,
            "Exists": has is not None,
            "DoesNotExist": has is None,
        }
        if not matches[expression["operator"]]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
