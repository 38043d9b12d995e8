"""The zones a store knows: its own, which it makes, and others, which are added.

The keys of its own are files (:mod:`space._node.federation_keys`); everything else about zones is in the log, so
that a replica of it, and an auditor, know whom content was meant for.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import attrs

from space._errors import (
    ConflictError,
    NotFoundError,
    RefusedError,
    SpaceError,
    UnavailableError,
    UsageError,
)
from space._node.caller import Document
from space._node.federation_keys import ZONE, ZoneAuthority, ZoneKeys, check_name, settle
from space._node.federation_nodes import KEYS, KEYS_SECONDS, RENEW, SETTLE
from space.events import commands as cmd
from space.events.ids import zone_capsules, zone_root
from space.events.types import URL_CHARACTERS_MAX, ZoneKind
from space.federation.exchange import (
    ADDRESSES_MAX,
    AUTHORITY,
    DOCUMENT_BYTES_MAX,
    IDENTITY,
    VERSION,
    addresses,
    error_in,
    parse_document,
)
from space.replication.certificates import days_left
from space.statemachine import zones as rows
from space.statemachine.tables import CAPSULE, HOME, CapsuleRow, Overlay, Reader

if TYPE_CHECKING:
    from space._node.federation_nodes import Nodes
    from space._node.store import Store

ASK_SECONDS: Final = 10.0
"""How long another zone may take to answer when it is added."""

_SETTLING: Final = threading.Lock()
"""Held while keys are fetched from another node: files are replaced one by one."""

KINDS: Final = {kind.name.lower(): kind for kind in ZoneKind}
_REJECTED: Final = re.compile("UNKNOWN_CA|CERTIFICATE_REQUIRED|CERTIFICATE_UNKNOWN|BAD_CERTIFICATE")


class NotKnownThereError(UnavailableError):
    """Another zone answers, and takes no connection of this one: it was not added there."""


@attrs.frozen
class Zone:
    """A zone as the log knows it.

    Attributes:
        id: 16 bytes.
        name: how policies call it.
        kind: how far away it is.
        url: where it answers; empty if it was not said.
        authorities: certificates of those who sign for it, PEM.
        sealing: X25519 public key that keys are sealed for it with.
    """

    id: bytes
    name: str
    kind: ZoneKind
    url: str
    authorities: bytes = attrs.field(repr=False)
    sealing: bytes = attrs.field(repr=False)


class Zones:
    """The zones of one store."""

    def __init__(self, store: Store, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now

    def own(self) -> Zone | None:
        """The zone the store is in, if it is in one."""
        return next(iter(self._with_role(rows.OWN)), None)

    def others(self) -> list[Zone]:
        """Zones that were added, by name."""
        return sorted(self._with_role(rows.PEER), key=lambda zone: zone.name)

    def _with_role(self, role: int) -> list[Zone]:
        with self._store._read() as txn:
            found = rows.zones(txn)
        return [
            Zone(number, row.name, ZoneKind(row.kind), row.url, row.authorities, row.sealing)
            for number, row in found.items()
            if row.role == role
        ]

    def find(self, name: str) -> Zone:
        """An added zone.

        Raises:
            NotFoundError: there is none of that name.
        """
        for zone in self.others():
            if zone.name == name:
                return zone
        raise NotFoundError(f"no zone {name}", hint="space zone ls shows those that were added")

    def keys(self) -> ZoneKeys:
        """The keys of the zone the store is in; a node of a cluster gets from the others what it lacks.

        Raises:
            NotFoundError: it is in none, or they are not in this directory.
            UnavailableError: no node that has them answers.
        """
        own = self.own()
        if own is None:
            raise NotFoundError(f"store {self._store.path} is in no zone", hint="space zone init NAME")
        nodes = self._store.nodes
        if nodes is not None:
            return self._settled(own, nodes)
        keys = ZoneKeys.load(self._store.path)
        if keys.identity.id != own.id:
            raise RefusedError(
                f"the keys in {self._store.path / ZONE} are of another zone than {own.name}",
                hint="put back those of this store",
            )
        return keys

    def _settled(self, own: Zone, nodes: Nodes) -> ZoneKeys:
        def ask() -> Iterable[object]:
            return nodes.ask(KEYS, seconds=KEYS_SECONDS)[0].values()

        with _SETTLING:
            return settle(self._store.path, ZoneAuthority.parse(own.authorities), ask, now=self._now())

    # --- this one --------------------------------------------------------------------------------

    def init(self, name: str, kind: str, url: str) -> Document:
        """Makes the zone of the store and its keys; where it has that name already, sets its address.

        Raises:
            ConflictError: the store is in another zone.
            UsageError: not a name, kind or address.
        """
        check_name(name)
        if url:
            check_url(url)
        own = self.own()
        if own is not None:
            if (own.name, KINDS.get(kind)) != (name, own.kind):
                raise ConflictError(f"the store is in the {own.kind.name.lower()} zone {own.name} already")
            keys = self.keys()
            self._change(own, url=url)
        else:
            keys = self._make_keys(name, kind)
            about = keys.identity
            self._store.execute(
                cmd.DefineZone(
                    about.id, about.name, KINDS[about.kind], url, keys.authority.pem, about.sealing_key
                )
            )
        return {"zone": name, "id": _text(keys.identity.id), "kind": kind, "url": url}

    def _make_keys(self, name: str, kind: str) -> ZoneKeys:
        """Keys for a zone the log does not know yet; those of an attempt that was stopped half way are taken."""
        try:
            found = ZoneKeys.load(self._store.path)
        except NotFoundError:
            zone = self._store.new_id()
            return ZoneKeys.create(self._store.path, name, kind, zone, now=self._now())
        if (found.identity.name, found.identity.kind) != (name, kind):
            raise ConflictError(
                f"{self._store.path / ZONE} has the keys of the {found.identity.kind} zone {found.identity.name}",
                hint="use its name and kind, or move the directory away",
            )
        return found

    def _change(
        self,
        zone: Zone,
        *,
        kind: ZoneKind | None = None,
        url: str = "",
        authority: ZoneAuthority | None = None,
    ) -> None:
        pem = zone.authorities if authority is None else authority.pem
        sealing = zone.sealing if authority is None else authority.identity.sealing_key
        changed = (zone.kind if kind is None else kind, url or zone.url, pem, sealing)
        if changed != (zone.kind, zone.url, zone.authorities, zone.sealing):
            self._store.execute(cmd.ChangeZone(zone.id, *changed))

    # --- others ----------------------------------------------------------------------------------

    def add(self, name: str, url: str, authority: bytes, kind: str | None, *, offline: bool) -> Document:
        """Makes another zone known, or gives a known one another address or authority; asks it who it is first.

        Args:
            name: what policies call it, and it calls itself.
            url: where it answers, ``https://HOST:PORT``.
            authority: what ``space zone ca`` printed there.
            kind: another kind than it says it is.
            offline: without asking it.

        Raises:
            UnavailableError: it does not answer.
            RefusedError: who answers is not that zone.
            UsageError: the authority is of another zone.
        """
        check_name(name)
        check_url(url)
        keys = self.keys()
        found = ZoneAuthority.parse(authority)
        if found.identity.name != name:
            raise UsageError(
                f"the authority is of zone {found.identity.name}, not {name}",
                hint=f"space zone add {found.identity.name}, which is what policies have to call it",
            )
        if found.identity.id == keys.identity.id:
            raise UsageError(f"zone {name} is this one", hint="give the authority of the other one")
        wanted = KINDS[found.identity.kind if kind is None else _checked_kind(kind)]
        notice, known = "", None
        if not offline:
            notice, known = self._meet(keys, found, url)
        before = next((zone for zone in self.others() if zone.id == found.identity.id), None)
        if before is not None:
            self._change(before, kind=wanted, url=url, authority=found)
        else:
            self._store.execute(
                cmd.AddZone(found.identity.id, name, wanted, url, found.pem, found.identity.sealing_key)
            )
        return {
            "zone": name,
            "id": _text(found.identity.id),
            "kind": wanted.name.lower(),
            "url": url,
            "knows_us": known,
            "notice": notice,
        }

    def _meet(self, keys: ZoneKeys, authority: ZoneAuthority, url: str) -> tuple[str, bool]:
        """Asks a zone who it is; a notice for people if something is left to do, and whether it knows this one."""
        name = authority.identity.name
        try:
            identity = ask(url, keys, authority, "GET", IDENTITY)
        except NotKnownThereError:
            own = self.own()
            here = own.url if own is not None and own.url else "https://HOST:PORT"
            return (
                f"zone {name} answers, and does not know this zone yet, so its version was not checked; "
                f"there, with the file that `space zone ca` prints here: "
                f"space zone add {keys.identity.name} --url {here} --ca FILE"
            ), False
        if identity.get("id") != _text(authority.identity.id) or identity.get("zone") != name:
            raise RefusedError(f"{url} says it is zone {identity.get('zone')!r:.70}, not {name}")
        if VERSION not in (versions := identity.get("versions") or []):
            raise UnavailableError(
                f"zone {name} speaks versions {versions!r:.60} of the protocol, and this one {VERSION}",
                hint="upgrade the older one",
            )
        return "", True

    def remove(self, name: str, *, sure: bool) -> Document:
        """Ends shipping to and from a zone; replicas of what has its home there stay, as they are.

        Raises:
            NotFoundError: there is no such zone.
            ConflictError: there are replicas, and the caller is not sure.
        """
        zone = self.find(name)
        replicas = self.replicas(zone)
        if replicas and not sure:
            raise ConflictError(
                f"{replicas} capsules here have their home in zone {name}: they stay readable, get nothing new, and "
                f"cannot be changed, only removed",
                hint="--yes removes the zone all the same",
            )
        receipt = self._store.execute(cmd.RemoveZone(zone.id))
        return {"zone": name, "id": _text(zone.id), "replicas": replicas, "position": receipt.position}

    def replicas(self, zone: Zone) -> int:
        """How many capsules here have their home in a zone: they came from there, or it took them over."""
        with self._store._read() as txn:
            row = rows.zone_row(txn, zone.id)
            taken = 0 if row is None else row.taken
            places = (zone_root(zone.id), zone_capsules(zone.id))
            found = 0
            for capsule, data in txn.scan(HOME, b""):
                home = rows.HomeRow.decode(data)
                if home.zone == zone.id and capsule not in places:
                    found += _is_of(txn, capsule, home) if home.moved else _inode(txn, capsule) > taken
            lost = 0 if row is None else row.lost
            for capsule, position in rows.sent_capsules(txn, zone.id) if lost else ():
                found += position < lost and txn.get(HOME, capsule) is None
        return found

    # --- another authority -----------------------------------------------------------------------

    def renew(self) -> Document:
        """Gives this zone (each node of it) another certificate of the same authority: the others notice nothing.

        Raises:
            SpaceError: there are no keys, or they cannot be written.
        """
        keys = self.keys()
        keys.renew(now=self._now())
        return {
            "zone": keys.identity.name,
            "expires": keys.expires.isoformat(),
            "nodes_without": sorted(self._tell_nodes(RENEW)),
        }

    def _tell_nodes(self, what: str) -> dict[int, str]:
        """Has the other nodes of a cluster do something about their keys; those that did not, and why."""
        nodes = self._store.nodes
        return {} if nodes is None else {node: str(error) for node, error in nodes.ask(what)[1].items()}

    def roll_over(self, *, force: bool) -> Document:
        """Gives this zone another authority: first all others trust both, then its certificate is of the new one.

        Nobody is refused meanwhile.  Where another zone, or a node of this one, cannot be reached everything stays as
        it is, and is gone on with by asking again; with ``force`` it goes on without that zone, which has to be told
        by hand, and without that node, which asks the others when it is back.

        Raises:
            UnavailableError: a zone or a node has not taken the new authority yet.
        """
        keys, own = self.keys(), self.own()
        assert own is not None
        keys.begin_rollover(now=self._now())
        self._change(own, authority=ZoneAuthority.parse(keys.offer()[0]))
        away = self._tell_nodes(SETTLE)
        missing = self._offer(keys)
        if (missing or away) and not force:
            whom = [f"node {node}: {error}" for node, error in away.items()]
            told = "; ".join(whom + [f"{name}: {error}" for name, error in missing.items()])
            raise UnavailableError(
                f"the new authority is not known everywhere, so the old one stays in use: {told}",
                hint="repeat this when they answer, or go on without them: --force",
            )
        keys = keys.finish_rollover()
        own = self.own()
        assert own is not None
        self._change(own, authority=keys.authority)
        away |= self._tell_nodes(SETTLE)
        old_trusted = self._offer(keys)  # the old one is not to be trusted for longer than it has to be
        return {
            "zone": own.name,
            "fingerprints": keys.authority.fingerprints,
            "expires": keys.expires.isoformat(),
            "without": sorted(missing),
            "nodes_without": sorted(away),
            "trusting_the_old": sorted({*missing, *old_trusted}),
        }

    def _offer(self, keys: ZoneKeys) -> dict[str, str]:
        """Tells all other zones what to trust; those that did not take it, and why."""
        pem, signature = keys.offer()
        document = {"authority": pem.decode("ascii"), "signature": signature.hex()}
        missing = {}
        for zone in self.others():
            try:
                ask(zone.url, keys, ZoneAuthority.parse(zone.authorities), "POST", AUTHORITY, document)
            except SpaceError as error:
                missing[zone.name] = str(error)
        return missing

    def take_authority(self, zone: Zone, pem: bytes, signature: bytes) -> Document:
        """Trusts other certificates of a zone from now on, because one it trusts so far signed them.

        Raises:
            RefusedError: none of them did, or they are of another zone.
        """
        before = ZoneAuthority.parse(zone.authorities)
        if not before.signed(pem, signature):
            raise RefusedError(
                f"the authority offered for zone {zone.name} is not signed by the one known here"
            )
        offered = ZoneAuthority.parse(pem)
        if (offered.identity.id, offered.identity.name) != (zone.id, zone.name):
            raise RefusedError(f"zone {zone.name} offers the authority of zone {offered.identity.name}")
        self._change(zone, authority=offered)
        return {"authorities": offered.fingerprints}

    # --- shown -----------------------------------------------------------------------------------

    def documents(self) -> list[Document]:
        """All zones, this one first."""
        own = self.own()
        return [
            self._document(zone, own=zone is own) for zone in ([] if own is None else [own]) + self.others()
        ]

    def _document(self, zone: Zone, *, own: bool) -> Document:
        authority = ZoneAuthority.parse(zone.authorities)
        return {
            "zone": zone.name,
            "id": _text(zone.id),
            "kind": zone.kind.name.lower(),
            "url": zone.url,
            "own": own,
            "replicas": 0 if own else self.replicas(zone),
            "fingerprints": authority.fingerprints,
            "authority_days": days_left(authority.expires, now=self._now()),
        }


def _is_of(txn: Reader, capsule: bytes, home: rows.HomeRow) -> bool:
    """Whether a capsule whose home moved has it in that zone now."""
    state = Overlay(txn)
    row = state.capsule(capsule)
    return row is not None and rows.home_of(state, capsule, row) == home.zone


def _inode(state: Reader, capsule: bytes) -> int:
    data = state.get(CAPSULE, capsule)
    return 0 if data is None else CapsuleRow.decode(data).ino


def _text(zone: bytes) -> str:
    return str(uuid.UUID(bytes=zone))


def _checked_kind(kind: str) -> str:
    if kind not in KINDS:
        raise UsageError(f"not a kind of zone: {kind!r:.40}", hint=f"there is: {', '.join(KINDS)}")
    return kind


def check_url(url: str) -> None:
    """Refuses what is not the address of a zone, or addresses of its nodes with commas between them.

    Raises:
        UsageError: one of them is not ``https://HOST:PORT``, or there are too many.
    """
    several = url.split(",")
    if len(several) > ADDRESSES_MAX or len(url) > URL_CHARACTERS_MAX:
        raise UsageError(f"more addresses than a zone can have: {url[:60]}…", hint=f"up to {ADDRESSES_MAX}")
    for each in several:
        _check_address(each)


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = bool(parts.scheme == "https" and parts.hostname and parts.port)
    except ValueError:
        sound = False
    else:
        sound = sound and (parts.path in ("", "/")) and not (parts.query or parts.fragment or parts.username)
    if not sound:
        raise UsageError(f"not the address of a zone: {url!r:.120}", hint="write https://HOST:PORT")


def ask(
    url: str,
    keys: ZoneKeys,
    authority: ZoneAuthority,
    method: str,
    path: str,
    document: Document | None = None,
) -> Document:
    """Asks another zone one thing, at the first of its addresses that answers, and waits for the answer.

    Raises:
        RefusedError: who answers is not that zone.
        NotKnownThereError: it is, and knows nothing of this one.
        UnavailableError: nobody answers, or with something else.
        SpaceError: what it answered.
    """
    last: SpaceError = UnavailableError(
        f"zone {authority.identity.name} has no address", hint="space zone add --url"
    )
    for address in addresses(url):
        try:
            return _ask_at(address, keys, authority, method, path, document)
        except NotKnownThereError:
            raise
        except UnavailableError as error:
            last = error
    raise last


def _ask_at(
    url: str,
    keys: ZoneKeys,
    authority: ZoneAuthority,
    method: str,
    path: str,
    document: Document | None,
) -> Document:
    parts = urlsplit(url)
    name = authority.identity.name
    connection = http.client.HTTPSConnection(
        parts.hostname or "", parts.port, timeout=ASK_SECONDS, context=keys.client_context(authority)
    )
    with contextlib.closing(connection):
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise RefusedError(
                f"who answers at {url} is not zone {name}: {error.verify_message}",
                hint="compare with `space zone ca` there, and the clocks of both",
            ) from None
        except OSError as error:
            raise UnavailableError(
                f"zone {name} does not answer at {url}: {error.strerror or error}",
                hint="space federation serve has to run there",
            ) from None
        status, body = _exchange(connection, method, path, document, name)
    if status != http.HTTPStatus.OK and not body.startswith(b"{"):
        raise UnavailableError(f"zone {name} answered {status}", hint=f"is it a zone that answers at {url}?")
    answer = parse_document(body)
    if (refusal := error_in(answer)) is not None:
        raise refusal
    return answer


def _exchange(
    connection: http.client.HTTPSConnection, method: str, path: str, document: Document | None, name: str
) -> tuple[int, bytes]:
    """Status and body of the answer.

    In TLS 1.3 the server looks at the client's certificate after the client takes the handshake to be done: that it
    wants none of it shows when the answer is read, as an alert, or as a connection that ended.
    """
    body = None if document is None else json.dumps(document).encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(DOCUMENT_BYTES_MAX)
    except ssl.SSLError as error:
        if _REJECTED.search(str(error)):
            raise NotKnownThereError(f"zone {name} does not know this one") from None
        raise UnavailableError(f"zone {name} ended the connection: {error}") from None
    except (ConnectionError, http.client.RemoteDisconnected):
        raise NotKnownThereError(f"zone {name} ended the connection: it does not know this one") from None
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"zone {name} did not answer: {str(error) or type(error).__name__}") from None
