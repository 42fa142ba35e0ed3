"""deploy/kubernetes against Kubernetes' own schemas, and what has to fit together in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kasa_runtime.cli import cli

kubernetes_validate = pytest.importorskip("kubernetes_validate")

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSIONS = ("1.28", kubernetes_validate.latest_version())
# CRDs and kustomize's own files: only their YAML is checked, here and by yamllint.
NO_SCHEMA = {"ServiceMonitor", "Kustomization"}
OUTSIDE_OF_FLAGS = {"KASA_HOME", "KASA_INSECURE"}


def documents(folder: Path) -> list[dict[str, Any]]:
    return [
        document
        for path in sorted(folder.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


ALL = documents(FOLDER)
[DEPLOYMENT] = [d for d in ALL if d["kind"] == "Deployment"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
LABELS = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
ENVIRONMENT = {item["name"]: item.get("value") for item in CONTAINER["env"]}


def seconds_until(probe: str) -> int:
    """How long `probe` has to fail before Kubernetes acts."""
    return CONTAINER[probe]["periodSeconds"] * CONTAINER[probe]["failureThreshold"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", ALL, ids=lambda d: f"{d['kind']}")
def test_manifests_follow_the_schema(document: dict[str, Any], version: str) -> None:
    if document["kind"] in NO_SCHEMA:
        assert document["apiVersion"].split("/")[0] in (
            "monitoring.coreos.com",
            "kustomize.config.k8s.io",
        )
    else:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_finds_wrong_keys_and_values() -> None:
    for key, value in (("replicas", "two"), ("replica", 2)):
        wrong = copy.deepcopy(DEPLOYMENT)
        wrong["spec"][key] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_every_file_is_applied() -> None:
    [kustomization] = [d for d in ALL if d["kind"] == "Kustomization"]
    others = {path.name for path in FOLDER.glob("*.yaml")}
    assert others - set(kustomization["resources"]) == {"kustomization.yaml", "servicemonitor.yaml"}


def test_a_drain_is_not_cut_short() -> None:
    pre_stop_s = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    grace_s = POD["terminationGracePeriodSeconds"]
    assert pre_stop_s + float(ENVIRONMENT["KASA_DRAIN_S"]) + 10 <= grace_s
    assert seconds_until("livenessProbe") > grace_s


def test_a_pod_leaves_the_endpoints_before_its_drain_ends() -> None:
    assert seconds_until("readinessProbe") < float(ENVIRONMENT["KASA_DRAIN_S"])


def test_probes_ask_the_port_of_grpc() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"grpc": 50051, "http": 8080}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["grpc"]["port"] == ports["grpc"]


def test_selectors_find_the_pods() -> None:
    found = [DEPLOYMENT["spec"]["selector"]["matchLabels"]]
    for document in ALL:
        match document["kind"]:
            case "Service":
                found.append(document["spec"]["selector"])
            case "PodDisruptionBudget":
                found.append(document["spec"]["selector"]["matchLabels"])
            case "NetworkPolicy":
                found.append(document["spec"]["podSelector"]["matchLabels"])
    assert len(found) == 5
    assert all(selector.items() <= LABELS.items() for selector in found)


def test_the_monitor_scrapes_one_service_at_a_port_that_it_has() -> None:
    [monitor] = [d for d in ALL if d["kind"] == "ServiceMonitor"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    services = [d for d in ALL if d["kind"] == "Service"]
    [service] = [s for s in services if wanted <= s["metadata"].get("labels", {}).items()]
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_volumes_exist_and_are_mounted() -> None:
    claims = {d["metadata"]["name"] for d in ALL if d["kind"] == "PersistentVolumeClaim"}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in POD["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == claims
    mounted = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["volumes"]}


def test_the_budget_lets_a_node_be_drained() -> None:
    [budget] = [d for d in ALL if d["kind"] == "PodDisruptionBudget"]
    assert budget["spec"]["minAvailable"] < DEPLOYMENT["spec"]["replicas"]


def test_variables_are_settings() -> None:
    text = CliRunner().invoke(cli, ["serve", "--help"]).output
    for name in ENVIRONMENT.keys() - OUTSIDE_OF_FLAGS:
        flag = "--" + name.removeprefix("KASA_").lower().replace("_", "-")
        assert f"  {flag} " in text, name


def test_the_gpu_overlay_patches_the_deployment() -> None:
    kustomization, patch = sorted(documents(FOLDER / "gpu"), key=lambda d: d["kind"], reverse=True)
    assert kustomization["patches"] == [{"path": "deployment.yaml"}]
    assert patch["metadata"]["name"] == DEPLOYMENT["metadata"]["name"]
    [container] = patch["spec"]["template"]["spec"]["containers"]
    assert container["name"] == CONTAINER["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    [image] = kustomization["images"]
    assert CONTAINER["image"] == f"{image['name']}:cpu"
