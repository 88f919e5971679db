"""The Kubernetes manifests: valid by the API's schemas, hardened, in step with the settings."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from support.exported_metrics import exported, unknown_references
from support.kustomization import Resource, containers, identity, pod_spec, render

from tamiyo_svc.service.settings import VARIABLES

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
CUSTOM: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "custom_resources.json").read_text()
)
OVERLAYS = ("standalone", "sidecar", "gpu")
CASES = [
    pytest.param(overlay, resource, id=f"{overlay}-{resource['kind']}")
    for overlay in OVERLAYS
    for resource in render(FOLDER / "overlays" / overlay)
]


def validate(resource: Resource) -> None:
    """Check a resource against the API's own schema, or ours for custom resources.

    Raises:
        ValidationError: it would be refused.
    """
    custom = CUSTOM.get(f"{resource['apiVersion']} {resource['kind']}")
    if custom is not None:
        jsonschema.validate(resource, custom)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        kubernetes_validate.validate(resource, "1.37", strict=True)


def by_kind(overlay: str, kind: str) -> Resource:
    (found,) = [each for each in render(FOLDER / "overlays" / overlay) if each["kind"] == kind]
    return found


def workload(overlay: str) -> Resource:
    return by_kind(overlay, "Job" if overlay == "sidecar" else "StatefulSet")


def service(overlay: str) -> dict[str, Any]:
    """The container that runs the service."""
    found: dict[str, Any]
    (found,) = [each for each in containers(workload(overlay)) if each["name"] == "tamiyo"]
    return found


def settings() -> dict[str, str]:
    data: dict[str, str] = by_kind("standalone", "ConfigMap")["data"]
    return data


@pytest.mark.parametrize(("overlay", "resource"), CASES)
def test_every_resource_is_valid(overlay: str, resource: Resource) -> None:
    validate(resource)


def test_a_misspelt_field_is_noticed() -> None:
    wrong = copy.deepcopy(workload("standalone"))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(wrong)
    scaled = copy.deepcopy(by_kind("standalone", "ScaledObject"))
    scaled["spec"]["minReplicas"] = 1
    with pytest.raises(jsonschema.ValidationError):
        validate(scaled)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_what_they_are_for(overlay: str) -> None:
    container = service(overlay)
    paths = {
        probe: container[f"{probe}Probe"]["httpGet"]["path"]
        for probe in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {container[f"{name}Probe"]["httpGet"]["port"] for name in paths} <= ports.keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_stop_leaves_more_time_than_the_drain_takes(overlay: str) -> None:
    pod = pod_spec(workload(overlay))
    assert pod is not None
    drain_s = float(settings()["TAMIYO_DRAIN_TIMEOUT_S"])
    assert pod["terminationGracePeriodSeconds"] >= drain_s + 5


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_runs_with_nothing_it_does_not_need(overlay: str) -> None:
    pod = pod_spec(workload(overlay))
    assert pod is not None
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    container = service(overlay)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    assert "cpu" not in container["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_files_and_never_part_of_a_manifest(overlay: str) -> None:
    resources = render(FOLDER / "overlays" / overlay)
    assert not [each for each in resources if each["kind"] == "Secret"]
    for container in (each for resource in resources for each in containers(resource)):
        for variable in container.get("env", ()):
            assert variable["name"] != "ESPER_LEYLINE_SECRET"
            if variable["name"] == "REDIS_URL":
                assert "secretKeyRef" in variable["valueFrom"]
    file = Path(settings()["ESPER_LEYLINE_SECRET_FILE"])
    mounts = {mount["mountPath"] for mount in service(overlay)["volumeMounts"]}
    assert str(file.parent) in mounts


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_is_a_setting_or_one_that_libraries_know(overlay: str) -> None:
    known = {variable.name for variable in VARIABLES}
    libraries = {"HOME", "TORCHINDUCTOR_CACHE_DIR", "OMP_NUM_THREADS"}
    used = {variable["name"] for variable in service(overlay)["env"]}
    assert used <= known
    assert settings().keys() <= known | libraries


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_mounted_exists_and_what_is_written_to_is_a_volume(overlay: str) -> None:
    resource = workload(overlay)
    pod = pod_spec(resource)
    assert pod is not None
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {
        claim["metadata"]["name"] for claim in resource["spec"].get("volumeClaimTemplates", ())
    }
    for container in containers(resource):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    mounts = {mount["mountPath"] for mount in service(overlay)["volumeMounts"]}
    assert {settings()["TAMIYO_STATE_DIR"], "/tmp"} <= mounts


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_the_pods(overlay: str) -> None:
    resources = render(FOLDER / "overlays" / overlay)
    labels = workload(overlay)["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        each["spec"]["podSelector" if each["kind"] == "NetworkPolicy" else "selector"]
        for each in resources
        if each["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "StatefulSet")
    ]
    assert selectors
    for selector in selectors:
        assert selector["matchLabels"].items() <= labels


def test_what_selects_replicas_selects_no_training_job() -> None:
    job = workload("sidecar")["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        by_kind("standalone", kind)["spec"][
            "podSelector" if kind == "NetworkPolicy" else "selector"
        ]
        for kind in ("NetworkPolicy", "PodDisruptionBudget", "StatefulSet")
    ]
    for labels in (
        by_kind("standalone", "Service")["spec"]["selector"],
        *(selector["matchLabels"] for selector in selectors),
    ):
        assert (
            labels.items()
            <= workload("standalone")["spec"]["template"]["metadata"]["labels"].items()
        )
        assert not labels.items() <= job


def test_scaling_follows_a_metric_that_exists_on_the_workload_that_exists() -> None:
    scaled = by_kind("standalone", "ScaledObject")["spec"]
    target = workload("standalone")
    assert scaled["scaleTargetRef"]["name"] == target["metadata"]["name"]
    assert scaled["scaleTargetRef"]["kind"] == target["kind"]
    (trigger,) = scaled["triggers"]
    assert list(unknown_references(trigger["metadata"]["query"], exported())) == []


def test_the_gpu_overlay_asks_for_a_gpu_and_keeps_the_rest() -> None:
    plain, gpu = service("standalone"), service("gpu")
    assert gpu["image"] == "tamiyo:latest-cuda"
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "TAMIYO_DEVICE", "value": "cuda"} in gpu["env"]
    assert all(variable in gpu["env"] for variable in plain["env"])
    assert gpu["livenessProbe"] == plain["livenessProbe"]
    assert {identity(each) for each in render(FOLDER / "overlays" / "gpu")} == {
        identity(each) for each in render(FOLDER / "overlays" / "standalone")
    }


def test_trainer_and_sidecar_speak_on_the_same_stream() -> None:
    streams = {
        container["name"]: next(
            variable["value"]
            for variable in container["env"]
            if variable["name"] == "OONA_NORMAL_STREAM"
        ).partition("$(")[0]
        for container in containers(workload("sidecar"))
    }
    assert streams == {"tamiyo": "oona.normal.", "trainer": "oona.normal."}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_the_same(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(FOLDER / "overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rendered = {identity(each): each for each in yaml.safe_load_all(done.stdout)}
    assert rendered == {identity(each): each for each in render(FOLDER / "overlays" / overlay)}


def test_a_patch_without_a_target_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("patches: [{path: patch.yaml}]\n")
    (tmp_path / "patch.yaml").write_text(
        "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: other}\n"
    )
    with pytest.raises(ValueError, match="patches 0 resources"):
        render(tmp_path)
