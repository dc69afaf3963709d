"""What Kubernetes' network policies let through: just enough of their rules to try ours on pods and addresses."""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A pod, or with `address` something outside the cluster."""

    labels: dict[str, str] | None = None
    namespace: str = "duet"
    address: str | None = None


def lets_through(
    policies: Sequence[dict[str, Any]], source: Peer, target: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether the target may be reached: the source must be let out and the target must let in.

    Args:
        policies: of the namespace `duet`; pods of other namespaces have none.
    """
    return _allowed(policies, source, target, "Egress", port, protocol) and _allowed(
        policies, target, source, "Ingress", port, protocol
    )


def lets_in(policies: Sequence[dict[str, Any]], source: Peer, target: Peer, port: int) -> bool:
    """Whether the target by itself lets the source in, whatever the source is allowed to reach."""
    return _allowed(policies, target, source, "Ingress", port, "TCP")


def _allowed(
    policies: Sequence[dict[str, Any]], pod: Peer, other: Peer, direction: str, port: int, protocol: str
) -> bool:
    if pod.labels is None or pod.namespace != "duet":
        return True
    specs = [p["spec"] for p in policies if direction in p["spec"]["policyTypes"]]
    selecting = [spec for spec in specs if _selects(spec["podSelector"], pod.labels)]
    if not selecting:
        return True
    rules = [rule for spec in selecting for rule in spec.get(direction.lower()) or []]
    end = {"Egress": "to", "Ingress": "from"}[direction]
    return any(_is_port(rule, port, protocol) and any(_is_peer(p, other) for p in rule[end]) for rule in rules)


def _is_port(rule: dict[str, Any], port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return ports is None or any(p["port"] == port and p["protocol"] == protocol for p in ports)


def _is_peer(peer: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        if other.address is None:
            return False
        address, block = ip_address(other.address), peer["ipBlock"]
        return address in ip_network(block["cidr"]) and not any(address in ip_network(e) for e in block["except"])
    if other.labels is None:
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != "duet":
        return False
    return _selects(peer["podSelector"], other.labels)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", "no other operator is read here"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
