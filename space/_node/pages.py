"""What a node tells a monitoring system and a person: text made of plain documents."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from typing import Any, Final

from space._node.caller import Document

_HELP: Final = {
    "space_position": "Last position applied to the state.",
    "space_commit": "Last position committed on a quorum.",
    "space_term": "Term of consensus.",
    "space_leader": "1 where this node leads the shard.",
    "space_up": "1 unless the shard has stopped on this node.",
    "space_log_bytes": "Bytes of the log on disk.",
    "space_peer_connected": "1 while every connection to the peer is open.",
    "space_peer_rtt_seconds": "Round trip to the peer.",
    "space_peer_queued_bytes": "Bytes that wait to be sent to the peer.",
    "space_peer_certificate_days": "Days until the certificate of the peer ends.",
    "space_federation_sender": "1 on the node of the cluster that ships.",
    "space_federation_connected": "1 while shipments are taken by the zone.",
    "space_federation_lag_events": "Events of the log that the zone does not have.",
    "space_federation_lag_bytes": "Bytes of the log that the zone does not have.",
    "space_federation_lag_seconds": "Age of the oldest batch that is for the zone and not there.",
    "space_federation_rpo_ok": "1 while every rpo promised for the zone is kept.",
    "space_federation_position": "Position up to which the zone has all that is for it.",
    "space_federation_received_position": "Position of the zone's log up to which it was shipped here.",
    "space_federation_sent_bytes_total": "Bytes of shipments the zone has taken.",
    "space_federation_shipments_total": "Shipments the zone has taken.",
    "space_federation_rtt_seconds": "Round trip to the zone.",
    "space_calls_total": "Calls answered.",
    "process_resident_memory_bytes": "Resident memory.",
    "process_cpu_seconds_total": "Processor time used.",
    "process_open_fds": "Open file descriptors.",
    "process_start_time_seconds": "When the process started, seconds since 1970.",
}
Sample = tuple[str, dict[str, Any], float]


def metrics(samples: Iterable[Sample]) -> str:
    """Samples in the text format of Prometheus (version 0.0.4), one family after another."""
    families: dict[str, list[str]] = {}
    for name, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(str(each))}"' for key, each in labels.items())
        families.setdefault(name, []).append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    lines: list[str] = []
    for name, found in families.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} {kind}", *found]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def shard_samples(status: Document) -> Iterator[Sample]:
    """Samples of the shards in a node's own status."""
    for shard in status["shards"]:
        labels = {"shard": shard["shard"]}
        yield "space_position", labels, shard["position"]
        yield "space_commit", labels, shard["commit"]
        yield "space_term", labels, shard["term"]
        yield "space_leader", {**labels, "role": shard["role"]}, float(shard["role"] == "leader")
        yield "space_up", labels, float(not shard["failure"])


def peer_samples(peers: Document) -> Iterator[Sample]:
    """Samples of what is known of the peers."""
    for node, peer in peers.items():
        labels = {"peer": node}
        yield "space_peer_connected", labels, float(peer["connected"])
        if peer["rtt_seconds"] is not None:
            yield "space_peer_rtt_seconds", labels, peer["rtt_seconds"]
        for lane, queued in peer["queued_bytes"].items():
            yield "space_peer_queued_bytes", {**labels, "lane": lane}, queued
        if peer["certificate_days"] is not None:
            yield "space_peer_certificate_days", labels, peer["certificate_days"]


_STYLE: Final = (
    "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3em .8em;border-bottom:1px solid #ddd}"
    "code{font-size:.9em}.bad{color:#b00020}h2{margin-top:1.5em}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}th,td{border-color:#333}}"
)


def page(title: str, status: Document) -> str:
    """A status page that loads nothing else and renews itself."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=5>",
        f"<title>{_text(title)}</title><style>{_STYLE}</style><h1>{_text(title)}</h1>",
    ]
    if status.get("cluster"):
        parts.append(f"<p>cluster <code>{_text(status['cluster'])}</code></p>")
    for shard in status["shards"]:
        leader = shard["leader"] if shard["leader"] is not None else "nobody"
        parts.append(f"<h2>shard {shard['shard']}</h2><p>led by {_text(leader)} in term {shard['term']}</p>")
        parts.append("<table><tr><th>node<th>role<th>position<th>lag<th>address<th>digest</tr>")
        parts += [_row(node) for node in shard["nodes"]]
        parts.append("</table>")
    parts += [f"<p class=bad>{_text(each)}</p>" for each in status.get("differences", ())]
    return "".join(parts)


def _row(node: Document) -> str:
    digest = str(node["digest"] or "")
    bad = " class=bad" if node["role"] in ("unreachable", "failed") else ""
    return (
        f"<tr><td>{node['id']}<td{bad}>{_text(node['role'])} {_text(node.get('failure', ''))}"
        f"<td>{_text(node['position'])}<td>{_text(node['lag'])}<td>{_text(node.get('address', ''))}"
        f"<td><code>{_text(digest[:20])}</code></tr>"
    )


def _text(value: object) -> str:
    return "" if value is None else html.escape(str(value))
