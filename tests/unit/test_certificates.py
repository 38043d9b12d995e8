"""Certificates of a cluster: who is who."""

from __future__ import annotations

import contextlib
import ssl
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from space._errors import (
    ConflictError,
    CorruptionError,
    NotFoundError,
    RefusedError,
    SpaceError,
    StorageError,
    UsageError,
)
from space.replication import certificates
from space.replication.certificates import Identity, Tls, create_authority, days_left, issue, issue_client
from space.replication.wire import WireError

CLUSTER: Final = bytes(range(16))
NOW: Final = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """The directory of a fresh authority."""
    create_authority(tmp_path / "ca", CLUSTER, now=NOW)
    return tmp_path / "ca"


def handshake(ours: Tls, theirs: Tls) -> tuple[Any, Any]:
    """The certificates both sides see of each other, after a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ours.client.wrap_bio(to_client, to_server, server_hostname="anything")
    server = theirs.server.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server) * 2:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert(), server.getpeercert()


@pytest.mark.parametrize("text", ["", "/node/1", f"/node/{(1 << 63) - 1}", "/client/alice.b-c_1"])
def test_identities_are_uris(text: str) -> None:
    """An identity and its URI are each other."""
    uri = f"space://{uuid.UUID(bytes=CLUSTER)}{text}"
    identity = Identity.parse(uri)
    assert identity is not None
    assert str(identity) == uri
    assert identity.cluster == CLUSTER


@pytest.mark.parametrize(
    "uri", ["", "http://x", "space://x/node/1", *(f"space://{uuid.UUID(int=1)}{end}" for end in (
        "/", "/node/0", "/node/01", "/node/-1", "/node/x", "/node/1/", "/client/", "/client/a b", "/node/1\n",
    ))]
)  # fmt: skip
def test_other_uris_are_none(uri: str) -> None:
    """What is nearly an identity is none."""
    assert Identity.parse(uri) is None


def test_two_nodes_know_each_other(authority: Path, tmp_path: Path) -> None:
    """Nodes of one authority shake hands with TLS 1.3 and see each other's identity and its end."""
    for node in (1, 2):
        issue(authority, tmp_path / str(node), node, ["localhost", "127.0.0.1", "::1"], now=NOW)
    one, two = Tls.load(tmp_path / "1"), Tls.load(tmp_path / "2")
    seen_by_client, seen_by_server = handshake(one, two)
    expires = NOW + timedelta(days=certificates.CERTIFICATE_DAYS)
    assert certificates.peer_identity(seen_by_client) == (Identity(CLUSTER, node=2), expires)
    assert certificates.peer_identity(seen_by_server) == (Identity(CLUSTER, node=1), expires)
    assert ("DNS", "localhost") in seen_by_client["subjectAltName"]
    assert one.identity == Identity(CLUSTER, node=1)
    assert one.expires == expires
    assert one.client.minimum_version is one.server.minimum_version is ssl.TLSVersion.TLSv1_3


def test_keys_are_for_their_owner(authority: Path, tmp_path: Path) -> None:
    """Private keys can be read by their owner alone, and are refused when others can."""
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    for key in (authority / "ca.key", tmp_path / "1" / "node.key"):
        assert key.stat().st_mode & 0o777 == 0o600
    (tmp_path / "1" / "node.key").chmod(0o640)
    with pytest.raises(RefusedError, match="chmod 600"):
        Tls.load(tmp_path / "1")


def test_an_authority_is_made_once(authority: Path) -> None:
    """A second authority does not silently take the place of the one nodes trust."""
    with pytest.raises(ConflictError):
        create_authority(authority, CLUSTER, now=NOW)


