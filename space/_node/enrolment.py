"""Who a directory is: the node it goes on as, or becomes.

A directory with ``node.json`` goes on as the node it is; an empty one with a certificate (or told which cluster
to join) waits to be added; any other becomes the first node of a cluster.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import CorruptionError, NotFoundError, UsageError

if TYPE_CHECKING:
    from space._node.cluster import NodeConfig
    from space._node.csi_servers import Listening
    from space._node.nfs_node import NfsOptions
    from space._node.nvme_node import NvmeOptions

INVITATION: Final = "invitation.json"
"""Beside the certificate of a node that was invited: how many shards there are, and where its peers are."""


@attrs.frozen
class ServeOptions:
    """What a node is told when it starts; what is None is as it was, or the default.

    Attributes:
        listen: HOST:PORT for its peers.
        advertise: HOST:PORT under which peers reach it, if another one.
        shards: how many shards a new cluster gets, or the one to join has.
        http: HOST:PORT for metrics, the status page and calls; none without.
        join: id of the cluster to wait for; the certificate knows it too.
        node: id of a node that joins without a certificate.
        tls: where its certificate is, if not in the data directory.
        insecure: no certificates; only on addresses of this machine.
        mounts: ``(target, path)`` to mount when it is ready.
        nvme: what to serve to NVMe hosts as soon as it can be; at most one, as a node has one subsystem.
        nfs: what to serve to NFS clients when it is this node's turn; at most one, as a cluster is one server.
        csi: where to serve volumes of the CSI driver; at most one.
        federation: HOST:PORT for other zones; it ships to them too.
    """

    listen: str | None = None
    advertise: str | None = None
    shards: int | None = None
    http: str | None = None
    join: str | None = None
    node: int | None = None
    tls: Path | None = None
    insecure: bool = False
    mounts: tuple[tuple[str, str], ...] = ()
    nvme: tuple[NvmeOptions, ...] = ()
    nfs: tuple[NfsOptions, ...] = ()
    csi: tuple[Listening, ...] = ()
    federation: str | None = None


def prepare(home: Path, options: ServeOptions) -> NodeConfig:
    """The node a directory is, or becomes.

    Raises:
        UsageError: the options contradict each other or the directory.
    """
    from space._node.cluster import NodeConfig

    found = NodeConfig.load(home)
    if found is None:
        return _new_node(home, options)
    _refuse_change("--shards", options.shards, found.shards)
    _refuse_change("--node-id", options.node, found.node)
    _refuse_change(
        "--join", options.join and str(uuid.UUID(options.join)), str(uuid.UUID(bytes=found.cluster))
    )
    _refuse_change("--insecure", options.insecure or None, not found.tls)
    if options.tls is not None:
        _take_certificate(options.tls, home)
    changed = attrs.evolve(
        found,
        listen=options.listen or found.listen,
        advertise=found.advertise if options.advertise is None else options.advertise,
    )
    if changed != found:
        changed.save(home)
    return changed


def _refuse_change(flag: str, wanted: object, is_: object) -> None:
    if wanted is not None and wanted != is_:
        raise UsageError(f"{flag} {wanted}: this node has {is_}", hint=f"leave {flag} out")


def _new_node(home: Path, options: ServeOptions) -> NodeConfig:
    from space._node import cluster

    listen, advertise = options.listen or cluster.LISTEN, options.advertise or ""
    certificate = home / cluster.TLS
    if options.tls is not None:
        _take_certificate(options.tls, home)
    if options.insecure and options.join:
        if options.node is None:
            raise UsageError("--join with --insecure needs to know which node this is", hint="--node-id N")
        return cluster.join(
            home,
            node=options.node,
            cluster=_cluster_id(options.join),
            listen=listen,
            advertise=advertise,
            shards=options.shards or 1,
            tls=False,
        )
    if (
        not options.insecure
        and (certificate / "node.pem").exists()
        and not (certificate / cluster.AUTHORITY).exists()
    ):
        return _invited(home, certificate, options, listen, advertise)
    if options.join:
        raise UsageError(
            f"no certificate in {certificate}",
            hint="space cluster invite N --out DIR on the first node makes one",
        )
    _refuse_change("--node-id", options.node, 1)
    return cluster.found(
        home,
        listen=listen,
        advertise=advertise,
        shards=1 if options.shards is None else options.shards,
        tls=not options.insecure,
    )


def _invited(home: Path, certificate: Path, options: ServeOptions, listen: str, advertise: str) -> NodeConfig:
    from space._node import cluster
    from space.replication.certificates import Tls

    identity = Tls.load(certificate).identity
    if not identity.node:
        raise UsageError(f"the certificate in {certificate} is a client's, not a node's")
    _refuse_change("--node-id", options.node, identity.node)
    if options.join is not None and _cluster_id(options.join) != identity.cluster:
        raise UsageError(
            f"the certificate in {certificate} is of cluster {uuid.UUID(bytes=identity.cluster)}"
        )
    shards, peers = _read_invitation(certificate / INVITATION)
    _refuse_change("--shards", options.shards if shards else None, shards)
    return cluster.join(
        home,
        node=identity.node,
        cluster=identity.cluster,
        listen=listen,
        advertise=advertise,
        shards=shards or options.shards or 1,
        peers=peers,
    )


def _read_invitation(path: Path) -> tuple[int, dict[int, str]]:
    try:
        document = json.loads(path.read_text())
        return int(document["shards"]), {int(node): str(each) for node, each in document["peers"].items()}
    except FileNotFoundError:
        return 0, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{path} is damaged: {error!r:.100}", segment=path.name) from None


def _cluster_id(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise UsageError(
            f"not the id of a cluster: {text!r:.60}", hint="space cluster status shows it"
        ) from None


def _take_certificate(source: Path, home: Path) -> None:
    """Copies certificate, key and authority into the data directory."""
    from space._node.cluster import TLS
    from space.replication.certificates import AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE

    target = home / TLS
    if source.resolve() == target.resolve():
        return
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.mkdir(mode=0o700, exist_ok=True)
    for name in (AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, INVITATION):
        try:
            shutil.copy(source / name, target / name)
        except FileNotFoundError:
            if name != INVITATION:
                raise NotFoundError(f"{source / name} is missing") from None
        except OSError as error:
            raise UsageError(f"cannot copy {source / name}: {error.strerror}") from None
