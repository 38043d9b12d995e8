"""The manifests of deployment/: valid for Kubernetes, and saying what the driver does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from space._node.csi_driver import MODES
from space.projections.csi import check
from space.projections.csi.model import DRIVER_NAME, TRANSPORTS

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:kubernetes_validate", "py:google.protobuf")]

DEPLOYMENT: Final = Path(__file__).parents[2] / "deployment"
VERSIONS: Final = ("1.34", "1.37")
"""The first in which every kind here is stable, and the newest there are schemas for."""

CUSTOM: Final = {
    "VolumeSnapshot": ("snapshot.storage.k8s.io/v1", "spec"),
    "VolumeSnapshotClass": ("snapshot.storage.k8s.io/v1", "driver"),
    "VolumeGroupSnapshotClass": ("groupsnapshot.storage.k8s.io/v1", "driver"),
}
"""Kinds of external-snapshotter, for which there is no schema: version, and a field each has."""

PATCHES: Final = [DEPLOYMENT / "groups" / "snapshotter.yaml", DEPLOYMENT / "network" / "store.yaml"]
CLUSTER: Final = DEPLOYMENT / "cluster"
FILES: Final = sorted({*DEPLOYMENT.glob("*/*.yaml")} - {*PATCHES, *CLUSTER.glob("*.yaml")})


def documents(file: Path) -> list[dict[str, Any]]:
    """The documents of a file."""
    return [each for each in yaml.safe_load_all(file.read_text()) if each]


def everything() -> Iterator[dict[str, Any]]:
    """All objects of all manifests."""
    for file in FILES:
        if file.name != "kustomization.yaml":
            yield from documents(file)


def of_kind(kind: str) -> list[dict[str, Any]]:
    """All objects of a kind."""
    return [each for each in everything() if each["kind"] == kind]


def workloads() -> list[dict[str, Any]]:
    """What runs the driver: not the examples, which use it."""
    found = [*of_kind("Deployment"), *of_kind("DaemonSet")]
    return [each for each in found if each["metadata"]["name"].startswith("space-csi-")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_object_has_its_schema(file: Path, version: str) -> None:
    """Each object is valid for its kind, strictly: a field there is not is an error."""
    import kubernetes_validate

    for document in documents(file):
        kind = document["kind"]
        if kind == "Kustomization":
            continue
        if kind in CUSTOM:
            assert document["apiVersion"] == CUSTOM[kind][0]
            assert document[CUSTOM[kind][1]]
            assert set(document) <= {"apiVersion", "kind", "metadata", "spec", "driver", "deletionPolicy"}
            continue
        kubernetes_validate.validate(document, version, strict=True)


def test_a_field_that_is_none_is_found() -> None:
    """The check itself refuses an object with a misspelt field."""
    import kubernetes_validate

    (driver,) = of_kind("CSIDriver")
    driver["spec"]["attachRequierd"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(driver, VERSIONS[-1], strict=True)


def test_everything_in_the_base_is_applied() -> None:
    """Each kustomization lists each file there is beside it, and no other."""
    for folder in ("base", "groups", "network", "cluster"):
        (found,) = documents(DEPLOYMENT / folder / "kustomization.yaml")
        listed = {*found["resources"], *(each["path"] for each in found.get("patches", ()))}
        listed -= {"../base", "../network"}
        there = {file.name for file in (DEPLOYMENT / folder).glob("*.yaml")} - {"kustomization.yaml"}
        assert listed == there


@pytest.mark.parametrize("file", PATCHES, ids=lambda file: file.name)
def test_a_patch_changes_what_is_there(file: Path) -> None:
    """The patch names a workload and a container of the base, and only adds to what that container is told."""
    (patch,) = documents(file)
    (workload,) = [
        each for each in of_kind(patch["kind"]) if each["metadata"]["name"] == patch["metadata"]["name"]
    ]
    (changed,) = patch["spec"]["template"]["spec"]["containers"]
    containers = workload["spec"]["template"]["spec"]["containers"]
    (before,) = [each for each in containers if each["name"] == changed["name"]]
    assert set(before["args"]) < set(changed["args"])
    (base,) = documents(DEPLOYMENT / "base" / "kustomization.yaml")
    assert patch["metadata"]["namespace"] == base["namespace"]


def test_every_name_of_the_driver_is_the_drivers() -> None:
    """Classes, claims, paths of sockets and the CSIDriver object all name the driver as it names itself."""
    names = [each["provisioner"] for each in of_kind("StorageClass")]
    names += [each["driverName"] for each in of_kind("VolumeAttributesClass")]
    names += [
        each["driver"]
        for kind in ("VolumeSnapshotClass", "VolumeGroupSnapshotClass")
        for each in of_kind(kind)
    ]
    names += [each["metadata"]["name"] for each in of_kind("CSIDriver")]
    assert set(names) == {DRIVER_NAME}
    text = (DEPLOYMENT / "base" / "node.yaml").read_text()
    assert set(re.findall(r"/plugins/([^/\n]+)", text)) == {f"{DRIVER_NAME}/csi.sock".split("/")[0]}


def test_parameters_of_classes_are_parameters() -> None:
    """What the classes ask for is what the driver takes, with values a policy has."""
    from space.policy.model import Policy

    for kind, field in (("StorageClass", "parameters"), ("VolumeAttributesClass", "mutable_parameters")):
        for each in of_kind(kind):
            found = check.parameters(each.get("parameters", {}), field=field)
            assert found.get("transport", "nfs") in {each for both in TRANSPORTS.values() for each in both}
            Policy.from_document(check.policy_document(found))


def test_claims_name_classes_that_are_there() -> None:
    """Each storage or snapshot class an example names is one of the base's."""
    there = {each["metadata"]["name"] for each in everything() if each["kind"].endswith("Class")}
    wanted = {each["spec"]["storageClassName"] for each in of_kind("PersistentVolumeClaim")}
    wanted |= {each["spec"]["volumeSnapshotClassName"] for each in of_kind("VolumeSnapshot")}
    assert wanted <= there


