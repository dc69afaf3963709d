"""What is in `cluster/`, as data: the Kubernetes objects and the pods that come of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, as Kubernetes does."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise yaml.constructor.ConstructorError(None, None, f"twice: {twice}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(text: str) -> list[Any]:
    """The documents of a YAML file."""
    return list(yaml.load_all(text, _StrictLoader))


OBJECTS: dict[str, dict[str, Any]] = {
    f"{path.stem}:{document['kind']}/{document['metadata']['name']}": document
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml"))
    for document in read_yaml(path.read_text(encoding="utf-8"))
}
"""`file:Kind/name` → object."""


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in OBJECTS.values() if document["kind"] == kind]


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod as some object describes it."""

    where: str
    labels: dict[str, str]
    spec: dict[str, Any]


def _templates(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything in an object that is a pod or a template of one: what has containers in its `spec`."""
    if isinstance(value, dict):
        if isinstance(value.get("spec"), dict) and "containers" in value["spec"]:
            yield where, value
            return
        for key, inner in value.items():
            yield from _templates(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _templates(inner, f"{where}[{index}]")


TEMPLATES: dict[str, dict[str, Any]] = {
    where: template for name, document in OBJECTS.items() for where, template in _templates(document, name)
}
PODS = [
    Pod(where=where, labels=template["metadata"]["labels"], spec=template["spec"])
    for where, template in TEMPLATES.items()
]
RAY_PODS = [pod for pod in PODS if pod.labels["part"] in ("head", "worker")]