def test_an_authority_of_another_cluster_is_not_trusted(authority: Path, tmp_path: Path) -> None:
    """A certificate another authority issued, even for this cluster and node, does not get in."""
    create_authority(tmp_path / "other", CLUSTER, now=NOW)
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    issue(tmp_path / "other", tmp_path / "2", 2, [], now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(Tls.load(tmp_path / "1"), Tls.load(tmp_path / "2"))


@pytest.mark.parametrize("days", [-800, 2])
def test_certificates_hold_in_their_time(authority: Path, tmp_path: Path, days: int) -> None:
    """A certificate that has ended, or has not begun, does not get in."""
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    issue(authority, tmp_path / "2", 2, [], now=NOW + timedelta(days=days))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(Tls.load(tmp_path / "1"), Tls.load(tmp_path / "2"))


def test_a_client_is_not_taken_for_a_node(authority: Path, tmp_path: Path) -> None:
    """An operator's certificate opens connections and cannot answer for a node."""
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    issue_client(authority, tmp_path / "alice", "alice", now=NOW)
    node, alice = Tls.load(tmp_path / "1"), Tls.load(tmp_path / "alice")
    _, seen = handshake(alice, node)
    assert certificates.peer_identity(seen)[0] == Identity(CLUSTER, client="alice")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(node, alice)


def test_rollover_takes_new_files_and_keeps_old_ones_on_error(authority: Path, tmp_path: Path) -> None:
    """Reloading takes the new certificate; when the files do not fit, what was loaded stays."""
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    tls = Tls.load(tmp_path / "1")
    issue(authority, tmp_path / "1", 1, [], now=NOW + timedelta(minutes=30))
    tls.reload()
    renewed = tls.expires
    assert renewed == NOW + timedelta(minutes=30, days=certificates.CERTIFICATE_DAYS)
    issue(authority, tmp_path / "2", 2, [], now=NOW)
    (tmp_path / "2" / "node.key").replace(tmp_path / "1" / "node.key")
    with pytest.raises(CorruptionError, match="do not fit"):
        tls.reload()
    assert tls.expires == renewed
    handshake(tls, tls)


def test_rollover_of_the_authority(authority: Path, tmp_path: Path) -> None:
    """While ca.pem holds an old and a new authority, certificates of both get in."""
    create_authority(tmp_path / "new", CLUSTER, now=NOW)
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    issue(tmp_path / "new", tmp_path / "2", 2, [], now=NOW)
    both = (authority / "ca.pem").read_bytes() + (tmp_path / "new" / "ca.pem").read_bytes()
    for node in ("1", "2"):
        (tmp_path / node / "ca.pem").write_bytes(both)
    handshake(Tls.load(tmp_path / "1"), Tls.load(tmp_path / "2"))


def test_no_certificate_outlives_its_authority(authority: Path, tmp_path: Path) -> None:
    """Issued late, a certificate ends with its authority."""
    end = NOW + timedelta(days=certificates.AUTHORITY_DAYS)
    issue(authority, tmp_path / "1", 1, [], now=end - timedelta(days=10))
    tls = Tls.load(tmp_path / "1")
    assert tls.expires == end
    assert days_left(tls.expires, now=end - timedelta(days=10)) == 10
    assert days_left(tls.expires, now=end + timedelta(hours=1)) == -1


@pytest.mark.parametrize("node", [0, -1, 1 << 63])
def test_numbers_of_nodes_have_a_range(authority: Path, tmp_path: Path, node: int) -> None:
    """No certificate is issued for a number no node has."""
    with pytest.raises(UsageError):
        issue(authority, tmp_path / "1", node, [], now=NOW)


@pytest.mark.parametrize("name", ["", "a b", "a/node/1", "x" * 65, "\n"])
def test_names_of_clients_are_plain(authority: Path, tmp_path: Path, name: str) -> None:
    """No certificate is issued for a name that could pass for something else."""
    with pytest.raises(UsageError):
        issue_client(authority, tmp_path / "1", name, now=NOW)


def test_hosts_that_are_none_are_refused(authority: Path, tmp_path: Path) -> None:
    """A host name that is not ASCII is the caller's mistake."""
    with pytest.raises(UsageError):
        issue(authority, tmp_path / "1", 1, ["h\xf6st"], now=NOW)


@pytest.mark.parametrize("name", ["ca.pem", "node.pem", "node.key"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", "authority's key"])
def test_damaged_files_are_named(
    authority: Path, tmp_path: Path, name: str, content: bytes | str | None
) -> None:
    """A file that is missing, damaged or another's is an error of ours that names what is wrong."""
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    path = tmp_path / "1" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes((authority / "ca.key").read_bytes() if isinstance(content, str) else content)
    with pytest.raises(NotFoundError if content is None else CorruptionError, match=str(tmp_path / "1")):
        Tls.load(tmp_path / "1")


@pytest.mark.parametrize("content", [None, b"", b"garbage", "node's key"])
def test_damaged_authorities_are_named(authority: Path, tmp_path: Path, content: bytes | str | None) -> None:
    """Without its right key, an authority issues nothing."""
    issue(authority, tmp_path / "1", 1, [], now=NOW)
    path = authority / "ca.key"
    if content is None:
        path.unlink()
    else:
        key = (tmp_path / "1" / "node.key").read_bytes()
        path.write_bytes(key if isinstance(content, str) else content)
    with pytest.raises(SpaceError, match="ca"):
        issue(authority, tmp_path / "2", 2, [], now=NOW)
    assert not (tmp_path / "2").exists()


def test_files_that_cannot_be_written(authority: Path, tmp_path: Path) -> None:
    """A path that is no directory is an error of storage."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        issue(authority, tmp_path / "file", 1, [], now=NOW)


@pytest.mark.parametrize("names", [(), (("DNS", "localhost"),), (("URI", "http://x"),)])
def test_certificates_of_others_name_nobody(names: Any) -> None:
    """A certificate without exactly one identity is refused, whoever signed it."""
    twice = (("URI", str(Identity(CLUSTER, 1))), ("URI", str(Identity(CLUSTER, 2))))
    for each in (names, twice):
        with pytest.raises(WireError):
            certificates.peer_identity({"subjectAltName": each, "notAfter": "Jan  1 00:00:00 2030 GMT"})
    with pytest.raises(WireError):
        certificates.peer_identity(None)
