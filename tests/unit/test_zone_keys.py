"""The keys of zones: who is believed to be whom, and how keys are replaced."""

from __future__ import annotations

import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from space._errors import (
    ConflictError,
    CorruptionError,
    NotFoundError,
    RefusedError,
    StorageError,
    UsageError,
)
from space._node.federation_keys import (
    AUTHORITIES_MAX,
    AUTHORITY_BYTES_MAX,
    ZoneAuthority,
    ZoneIdentity,
    ZoneKeys,
    claimed,
    proves,
    trust,
)
from space.replication.certificates import create_authority

NOW: Final = datetime.now(UTC).replace(microsecond=0)
OSLO: Final = bytes(range(16))
PARIS: Final = bytes(range(16, 32))


def oslo(tmp_path: Path) -> ZoneKeys:
    """The keys of one zone."""
    return ZoneKeys.create(tmp_path / "oslo", "oslo", "metro", OSLO, now=NOW)


def paris(tmp_path: Path) -> ZoneKeys:
    """The keys of another."""
    return ZoneKeys.create(tmp_path / "paris", "paris", "geo", PARIS, now=NOW)


def shown(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[bytes, bytes]:
    """The certificates (DER) client and server have of each other after a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="anything")
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, theirs) * 2:
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return theirs.getpeercert(binary_form=True) or b"", ours.getpeercert(binary_form=True) or b""


@pytest.mark.parametrize(
    "identity", [ZoneIdentity(OSLO, "oslo"), ZoneIdentity(PARIS, "paris.2_a-b", "edge", bytes(32))]
)
def test_an_identity_is_a_uri(identity: ZoneIdentity) -> None:
    """A zone's identity and its URI are each other."""
    assert ZoneIdentity.parse(str(identity)) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "http://x/zone/a",
        "space://x/zone/a",
        f"space://{'0' * 32}/node/1",
        f"space://{'0' * 32}/zone/A",
        f"space://{'0' * 32}/zone/a?kind=metro",
        f"space://{'0' * 32}/zone/a?kind=moon&sealing={'0' * 64}",
        f"space://{'0' * 32}/zone/a?kind=metro&sealing={'0' * 63}",
    ],
)
def test_what_is_no_identity(uri: str) -> None:
    """Other URIs are of no zone."""
    assert ZoneIdentity.parse(uri) is None


def test_an_authority_tells_all_about_its_zone(tmp_path: Path) -> None:
    """From what a zone gives to others they learn its id, name, kind and sealing key."""
    keys = oslo(tmp_path)
    learnt = ZoneAuthority.parse(keys.offer()[0]).identity
    assert (learnt.id, learnt.name, learnt.kind) == (OSLO, "oslo", "metro")
    assert learnt.sealing_key == keys.sealing.public_key().public_bytes_raw()


def test_keys_are_private_and_come_back(tmp_path: Path) -> None:
    """Loaded keys are those that were made, and nobody else can read their files."""
    made = oslo(tmp_path)
    loaded = ZoneKeys.load(tmp_path / "oslo")
    assert loaded.authority == made.authority
    assert loaded.sealing.private_bytes_raw() == made.sealing.private_bytes_raw()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "oslo/zone").iterdir()} == {0o600}


def test_zones_that_know_each_other_connect(tmp_path: Path) -> None:
    """Both sides see a certificate that the other's authority proves."""
    a, b = oslo(tmp_path), paris(tmp_path)
    server = b.server_context()
    trust(server, a.authority)
    of_client, of_server = shown(a.client_context(b.authority), server)
    assert proves(a.authority, of_client)
    assert proves(b.authority, of_server)
    assert claimed(of_client) == ZoneIdentity(OSLO, "oslo")
    assert not proves(b.authority, of_client)


def test_a_stranger_is_refused(tmp_path: Path) -> None:
    """A zone that was not added gets through no handshake, nor does a server with another authority."""
    a, b = oslo(tmp_path), paris(tmp_path)
    with pytest.raises(ssl.SSLError):
        shown(a.client_context(b.authority), b.server_context())
    server = b.server_context()
    trust(server, a.authority)
    with pytest.raises(ssl.SSLError):
        shown(a.client_context(a.authority), server)


def test_an_authority_speaks_for_its_own_zone_only(tmp_path: Path) -> None:
    """A trusted zone that issues itself a certificate with another zone's name and id is not taken for that one."""
    a, b = oslo(tmp_path), paris(tmp_path)
    liar = ZoneKeys.create(tmp_path / "liar", "oslo", "metro", OSLO, now=NOW)
    server = b.server_context()
    trust(server, a.authority)
    trust(server, liar.authority)
    of_liar, _ = shown(liar.client_context(b.authority), server)
    assert claimed(of_liar) == ZoneIdentity(OSLO, "oslo")
    assert not proves(a.authority, of_liar)


def test_a_rollover_refuses_nobody(tmp_path: Path) -> None:
    """At every step of a change of authority, a zone that has taken the offer connects with what is shown then."""
    a, b = oslo(tmp_path), paris(tmp_path)
    before = a.authority
    a.begin_rollover(now=NOW)
    pem, signature = a.offer()
    assert before.signed(pem, signature)
    both = ZoneAuthority.parse(pem)
    assert both.certificates[1:] == before.certificates

    server = b.server_context()
    trust(server, before)
    context = a.client_context(b.authority)
    assert proves(before, shown(context, server)[0])
    trust(server, both)
    assert proves(both, shown(context, server)[0])
    after = a.finish_rollover()
    after.reload(context)
    new, _ = shown(context, server)
    assert proves(both, new)
    assert proves(after.authority, new)
    assert not proves(before, new)
    assert not after.rolling


