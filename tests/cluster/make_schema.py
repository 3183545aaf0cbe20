"""Makes kuberay_schema.json anew, from what Kubernetes, KubeRay and the Prometheus Operator themselves publish:

    git clone --depth 1 --branch v1.6.2 https://github.com/ray-project/kuberay
    git clone --depth 1 --branch v0.93.0 https://github.com/prometheus-operator/prometheus-operator
    pip install kubernetes-validate
    python -m tests.cluster.make_schema .venv/lib/python3.11/site-packages/kubernetes_validate kuberay \
        prometheus-operator

What is alike is kept once, texts are left out, and a key that is not listed is refused: the API server would drop it in
silence.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

KUBERAY, KUBERNETES, OPERATOR = "1.6.2", "1.31.0", "0.93.0"
KINDS = {
    "CronJob": "io.k8s.api.batch.v1.CronJob",
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "Ingress": "io.k8s.api.networking.v1.Ingress",
    "Job": "io.k8s.api.batch.v1.Job",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "PodDisruptionBudget": "io.k8s.api.policy.v1.PodDisruptionBudget",
    "Service": "io.k8s.api.core.v1.Service",
    "StatefulSet": "io.k8s.api.apps.v1.StatefulSet",
}
KUBERAY_CRDS = "helm-chart/kuberay-operator/crds/ray.io_{}.yaml"
OPERATOR_CRDS = "example/prometheus-operator-crd/monitoring.coreos.com_{}.yaml"
CUSTOM_RESOURCES = {
    "RayJob": (KUBERAY_CRDS, "rayjobs", "ray.io/v1"),
    "RayService": (KUBERAY_CRDS, "rayservices", "ray.io/v1"),
    "PodMonitor": (OPERATOR_CRDS, "podmonitors", "monitoring.coreos.com/v1"),
    "PrometheusRule": (OPERATOR_CRDS, "prometheusrules", "monitoring.coreos.com/v1"),
    "ScrapeConfig": (OPERATOR_CRDS, "scrapeconfigs", "monitoring.coreos.com/v1alpha1"),
}
"""Where each is defined, by its plural, and its group and version."""
NOT_OURS = re.compile(r".*SDConfigs|oauth2|tlsConfig|partial_response_strategy")
"""Keys of the Prometheus Operator that no file of ours has: a megabyte of clouds, and a pattern that Python refuses."""
KEPT = ("pattern", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "required")
SMALL = 120
"""Characters of JSON; what is shorter is written where it stands."""

Schema = dict[str, Any]


def custom_resource(path: Path, wanted: str) -> Schema:
    """The schema of a custom resource in one version."""
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == wanted]
    schema: Schema = version["schema"]["openAPIV3Schema"]
    return schema


def without(schema: Any, left_out: re.Pattern[str]) -> Any:
    """The same without some properties, however deep."""
    if not isinstance(schema, dict):
        return schema
    parts = {key: without(value, left_out) for key, value in schema.items()}
    if isinstance(properties := schema.get("properties"), dict):
        kept = {name: part for name, part in properties.items() if not left_out.fullmatch(name)}
        parts["properties"] = {name: without(part, left_out) for name, part in kept.items()}
    return parts


def strict(schema: Schema, definitions: Schema, *, top: bool = False) -> Schema:
    """A schema without texts and references, that refuses unknown keys. `status` is the server's to write."""
    if "$ref" in schema:
        return strict(definitions[schema["$ref"].rpartition("/")[2]], definitions, top=top)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **({"pattern": schema["pattern"]} if "pattern" in schema else {})}
    found = {key: schema[key] for key in KEPT if key in schema}
    if "enum" in schema:
        found["enum"] = [value for value in schema["enum"] if value is not None]
    if kinds := schema.get("type"):
        kinds = [kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null"]
        found["type"] = kinds[0] if len(kinds) == 1 else kinds
    if "properties" in schema:
        properties = {name: part for name, part in schema["properties"].items() if not (top and name == "status")}
        found["properties"] = {name: strict(part, definitions) for name, part in properties.items()}
        found["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = strict(schema["additionalProperties"], definitions)
    if "items" in schema:
        found["items"] = strict(schema["items"], definitions)
    for combined in ("anyOf", "oneOf"):
        if combined in schema:
            found[combined] = [strict(part, definitions) for part in schema[combined]]
    return found


def shared(schema: Any, name: str, known: dict[str, str], found: Schema) -> Any:
    """The same with each larger part moved into `found`, once, and referred to."""
    if not isinstance(schema, dict):
        return schema
    parts = {}
    for key, value in schema.items():
        if key == "properties":
            parts[key] = {inner: shared(part, inner, known, found) for inner, part in value.items()}
        elif key in ("items", "additionalProperties"):
            parts[key] = shared(value, name, known, found)
        else:
            parts[key] = value
    text = json.dumps(parts, sort_keys=True)
    if len(text) < SMALL:
        return parts
    if text not in known:
        known[text] = name if name not in found else f"{name}{sum(key.startswith(name) for key in found)}"
        found[known[text]] = parts
    return {"$ref": f"#/$defs/{known[text]}"}


def main(kubernetes: Path, kuberay: Path, operator: Path) -> None:
    folder = kubernetes / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    kinds = {kind: definitions[name] for kind, name in KINDS.items()}
    groups = {kind: _group(schema) for kind, schema in kinds.items()}
    for kind, (place, plural, group) in CUSTOM_RESOURCES.items():
        clone = kuberay if place == KUBERAY_CRDS else operator
        schema = custom_resource(clone / place.format(plural), group.rpartition("/")[2])
        kinds[kind] = schema if place == KUBERAY_CRDS else without(schema, NOT_OURS)
        groups[kind] = group
    known: dict[str, str] = {}
    found: Schema = {kind: {} for kind in kinds}  # their names are taken
    metadata = strict(definitions["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"], definitions)
    for kind, schema in kinds.items():
        whole = strict(schema, definitions, top=True)
        whole["properties"] |= {"apiVersion": {"const": groups[kind]}, "kind": {"const": kind}, "metadata": metadata}
        whole["required"] = ["apiVersion", "kind", "metadata", "spec"]
        whole["properties"] = {name: shared(part, name, known, found) for name, part in whole["properties"].items()}
        found[kind] = whole
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in sorted(found.items())]
    about = (
        f"From the custom resources of KubeRay {KUBERAY} and the Prometheus Operator {OPERATOR}, and the API of "
        f"Kubernetes {KUBERNETES}, by make_schema.py."
    )
    head = ['"$schema": "https://json-schema.org/draft/2020-12/schema"', f'"description": {json.dumps(about)}']
    text = "{" + ",\n".join([*head, '"$defs": {\n' + ",\n".join(lines)]) + "\n}}\n"
    Path(__file__).with_name("kuberay_schema.json").write_text(text)


def _group(schema: Schema) -> str:
    (name,) = schema["x-kubernetes-group-version-kind"]
    return "/".join(part for part in (name["group"], name["version"]) if part)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
