"""The manifests of deploy/: what is in them, and their containers in the words of compose.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.local import SERVICES
from tests.e2e.programs import ROOT

DEPLOY = ROOT / "deploy"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())


def documents() -> Iterator[dict[str, Any]]:
    """Every object of every resource of the kustomization."""
    for name in KUSTOMIZATION["resources"]:
        yield from yaml.safe_load_all((DEPLOY / name).read_text())


def of_kind(*kinds: str) -> dict[str, dict[str, Any]]:
    """Objects by name."""
    return {d["metadata"]["name"]: d for d in documents() if d["kind"] in kinds}


WORKLOADS = of_kind("Deployment", "StatefulSet")


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (one,) = pod(workload)["containers"]
    found: dict[str, Any] = one
    return found


def files_of(volume: dict[str, Any]) -> dict[str, Path]:
    """File name in a mounted ConfigMap or Secret -> the file that the kustomization makes it of."""
    if "configMap" in volume:
        (made,) = [
            one
            for one in KUSTOMIZATION["configMapGenerator"]
            if one["name"] == volume["configMap"]["name"]
        ]
        return {Path(file).name: DEPLOY / file for file in made["files"]}
    (made,) = [
        one
        for one in KUSTOMIZATION["secretGenerator"]
        if one["name"] == volume["secret"]["secretName"]
    ]
    keys = {Path(file).name: DEPLOY / file for file in made["files"]}
    return {item["path"]: keys[item["key"]] for item in volume["secret"]["items"]}


def services(folder: Path) -> dict[str, Any]:
    """Containers as services that `Machine` can start: two workers, the chat, and Redis.

    Args:
        folder: where volumes are, and in it the secrets.
    """
    made = {name: _service(workload, folder) for name, workload in WORKLOADS.items()}
    worker = made.pop("agent-reconciler-worker")
    return {**made, "worker-1": worker, "worker-2": dict(worker), "cli": SERVICES["cli"]}


def _service(workload: dict[str, Any], folder: Path) -> dict[str, Any]:
    one = container(workload)
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    probe = dict(one["readinessProbe"])
    if "httpGet" in probe:
        probe["httpGet"] = {**probe["httpGet"], "port": ports[probe["httpGet"]["port"]]}
    return {
        "command": one["command"],
        "environment": {entry["name"]: entry["value"] for entry in one.get("env", ())},
        "places": dict(_places(workload, folder)),
        "probe": probe,
    }


def _places(workload: dict[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    volumes = {volume["name"]: volume for volume in pod(workload).get("volumes", ())}
    for mount in container(workload)["volumeMounts"]:
        volume = volumes.get(mount["name"], {})
        if "secret" in volume:
            yield mount["mountPath"], folder / "secrets"
        elif "configMap" in volume:
            for name, file in files_of(volume).items():
                yield f"{mount['mountPath']}/{name}", file
        else:
            place = folder / workload["metadata"]["name"] / mount["name"]
            place.mkdir(parents=True, exist_ok=True)
            yield mount["mountPath"], place
