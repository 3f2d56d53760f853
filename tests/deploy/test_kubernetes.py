"""The manifests of deploy/: valid, hardened, of one piece, and every command and probe runs."""

from __future__ import annotations

import json
import re
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from reconciler.cli.worker import worker
from tests.deploy.local import SERVICES, Machine
from tests.deploy.manifests import (
    DEPLOY,
    KUSTOMIZATION,
    WORKLOADS,
    container,
    documents,
    files_of,
    of_kind,
    pod,
    services,
)
from tests.e2e.programs import eventually

# One set of processes for the whole file, whichever worker of xdist runs it.
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("kubernetes")]

OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
WORKER, CHAT = "agent-reconciler-worker", "chat"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machine]:
    """Every container as a process, ready by its own readiness probe."""
    with tempfile.TemporaryDirectory(prefix="ar-k8s-") as name:
        folder = Path(name)
        machine = Machine(folder, services=services(folder))
        try:
            for service in ("redis", "worker-1", "worker-2", "chat"):
                machine.start(service)
            yield machine
        finally:
            machine.stop_all()


class TestManifests:
    @pytest.mark.parametrize("version", [OLDEST, NEWEST])
    def test_valid_by_schema(self, version: str) -> None:
        """Each object passes the strict schema of Kubernetes, of an old release and of the newest."""
        found = list(documents())
        assert len(found) >= 10
        for document in found:
            kubernetes_validate.validate(document, version, strict=True)

    def test_a_typing_error_would_be_found(self) -> None:
        """The check can fail: a misspelt field is an error."""
        document = json.loads(json.dumps(WORKLOADS[WORKER]))
        document["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, NEWEST, strict=True)

    @pytest.mark.parametrize("name", WORKLOADS)
    def test_hardened(self, name: str) -> None:
        """No root, no privileges, nothing to write to but volumes, requests and limits, no API token."""
        spec, one = pod(WORKLOADS[name]), container(WORKLOADS[name])
        assert spec["automountServiceAccountToken"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert set(one["resources"]) == {"requests", "limits"}
        assert re.search(r":\d+\.\d+\.\d+", one["image"])
        assert {"livenessProbe", "readinessProbe", "startupProbe"} <= set(one)

    @pytest.mark.parametrize("name", [WORKER, CHAT])
    def test_probes(self, name: str) -> None:
        """Restarted for /healthz only, which does not ask Redis; traffic goes by /readyz."""
        one = container(WORKLOADS[name])
        paths = {
            probe: one[f"{probe}Probe"]["httpGet"]["path"] for probe in ("liveness", "readiness")
        }
        assert paths == {"liveness": "/healthz", "readiness": "/readyz"}
        listens = one["command"][one["command"].index("--http") + 1]
        (port,) = one["ports"]
        assert listens == f"0.0.0.0:{port['containerPort']}"
        annotations = WORKLOADS[name]["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(port["containerPort"])

    def test_grace_is_longer_than_the_lease(self) -> None:
        """A worker has the time to give its leases back, and at the worst they have lapsed before it
        is killed; never are all workers taken down at once."""
        command = container(WORKLOADS[WORKER])["command"]
        lease = float(command[command.index("--lease") + 1])
        (option,) = [p for p in worker.params if p.name == "lease"]
        assert lease == option.default
        assert pod(WORKLOADS[WORKER])["terminationGracePeriodSeconds"] >= 3 * lease
        assert WORKLOADS[WORKER]["spec"]["replicas"] >= 2
        (budget,) = of_kind("PodDisruptionBudget").values()
        assert budget["spec"]["minAvailable"] >= 1
        assert WORKLOADS[WORKER]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0

    def test_selectors_find_what_they_are_for(self) -> None:
        """Services, budgets, network policies and workloads select pods that there are."""
        labels = [w["spec"]["template"]["metadata"]["labels"] for w in WORKLOADS.values()]
        named = {one["app.kubernetes.io/name"] for one in labels}
        for document in documents():
            spec = document.get("spec", {})
            selector = spec.get("selector", spec.get("podSelector")) or {}
            plain = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
            if plain:
                assert any(plain.items() <= one.items() for one in labels), document["metadata"]
            for expression in selector.get("matchExpressions", ()):
                assert set(expression["values"]) <= named

    def test_services_lead_to_ports(self) -> None:
        """The port that a Service leads to is one that a container names."""
        for name, service in of_kind("Service").items():
            wanted = service["spec"]["selector"]["app.kubernetes.io/name"]
            names = {port["name"] for port in container(WORKLOADS[wanted])["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names, name

    def test_mounts_are_made(self) -> None:
        """What is mounted from ConfigMaps and Secrets is made by the kustomization, of files that are in
        the repository, or that `make secrets` makes; every mounted volume is declared."""
        secrets = {Path(secret["file"]).name for secret in _compose_secrets().values()}
        for name, workload in WORKLOADS.items():
            declared = {volume["name"]: volume for volume in pod(workload)["volumes"]}
            declared |= {
                claim["metadata"]["name"]: {}
                for claim in workload["spec"].get("volumeClaimTemplates", ())
            }
            for mount in container(workload)["volumeMounts"]:
                assert mount["name"] in declared, name
            for volume in declared.values():
                if "configMap" in volume:
                    assert all(file.is_file() for file in files_of(volume).values())
                if "secret" in volume:
                    assert {file.name for file in files_of(volume).values()} <= secrets
        assert (DEPLOY / "policy.toml").is_file()
        tomllib.loads((DEPLOY / "policy.toml").read_text())

    def test_as_in_compose(self) -> None:
        """The commands differ from those of compose.yaml only in where secrets are and what is said
        besides; the images are the same."""
        redis = container(WORKLOADS["redis"])
        assert redis["command"] == [*SERVICES["redis"]["entrypoint"], *SERVICES["redis"]["command"]]
        chat = container(WORKLOADS[CHAT])
        words = [
            word.replace("/run/secrets/agent-reconciler", "/run/secrets")
            for word in chat["command"]
        ]
        assert words == SERVICES["chat"]["command"]
        for name, service in ((WORKER, "worker-1"), (CHAT, "chat"), ("redis", "redis")):
            assert container(WORKLOADS[name])["image"] == SERVICES[service]["image"]
        tags = {f"{one['name']}:{one['newTag']}" for one in KUSTOMIZATION["images"]}
        assert tags == {SERVICES["worker-1"]["image"], SERVICES["chat"]["image"]}


def _compose_secrets() -> Any:
    from tests.deploy.local import COMPOSE

    return COMPOSE["secrets"]


class TestCommands:
    def test_all_become_ready(self, cluster: Machine) -> None:
        """Started by their commands, all are ready by their probes, and alive by theirs."""
        for service in ("redis", "worker-1", "worker-2", "chat"):
            assert cluster.healthy(service).returncode == 0
        for service in ("worker-1", "worker-2", "chat"):
            asked = dict(cluster.services[service]["probe"])
            asked["httpGet"] = {**asked["httpGet"], "path": "/healthz"}
            assert cluster._probe(service, asked).returncode == 0

    def test_one_fleet(self, cluster: Machine) -> None:
        """Two workers share the partitions, and the chat is seen by them."""

        def shared() -> bool:
            status = json.loads(cluster.cli("status", "--json").stdout)
            names = [one["process"].partition("@")[0] for one in status["processes"]]
            holders = set(status["partitions"].values())
            return names == ["leaky-chat"] and len(holders) == 2 and None not in holders

        eventually(shared, "both workers act", 30)

    def test_each_ends_in_its_time(self, cluster: Machine) -> None:
        """SIGTERM ends each with status 0, and the log has the end of the chat."""
        for service in ("chat", "worker-1", "worker-2"):
            assert cluster.stop(service) == 0
        last = json.loads(cluster.cli("log", "--json", "-n", "1").stdout)
        assert (last["type"], last["process"].partition("@")[0]) == (
            "process_stopped",
            "leaky-chat",
        )
