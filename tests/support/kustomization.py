"""Renders our kustomizations: resources, components, strategic-merge patches and image tags.

It stands in for `kubectl kustomize` where there is none and knows only what ours use; anything
else in a kustomization is an error, so that nothing is passed over in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

Resource = dict[str, Any]

_KNOWN_FIELDS: Final = {"apiVersion", "kind", "resources", "components", "patches", "images"}
_MERGE_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}


def render(folder: Path) -> list[Resource]:
    """Every resource of an overlay as it would be applied."""
    kustomization = _load(folder / "kustomization.yaml")[0]
    unknown = kustomization.keys() - _KNOWN_FIELDS
    if unknown:
        raise ValueError(f"{folder}: this renderer does not know {sorted(unknown)}")
    resources: list[Resource] = []
    for name in (*kustomization.get("resources", ()), *kustomization.get("components", ())):
        path = (folder / name).resolve()
        resources += render(path) if path.is_dir() else _load(path)
    for entry in kustomization.get("patches", ()):
        for patch in _load(folder / entry["path"]):
            targets = [resource for resource in resources if identity(resource) == identity(patch)]
            if len(targets) != 1:
                raise ValueError(f"{entry['path']} patches {len(targets)} resources")
            resources[resources.index(targets[0])] = merge(targets[0], patch)
    for image in kustomization.get("images", ()):
        changed = 0
        for container in (each for resource in resources for each in containers(resource)):
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
                changed += 1
        if not changed:
            raise ValueError(f"{folder}: no container runs the image {image['name']}")
    names = [identity(resource) for resource in resources]
    if len(names) != len(set(names)):
        raise ValueError(f"{folder}: a resource is there twice: {names}")
    return resources


def identity(resource: Resource) -> tuple[str, str, str]:
    """What tells resources apart."""
    return resource["apiVersion"], resource["kind"], resource["metadata"]["name"]


def pod_spec(resource: Resource) -> dict[str, Any] | None:
    """The pod a workload runs; None for anything else."""
    spec = resource.get("spec", {}).get("template", {}).get("spec")
    return spec if resource["kind"] in ("StatefulSet", "Job", "Deployment") else None


def containers(resource: Resource) -> list[dict[str, Any]]:
    """Every container of a workload, sidecars included."""
    pod = pod_spec(resource)
    return [] if pod is None else [*pod.get("initContainers", ()), *pod["containers"]]


def merge(target: Any, patch: Any, field: str = "") -> Any:
    """The target with a strategic-merge patch applied."""
    if isinstance(target, dict) and isinstance(patch, dict):
        merged = dict(target)
        for name, value in patch.items():
            merged[name] = merge(target[name], value, name) if name in target else value
        return merged
    key = _MERGE_KEYS.get(field)
    if isinstance(target, list) and isinstance(patch, list) and key:
        patches = {item[key]: item for item in patch}
        known = [merge(item, patches.pop(item[key], {})) for item in target]
        return [*patches.values(), *known]
    return patch


def _load(path: Path) -> list[Resource]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]
