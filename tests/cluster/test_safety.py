"""Nobody gets into a cluster that was started from these files, and no secret stands in them."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.commands import blocks
from tests.cluster.manifests import CLUSTER, FILES, OBJECTS, PODS, RAY_PODS, TEMPLATES, Pod, of_kind, read_yaml
from tests.cluster.network import Peer, lets_in, lets_through

LAUNCHER: dict[str, Any] = read_yaml((CLUSTER / "ray-up/aws.yaml").read_text(encoding="utf-8"))[0]
SLURM = (CLUSTER / "slurm/duet.sbatch").read_text(encoding="utf-8")
LOCAL = "Several nodes on one machine"
POLICIES = of_kind("NetworkPolicy")
HEAD, WORKER, SUBMITTER, POSTGRES = (
    Peer(labels=next(pod.labels for pod in PODS if pod.labels["part"] == part))
    for part in ("head", "worker", "submitter", "postgres")
)
NEIGHBOUR = Peer(labels={"app": "something-else"})
STRANGER = Peer(labels={"app": "duet", "part": "worker"}, namespace="elsewhere")
OPERATOR = Peer(labels={"app.kubernetes.io/name": "kuberay-operator"}, namespace="kuberay")
DNS = Peer(labels={"k8s-app": "kube-dns"}, namespace="kube-system")
HUB, METADATA, KUBERNETES = Peer(address="3.160.5.76"), Peer(address="169.254.169.254"), Peer(address="10.96.0.1")


def name(path: Path) -> str:
    return str(path.relative_to(CLUSTER))


# Secrets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_secret_stands_in_a_file(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    shapes = (
        r"\bhf_[A-Za-z0-9]{8,}",  # the hub's tokens
        r"\bAKIA[A-Z0-9]{8,}",  # AWS
        r"\b[0-9a-f]{32,}\b",  # a token as `secrets.token_hex` makes it
        r"-----BEGIN ",
        r"://[^\s/:@]+:[^\s/@]+@",  # a password in a URL
        r"(?i)(?:password|passwd|_token|secret_key)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{8,}",
    )
    for shape in shapes:
        found = re.search(shape, text)
        assert found is None, found


def test_secrets_come_by_reference_and_to_whom_needs_them() -> None:
    assert not of_kind("Secret")
    for pod in PODS:
        for container in pod.spec["containers"]:
            values = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
            for variable, value in values.items():
                assert value is None or not re.search("TOKEN|PASSWORD|SECRET|KEY", variable), variable
            assert ("PGPASSWORD" in values) == (pod.labels["part"] == "head")
    for config in of_kind("ConfigMap"):
        assert not [key for key in config["data"] if re.search("TOKEN$|PASSWORD|SECRET|KEY", key)]


def test_no_secret_goes_through_a_runtime_environment() -> None:
    assert "runtimeEnvYAML" not in of_kind("RayJob")[0]["spec"]
    for block in blocks():
        assert "--runtime-env" not in block.text


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_path_belongs_to_one_machine(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w$}~-])/(?:work|root|Users|opt|scratch|data)/", text)
    assert not re.search(r"/home/(?!ray/)", text)  # the home folder inside Ray's image


# Tokens and ports ---------------------------------------------------------------------------------------------------


def test_every_ray_pod_is_of_a_cluster_with_a_token() -> None:
    specs = [d["spec"] for d in of_kind("RayCluster")] + [d["spec"]["rayClusterSpec"] for d in of_kind("RayJob")]
    assert [spec["authOptions"] for spec in specs] == [{"mode": "token"}] * 2
    assert len(RAY_PODS) == 4, "a pod of Ray's stands in a RayCluster or a RayJob and nowhere else"
    for pod in PODS:  # Nothing takes it back.
        for container in pod.spec["containers"]:
            assert not [v for v in container.get("env", []) if v["name"].startswith("RAY_AUTH")]


def test_the_launchers_containers_have_a_token_from_a_file() -> None:
    options = LAUNCHER["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    (path,) = (o.removeprefix("--env=RAY_AUTH_TOKEN_PATH=") for o in options if "RAY_AUTH_TOKEN_PATH" in o)
    assert path in LAUNCHER["file_mounts"]
    assert not [o for o in options if re.search(r"(?i)password|token=(?!token)|HF_TOKEN", o)]


@pytest.mark.parametrize(
    "text", [SLURM, "\n".join(block.text for block in blocks(LOCAL))], ids=["slurm", "one machine"]
)
def test_a_token_is_made_for_its_owner_alone(text: str) -> None:
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_AUTH_TOKEN_PATH=" in text
    assert re.search(r"\(umask 077[;& ].*?token_hex\(32\).*?\)", text, re.DOTALL)
    assert "RAY_AUTH_TOKEN=" not in text, "in the environment of a command anybody on the machine can read it"


@pytest.mark.parametrize("where", TEMPLATES)
def test_no_pod_opens_a_port_of_its_node(where: str) -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*(keys(inner) for inner in value.values()))
        return set().union(*(keys(inner) for inner in value)) if isinstance(value, list) else set()

    assert not keys(TEMPLATES[where]["spec"]) & {
        "hostPort",
        "hostNetwork",
        "hostPID",
        "hostIPC",
        "hostPath",
        "privileged",
    }


def test_no_service_is_reached_from_outside() -> None:
    for service in of_kind("Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert not service["spec"].get("externalIPs")
    assert {document["kind"] for document in OBJECTS.values()}.isdisjoint({"Ingress", "Gateway", "HTTPRoute"})
    for spec in [d["spec"] for d in of_kind("RayCluster")] + [d["spec"]["rayClusterSpec"] for d in of_kind("RayJob")]:
        head = spec["headGroupSpec"]
        assert head.get("serviceType", "ClusterIP") == "ClusterIP"
        assert not head.get("enableIngress")
        assert "headService" not in head


def test_the_dashboard_listens_on_loopback_or_behind_a_policy() -> None:
    heads = re.findall(r"ray start(?:\\\n|[^\n])*?--head(?:\\\n|[^\n])*", "\n".join(block.text for block in blocks()))
    heads += [command for command in LAUNCHER["head_start_ray_commands"] if "--head" in command]
    heads += re.findall(r"on_node \"\$head\"(?:\\\n|[^\n])*", SLURM)
    assert len(heads) == 3
    for command in heads:
        assert re.search(r"--dashboard-host[= ]127\.0\.0\.1", command), command
    # KubeRay and the submitter come to the pod's own address, which the policies below guard.
    for text in ("\n".join(block.text for block in blocks()), SLURM, str(LAUNCHER)):
        assert "0.0.0.0" not in text


# The network of the pods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "port", "is_let_through"),
    [
        (WORKER, HEAD, 6379, True),
        (HEAD, WORKER, 33333, True),
        (WORKER, WORKER, 29500, True),
        (SUBMITTER, HEAD, 8265, True),
        (OPERATOR, HEAD, 8265, True),
        (OPERATOR, HEAD, 6379, False),
        (OPERATOR, POSTGRES, 5432, False),
        *[
            (other, target, port, False)
            for other in (NEIGHBOUR, STRANGER)
            for target in (HEAD, WORKER)
            for port in (6379, 8265)
        ],
        (HEAD, POSTGRES, 5432, True),
        *[(other, POSTGRES, 5432, False) for other in (WORKER, SUBMITTER, NEIGHBOUR, STRANGER)],
        (HEAD, POSTGRES, 22, False),
        *[(pod, HUB, 443, True) for pod in (HEAD, WORKER)],
        *[(pod, HUB, 80, False) for pod in (HEAD, WORKER)],
        *[(pod, inside, 443, False) for pod in (HEAD, WORKER) for inside in (METADATA, KUBERNETES)],
        (WORKER, DNS, 53, True),
        (WORKER, DNS, 443, False),
        (POSTGRES, HUB, 443, False),
    ],
)
def test_who_reaches_whom(source: Peer, target: Peer, port: int, is_let_through: bool) -> None:
    assert lets_through(POLICIES, source, target, port) == is_let_through


@pytest.mark.parametrize(
    ("source", "is_let_in"), [(HEAD, True), (WORKER, False), (SUBMITTER, False), (OPERATOR, False)]
)
def test_the_store_lets_in_the_driver_alone(source: Peer, is_let_in: bool) -> None:
    assert lets_in(POLICIES, source, POSTGRES, 5432) == is_let_in


def test_names_are_looked_up_by_datagrams_too() -> None:
    assert lets_through(POLICIES, WORKER, DNS, 53, "UDP")


def test_every_pod_is_under_a_policy_in_both_directions() -> None:
    for pod in PODS:
        inside = Peer(labels=pod.labels)
        assert not lets_through(POLICIES, NEIGHBOUR, inside, 1234), pod.where
        assert not lets_through(POLICIES, inside, NEIGHBOUR, 1234), pod.where


# Rights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.where)
def test_a_pod_has_no_more_rights_than_it_needs(pod: Pod) -> None:
    """As the namespace demands (`pod-security.kubernetes.io/enforce: restricted`)."""
    assert of_kind("Namespace")[0]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    context = pod.spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.spec["automountServiceAccountToken"] is False
    allowed = {"persistentVolumeClaim", "emptyDir"}
    assert all(set(volume) - {"name"} <= allowed for volume in pod.spec.get("volumes", []))
    for container in pod.spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.where)
def test_a_pod_says_what_it_takes(pod: Pod) -> None:
    for container in pod.spec["containers"]:
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]


def test_the_image_ends_as_a_user_who_is_not_root() -> None:
    users = re.findall(r"^USER (\S+)$", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert users[-1] not in ("0", "root")
