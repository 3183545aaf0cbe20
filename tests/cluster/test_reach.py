"""What the pods of configs/cluster have to reach is told from what they run, and no NetworkPolicy is in the way."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.cluster.kuberay import place_problems
from tests.cluster.reach import Document, Place, Pod, allowed, needs_of, pods_of, selects
from tests.cluster.test_cluster_files import CLUSTER_FILES, DELETE, KUBERNETES_FILES, changed, load

ENDPOINT = "raylign-endpoint/gpu"


def all_files() -> dict[str, list[Document]]:
    return {name: load(name) for name in KUBERNETES_FILES}


def together(files: dict[str, list[Document]]) -> list[Document]:
    return [document for documents in files.values() for document in documents]


def with_entrypoint(text: str) -> list[Document]:
    """All files, the training job with another command."""
    files = all_files()
    files["rayjob.yaml"][0]["spec"]["entrypoint"] = text
    return together(files)


def test_all_files_together_let_everybody_reach_what_they_need() -> None:
    assert place_problems(together(all_files())) == []


def test_a_run_that_learns_from_the_feedback_reaches_it_as_the_head_of_the_file_has_it() -> None:
    text = (CLUSTER_FILES / "rayjob.yaml").read_text()
    commented = re.search(r"(?<=#   entrypoint: >-\n)(#     .+\n)+", text)
    assert commented is not None
    documents = with_entrypoint(" ".join(line.lstrip("# ") for line in commented[0].splitlines()))
    (job,) = [document for document in documents if document["kind"] == "RayJob"]
    (need,) = needs_of(job)["raylign-train/gpu"]
    assert (need.host, need.port, need.variable) == ("raylign-endpoint-serve-svc", 8000, "RAYLIGN_KEY")
    assert place_problems(documents) == []


GRPO = "python -m cluster configs/align/grpo_smollm2.yaml output=/checkpoints"
REWARD = '{name: http, url: "http://raylign-reward:8100/score", key_env: RAYLIGN_REWARD_KEY}'


@pytest.mark.parametrize(
    "settings",
    [
        f"'rewards=[{REWARD}]'",
        f"'eval_rewards=[{REWARD}]'",
        "data.path=postgresql+psycopg://raylign@raylign-database/raylign",
        "model.path=meta-llama/Llama-3.2-1B-Instruct",
        "'rewards=[{name: http, url: \"https://scorer.example/score\"}]'",
    ],
)
def test_runs_reach_scorers_the_database_and_hubs(settings: str) -> None:
    assert place_problems(with_entrypoint(f"{GRPO} {settings}")) == []


UNREACHABLE = {
    "a scorer on a port of its own": (
        "'eval_rewards=[{name: http, url: \"https://scorer.example:8443/score\"}]'",
        "raylign-train/gpu: scorer http: scorer.example:8443: no egress",
    ),
    "a service that is not there": (
        "'rewards=[{name: http, url: \"http://rewards:8100/score\"}]'",
        "rewards:8100: there is no such Service",
    ),
    "another port of a service": (
        "'rewards=[{name: http, url: \"http://raylign-reward:80/score\"}]'",
        "raylign-reward:80: its Service has no pod or no such port",
    ),
    "a key that no pod has": (
        "'eval_rewards=[{name: http, url: \"https://scorer.example/score\", key_env: SCORER_KEY}]'",
        "SCORER_KEY does not come from a Secret",
    ),
    "an endpoint elsewhere in the cluster": (
        "data.path=http://other-serve-svc:8000/v1/feedback/export",
        "other-serve-svc:8000: there is no such Service",
    ),
}


@pytest.mark.parametrize(("settings", "complaint"), UNREACHABLE.values(), ids=UNREACHABLE.keys())
def test_what_a_run_cannot_reach_is_told(settings: str, complaint: str) -> None:
    assert complaint in "\n".join(place_problems(with_entrypoint(f"{GRPO} {settings}")))


SERVICE, POLICY, HEAD_POLICY, BUDGET = 0, 1, 2, 3
CLUSTER = (SERVICE, "spec", "rayClusterConfig")
WORKER = (*CLUSTER, "workerGroupSpecs", 0, "template", "spec")
ENV = (*WORKER, "containers", 0, "env")
NOBODY = {"matchLabels": {"app": "nobody"}}

BROKEN: dict[str, tuple[str, tuple[str | int, ...], object, str]] = {
    # what is broken: (file, where, the wrong value, a part of the complaint)
    "no password": ("rayservice.yaml", (*ENV, -1), DELETE, f"{ENDPOINT}: feedback.database"),
    "a password written out": ("rayservice.yaml", (*ENV, -1), {"name": "PGPASSWORD", "value": "x"}, "from a Secret"),
    "no egress to the database": (
        "rayservice.yaml",
        (POLICY, "spec", "egress", 1),
        DELETE,
        "no egress to raylign-data",
    ),
    "a database that lets nobody in": ("database.yaml", (2, "spec", "ingress"), [], "lets nobody in"),
    "a database on another port": ("database.yaml", (0, "spec", "ports", 0, "targetPort"), 5433, "has no port 5433"),
    "no DNS": ("rayservice.yaml", (POLICY, "spec", "egress", 2), DELETE, f"{ENDPOINT}: may not ask the DNS"),
    "no Kubernetes API": ("rayservice.yaml", (HEAD_POLICY, "spec", "egress", 1), DELETE, "head: the autoscaler"),
    "no Redis for the head": ("rayservice.yaml", (HEAD_POLICY, "spec", "egress", 0), DELETE, "gcsFaultTolerance"),
    "a Redis that is not there": (
        "rayservice.yaml",
        (*CLUSTER, "gcsFaultToleranceOptions", "redisAddress"),
        "redis:6379",
        "redis:6379: there is no such Service",
    ),
    "an endpoint that lets no run in": (
        "rayservice.yaml",
        (POLICY, "spec", "ingress", 1, "from", 2),
        DELETE,
        "raylign-promote: --url: raylign-endpoint-serve-svc:8000: raylign-endpoint/gpu lets nobody in",
    ),
    "an endpoint that lets no client in": (
        "rayservice.yaml",
        (POLICY, "spec", "ingress", 1, "from", 0),
        DELETE,
        "clients may not ask it",
    ),
    "an operator outside": ("rayservice.yaml", (POLICY, "spec", "ingress", 2), DELETE, "the operator may not deploy"),
    "no metrics": ("rayjob.yaml", (1, "spec", "ingress", 2), DELETE, "Prometheus may not read"),
    "nodes apart": ("rayjob.yaml", (1, "spec", "egress", 0), DELETE, "may not reach each other"),
    "a promotion that may reach nothing": ("keys.yaml", (1, "spec", "egress", 1), DELETE, "raylign-promote: --url"),
    "a first key without its database": ("keys.yaml", (1, "spec", "egress", 0), DELETE, "the keys' database"),
    "a budget for no pod": ("rayservice.yaml", (BUDGET, "spec", "selector"), NOBODY, "is for no pod"),
    "nodes that go together": ("rayservice.yaml", (BUDGET, "spec", "selector"), NOBODY, "drained at once"),
    "an Ingress to nowhere": (
        "ingress.yaml",
        (0, "spec", "rules", 0, "http", "paths", 0, "backend", "service", "name"),
        "raylign-endpoint",
        "there is no Service raylign-endpoint",
    ),
    "a scrape of nothing": (
        "monitoring.yaml",
        (0, "spec", "staticConfigs", 0, "targets"),
        ["raylign-serve-svc.raylign.svc:8000"],
        "raylign-serve-svc.raylign.svc:8000: there is no such Service",
    ),
    "a scrape of every pod": (
        "monitoring.yaml",
        (0, "spec", "staticConfigs", 0, "targets"),
        ["a:8000", "b:8000"],
        "an endpoint has one address",
    ),
    "an endpoint that tells Prometheus nothing": (
        "rayservice.yaml",
        (POLICY, "spec", "ingress", 3, "ports", 1),
        DELETE,
        "does not let Prometheus in",
    ),
    "Ray's own figures for nobody": (
        "monitoring.yaml",
        (1, "spec", "podMetricsEndpoints", 0, "port"),
        "metric",
        "raylign-endpoint/head: is not scraped",
    ),
    "a claim that is not there": ("storage.yaml", (0, "metadata", "name"), "other", "no claim raylign-checkpoints"),
}


@pytest.mark.parametrize(("name", "path", "value", "complaint"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_in_the_way_is_told(name: str, path: tuple[str | int, ...], value: object, complaint: str) -> None:
    files = all_files()
    files[name] = changed(files[name], path, value)
    assert complaint in "\n".join(place_problems(together(files)))


# ------------------------------------------------------------------------------------- what NetworkPolicies mean


def a_pod(**labels: str) -> Pod:
    return Pod(name="pod", labels=labels, spec={"containers": [{"name": "c"}]})


def a_policy(**spec: Any) -> Document:
    return {"kind": "NetworkPolicy", "metadata": {"name": "p"}, "spec": {"podSelector": {}, **spec}}


def test_a_pod_that_no_policy_selects_may_do_anything() -> None:
    policy = a_policy(podSelector={"matchLabels": {"app": "a"}}, policyTypes=["Egress"], egress=[])
    place = Place(documents=[policy])
    assert allowed(place, a_pod(app="b"), "egress", {"app": "a"}, 80)
    assert not allowed(place, a_pod(app="a"), "egress", {"app": "b"}, 80)
    assert allowed(place, a_pod(app="a"), "ingress", {"app": "b"}, 80)  # the policy is not about ingress


def test_policies_add_up() -> None:
    to_a = a_policy(policyTypes=["Egress"], egress=[{"to": [{"podSelector": {"matchLabels": {"app": "a"}}}]}])
    to_80 = a_policy(policyTypes=["Egress"], egress=[{"ports": [{"port": 80}]}])
    place = Place(documents=[to_a, to_80])
    assert allowed(place, a_pod(), "egress", {"app": "a"}, 9999)
    assert allowed(place, a_pod(), "egress", {"app": "b"}, 80)
    assert not allowed(place, a_pod(), "egress", {"app": "b"}, 81)


def test_peers_and_ports_of_one_rule_must_both_fit() -> None:
    rule = {"from": [{"podSelector": {"matchLabels": {"app": "a"}}}], "ports": [{"port": 80, "endPort": 82}]}
    place = Place(documents=[a_policy(policyTypes=["Ingress"], ingress=[rule])])
    assert allowed(place, a_pod(), "ingress", {"app": "a"}, 81)
    assert not allowed(place, a_pod(), "ingress", {"app": "a"}, 83)
    assert not allowed(place, a_pod(), "ingress", {"app": "b"}, 81)


def test_label_selectors_read_expressions() -> None:
    selector = {"matchExpressions": [{"key": "type", "operator": "In", "values": ["head"]}]}
    assert selects(selector, {"type": "head"})
    assert not selects(selector, {"type": "worker"})
    assert selects({"matchExpressions": [{"key": "type", "operator": "DoesNotExist"}]}, {})
    assert selects({}, {"anything": "x"})


def test_pods_of_a_ray_cluster_carry_the_labels_that_kuberay_adds() -> None:
    (service, *_) = load("rayservice.yaml")
    assert {pod.name: pod.labels["ray.io/node-type"] for pod in pods_of(service)} == {
        "raylign-endpoint/head": "head",
        ENDPOINT: "worker",
    }


def test_hubs_are_not_asked_where_nothing_is_downloaded() -> None:
    documents = load("rayservice.yaml")
    config = yaml.safe_load(documents[0]["spec"]["serveConfigV2"])
    config["applications"][0]["args"]["checkpoint"] = "Qwen/Qwen3-8B"
    documents[0]["spec"]["serveConfigV2"] = json.dumps(config)
    assert [need.host for need in needs_of(documents[0])[ENDPOINT]] == ["raylign-database"]
    for pod in pods_of(documents[0]):
        pod.variables["HF_HUB_OFFLINE"]["value"] = "0"
    assert [need.host for need in needs_of(documents[0])[ENDPOINT]] == ["raylign-database", "huggingface.co"]