def test_a_rollover_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Beginning twice offers the same authority; a stop between the moves of its files is gone on from."""
    keys = oslo(tmp_path)
    keys.begin_rollover(now=NOW)
    offered = keys.offer()[0]
    keys.begin_rollover(now=NOW)
    assert keys.offer()[0] == offered
    zone = tmp_path / "oslo/zone"
    (zone / "next/certificate.pem").replace(zone / "certificate.pem")
    after = ZoneKeys.load(tmp_path / "oslo").finish_rollover()
    assert after.authority.certificates == ZoneAuthority.parse(offered).certificates[:1]


def test_a_signature_is_of_one_offer(tmp_path: Path) -> None:
    """Neither another offer nor another zone's signature is taken for this one."""
    a, b = oslo(tmp_path), paris(tmp_path)
    pem, signature = a.offer()
    assert not a.authority.signed(pem + b"\n", signature)
    assert not b.authority.signed(pem, signature)
    assert not a.authority.signed(pem, b"")


def test_a_renewed_certificate_is_of_the_same_authority(tmp_path: Path) -> None:
    """Another certificate of the zone is proved by what others know already."""
    keys = oslo(tmp_path)
    server = paris(tmp_path).server_context()
    trust(server, keys.authority)
    context = keys.client_context(ZoneKeys.load(tmp_path / "paris").authority)
    first, _ = shown(context, server)
    keys.renew(now=NOW)
    keys.reload(context)
    second, _ = shown(context, server)
    assert first != second
    assert proves(keys.authority, second)


def test_an_old_certificate_is_refused(tmp_path: Path) -> None:
    """Who shows a certificate that has ended gets through no handshake."""
    a, b = oslo(tmp_path), paris(tmp_path)
    a.renew(now=NOW - timedelta(days=5000))
    server = b.server_context()
    trust(server, a.authority)
    with pytest.raises(ssl.SSLError):
        shown(a.client_context(b.authority), server)


@pytest.mark.parametrize("kind", ["", "moon"])
def test_kinds_are_three(tmp_path: Path, kind: str) -> None:
    """A zone of another kind is not made."""
    with pytest.raises(UsageError, match="metro, geo, edge"):
        ZoneKeys.create(tmp_path, "oslo", kind, OSLO, now=NOW)


@pytest.mark.parametrize("name", ["", "Oslo", ".capsules", "a/b", "a@b", "x" * 64, "oslo\n"])
def test_names_are_those_of_policies(tmp_path: Path, name: str) -> None:
    """A zone no policy could name is not made."""
    with pytest.raises(UsageError, match="not the name of a zone"):
        ZoneKeys.create(tmp_path, name, "metro", OSLO, now=NOW)


def test_keys_are_made_once(tmp_path: Path) -> None:
    """A directory's keys are not overwritten by those of another zone."""
    made = oslo(tmp_path)
    with pytest.raises(ConflictError):
        ZoneKeys.create(tmp_path / "oslo", "oslo", "metro", PARIS, now=NOW)
    assert ZoneKeys.load(tmp_path / "oslo").authority == made.authority


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    """A key with wider permissions is not used."""
    oslo(tmp_path)
    (tmp_path / "oslo/zone/sealing.pem").chmod(0o640)
    with pytest.raises(RefusedError, match="chmod 600"):
        ZoneKeys.load(tmp_path / "oslo")


@pytest.mark.parametrize("name", ["authority.pem", "sealing.pem"])
def test_damaged_keys_are_named(tmp_path: Path, name: str) -> None:
    """Files that are missing, damaged or exchanged are errors that say which."""
    oslo(tmp_path)
    path = tmp_path / "oslo/zone" / name
    other = (paris(tmp_path), tmp_path / "paris/zone/certificate.pem")[1]
    sound = path.read_bytes()
    for damaged in (sound[:100], b"", other.read_bytes()[:200]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=name):
            ZoneKeys.load(tmp_path / "oslo")
    path.unlink()
    with pytest.raises(NotFoundError, match="space zone init"):
        ZoneKeys.load(tmp_path / "oslo")


def test_a_full_or_read_only_disk_is_an_error(tmp_path: Path) -> None:
    """Keys that cannot be written are an error that says where."""
    (tmp_path / "oslo").write_text("a file, not a directory")
    with pytest.raises(StorageError, match="oslo"):
        oslo(tmp_path)


def test_what_is_no_authority_is_refused(tmp_path: Path) -> None:
    """Garbage, a certificate that signs for nobody, a cluster's authority, two zones in one file, and too much."""
    a, b = oslo(tmp_path), paris(tmp_path)
    create_authority(tmp_path / "cluster", OSLO, now=NOW)
    certificate = (tmp_path / "oslo/zone/certificate.pem").read_bytes()
    for pem in (
        b"",
        b"\xff",
        certificate,
        (tmp_path / "cluster/ca.pem").read_bytes(),
        a.authority.pem + b.authority.pem,
        a.authority.pem * (AUTHORITIES_MAX + 1),
        a.authority.pem[:-200],
        b" " * (AUTHORITY_BYTES_MAX + 1),
    ):
        with pytest.raises(UsageError):
            ZoneAuthority.parse(pem)