def test_containers_run_what_there_is() -> None:
    """The driver's containers name modes there are; all of a pod meet on one socket; mounts reach the host."""
    modes = set()
    for workload in workloads():
        template = workload["spec"]["template"]
        assert template["metadata"]["labels"].items() >= workload["spec"]["selector"]["matchLabels"].items()
        volumes = {each["name"] for each in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            mounted = {each["name"]: each for each in container["volumeMounts"]}
            assert set(mounted) <= volumes
            found = [each.partition("=")[2] for each in container["args"] if each.startswith("--mode=")]
            modes |= set(found)
            if workload["kind"] == "DaemonSet" and found:
                remote = "--remote" in container["args"]
                assert mounted["kubelet" if remote else "data"]["mountPropagation"] == "Bidirectional"
                assert container["securityContext"]["privileged"]
            if not found:
                assert "--csi-address=/csi/csi.sock" in container["args"]
                assert mounted["socket"]["mountPath"] == "/csi"
    assert modes == {"controller", "node", "store"} < set(MODES)


def test_nodes_reach_what_the_owner_serves() -> None:
    """Owner and Service have the same ports under the advertised name; no machine runs both node workloads."""
    (patch,) = documents(PATCHES[1])
    spec = patch["spec"]["template"]["spec"]
    (store,) = spec["containers"]
    (service,) = of_kind("Service")
    (base,) = documents(DEPLOYMENT / "base" / "kustomization.yaml")
    ports = {each["name"]: each["containerPort"] for each in store["ports"]}
    assert {each["targetPort"]: each["port"] for each in service["spec"]["ports"]} == ports
    options = dict(each.removeprefix("--").split("=") for each in store["args"] if "=" in each)
    assert {name: f"0.0.0.0:{port}" for name, port in ports.items()}.items() <= options.items()
    assert options["advertise"] == f"{service['metadata']['name']}.{base['namespace']}.svc"
    owner, remote = of_kind("DaemonSet")
    labels = owner["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    remote_spec = remote["spec"]["template"]["spec"]
    assert spec["hostNetwork"]
    assert remote_spec["hostNetwork"]
    required = remote_spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    selector = owner["spec"]["template"]["spec"]["nodeSelector"]
    assert [(each["key"], each["operator"]) for each in term["matchExpressions"]] == [
        (key, "DoesNotExist") for key in selector
    ]


def merged(base: Any, patch: Any, keys: tuple[str, ...] = ("name",)) -> Any:
    """A strategic merge, as far as these patches need one: maps by key, lists of maps by what names their items."""
    if isinstance(base, dict) and isinstance(patch, dict):
        found = {**base, **{key: merged(base.get(key), each, _keys(key)) for key, each in patch.items()}}
        return {key: each for key, each in found.items() if each is not None}
    if isinstance(base, list) and patch and isinstance(patch[0], dict):
        (key,) = keys
        changes = {each[key]: each for each in patch}
        kept = [merged(each, changes.pop(each[key], {})) for each in base]
        return [each for each in [*kept, *changes.values()] if each.get("$patch") != "delete"]
    return patch


def _keys(field: str) -> tuple[str, ...]:
    return ("mountPath",) if field == "volumeMounts" else ("name",)


def test_the_controller_of_a_cluster_has_no_store() -> None:
    """Patched, the controller is valid, runs anywhere, and has the cluster's addresses and a certificate, no data."""
    import kubernetes_validate

    (patch,) = documents(CLUSTER / "controller.yaml")
    (base,) = [each for each in of_kind("Deployment") if each["metadata"]["name"] == "space-csi-controller"]
    found = merged(base, patch)
    for version in VERSIONS:
        kubernetes_validate.validate(found, version, strict=True)
    spec = found["spec"]["template"]["spec"]
    assert (spec["nodeSelector"], found["spec"]["replicas"]) == ({}, 2)
    assert {each["name"] for each in spec["volumes"]} == {"socket", "client"}
    (driver,) = [each for each in spec["containers"] if each["name"] == "driver"]
    mounts = {each["name"]: each["mountPath"] for each in driver["volumeMounts"]}
    assert mounts == {"socket": "/csi", "client": "/etc/space/client"}
    assert driver["args"][:3] == [f"--certificate={mounts['client']}", "csi", "--mode=controller"]
    assert {"SPACE_NODE", "CSI_ENDPOINT"} <= {each["name"] for each in driver["env"]}
    assert {each["name"] for each in spec["containers"]} == {
        each["name"] for each in base["spec"]["template"]["spec"]["containers"]
    }


def test_with_a_cluster_nothing_needs_a_store() -> None:
    """What is taken away is there, and is all that runs on, leads to, or makes volumes of, the node with the store."""
    gone = {(each["kind"], each["metadata"]["name"]) for each in documents(CLUSTER / "without-store.yaml")}
    assert gone <= {(each["kind"], each["metadata"]["name"]) for each in everything()}
    left = [each for each in everything() if (each["kind"], each["metadata"]["name"]) not in gone]
    examples = {
        each["metadata"]["name"]
        for file in (DEPLOYMENT / "examples").glob("*.yaml")
        for each in documents(file)
    }
    left = [each for each in left if each["metadata"]["name"] not in examples]
    classes = [each["parameters"] for each in left if each["kind"] == "StorageClass"]
    assert all(each["transport"] in {"nfs", "nvme"} for each in classes)
    assert len(classes) == 2
    (node,) = [each for each in left if each["kind"] == "DaemonSet"]
    assert "--remote" in node["spec"]["template"]["spec"]["containers"][0]["args"]


def test_accounts_and_roles_are_bound() -> None:
    """Each workload's account is made, and each binding names a role and an account there are."""
    accounts = {each["metadata"]["name"] for each in of_kind("ServiceAccount")}
    used = {each["spec"]["template"]["spec"]["serviceAccountName"] for each in workloads()}
    assert used <= accounts
    for binding in [*of_kind("RoleBinding"), *of_kind("ClusterRoleBinding")]:
        role = binding["roleRef"]
        assert role["name"] in {each["metadata"]["name"] for each in of_kind(role["kind"])}
        assert {each["name"] for each in binding["subjects"]} <= accounts


def test_kind_has_a_node_with_the_store() -> None:
    """The kind cluster labels a node as the workloads' selectors ask for, and gives it the machine's devices."""
    (config,) = documents(DEPLOYMENT / "kind-config.yaml")
    wanted = of_kind("DaemonSet")[0]["spec"]["template"]["spec"]["nodeSelector"]
    nodes = [each for each in config["nodes"] if wanted.items() <= each.get("labels", {}).items()]
    assert len(nodes) == 1
    assert {"hostPath": "/dev", "containerPath": "/dev"} in nodes[0]["extraMounts"]
