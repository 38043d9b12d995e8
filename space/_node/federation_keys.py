"""Who is who between zones: every zone has an authority, a certificate and a sealing key that it made itself.

What other zones are told of a zone is its authority, in PEM: certificates that sign for it, newest first.  Each
says in its subject alternative names (RFC 5280 §4.2.1.6) which zone it is for, of what kind, and the X25519 key
(RFC 7748) that keys are sealed for the zone with::

    space://<uuid>/zone/<name>?kind=<kind>&sealing=<64 hexadecimal digits>

The certificate a zone shows, to whoever connects and wherever it connects, says ``space://<uuid>/zone/<name>``.
Host names are not checked: a zone is whom its certificate says, wherever it is.  Only TLS 1.3 (RFC 8446), and
both sides show a certificate.  An authority is believed about its own zone alone: see :func:`proves`.

In ``DIR/zone``, readable to the owner only, each file replaced as a whole:

=====================  ==================================================================================
``authority.pem``      private key of the authority, and its certificate
``certificate.pem``    private key of the zone, and its certificate
``sealing.pem``        private key that keys are sealed for
``next/``              authority and certificate that are being rolled over to
=====================  ==================================================================================

The nodes of a cluster are one zone: they have the same authority and sealing key, and a certificate each.  Which
authority that is the log says, so a node that has none, or another one, knows what to ask the others for
(:meth:`ZoneKeys.bundle`, :func:`settle`): private keys go from node to node, never through the log.

A new authority is offered to the other zones signed by the one they know (:meth:`ZoneKeys.offer`), beside it.  Only
when all of them trust both does the zone show a certificate of the new one: nobody is refused meanwhile.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import ssl
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from space._errors import (
    ConflictError,
    CorruptionError,
    NotFoundError,
    RefusedError,
    StorageError,
    UnavailableError,
    UsageError,
)
from space.replication.certificates import (
    AUTHORITY_DAYS,
    CERTIFICATE_DAYS,
    builder,
    certificate_bytes,
    key_bytes,
    key_usage,
    write_file,
)

ZONE: Final = "zone"
AUTHORITY_FILE: Final = "authority.pem"
CERTIFICATE_FILE: Final = "certificate.pem"
SEALING_FILE: Final = "sealing.pem"
NEXT: Final = "next"

KINDS: Final = ("metro", "geo", "edge")
"""How far away a zone is: in one city, in another region, at the edge."""

AUTHORITIES_MAX: Final = 4
"""One, two while it is rolled over, and room for whoever was away during a rollover."""

AUTHORITY_BYTES_MAX: Final = 16 << 10
"""A certificate is below 2 KiB."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)  # as in policies
_PATH: Final = re.compile(r"/zone/([a-z0-9][a-z0-9._-]{0,62})", re.ASCII)
_SEALING: Final = re.compile(r"[0-9a-f]{64}")
_OFFER: Final = b"space zone authority v1\0"


@attrs.frozen
class ZoneIdentity:
    """Whom an authority or a certificate is for.

    Attributes:
        id: 16 bytes, drawn when the zone was made.
        name: how policies call it.
        kind: one of :data:`KINDS`; empty in a certificate that is no authority.
        sealing_key: public X25519 key, 32 bytes; empty in a certificate that is no authority.
    """

    id: bytes
    name: str
    kind: str = ""
    sealing_key: bytes = b""

    def __str__(self) -> str:
        about = f"?kind={self.kind}&sealing={self.sealing_key.hex()}" if self.sealing_key else ""
        return f"space://{uuid.UUID(bytes=self.id)}/zone/{self.name}{about}"

    @classmethod
    def parse(cls, uri: str) -> ZoneIdentity | None:
        """The identity a URI stands for, if it is one."""
        parts = urlsplit(uri)
        path = _PATH.fullmatch(parts.path)
        if parts.scheme != "space" or path is None:
            return None
        try:
            zone = uuid.UUID(parts.netloc).bytes
        except ValueError:
            return None
        if not parts.query:
            return cls(zone, path[1])
        about = {key: values[0] for key, values in parse_qs(parts.query, max_num_fields=4).items()}
        kind, sealing = about.get("kind", ""), about.get("sealing", "")
        if kind not in KINDS or not _SEALING.fullmatch(sealing):
            return None
        return cls(zone, path[1], kind, bytes.fromhex(sealing))


@attrs.frozen
class ZoneAuthority:
    """What is known of a zone: its authorities, newest first, and what they say.

    Attributes:
        identity: what the newest says.
        pem: their certificates.
    """

    identity: ZoneIdentity
    pem: bytes
    certificates: tuple[x509.Certificate, ...] = attrs.field(repr=False, eq=False)

    @classmethod
    def parse(cls, pem: bytes) -> ZoneAuthority:
        """The authority in a file another zone has given.

        Raises:
            UsageError: it is none, or of more than one zone.
        """
        if len(pem) > AUTHORITY_BYTES_MAX:
            raise UsageError(f"not the authority of a zone: {len(pem)} bytes", hint=_AUTHORITY_HINT)
        try:
            found = x509.load_pem_x509_certificates(pem)
        except ValueError:
            raise UsageError(
                "not the authority of a zone: no certificate in it", hint=_AUTHORITY_HINT
            ) from None
        if len(found) > AUTHORITIES_MAX:
            raise UsageError(f"{len(found)} certificates; an authority has at most {AUTHORITIES_MAX}")
        identities = [_authority_identity(each) for each in found]
        if len({(each.id, each.name) for each in identities}) > 1:
            raise UsageError("certificates of more than one zone", hint=_AUTHORITY_HINT)
        return cls(identities[0], b"".join(map(certificate_bytes, found)), tuple(found))

    @property
    def fingerprints(self) -> list[str]:
        """SHA-256 of each certificate, as other programs show it."""
        return [_fingerprint(each) for each in self.certificates]

    @property
    def expires(self) -> datetime:
        """When the last of them ends."""
        return max(each.not_valid_after_utc for each in self.certificates)

    def signed(self, content: bytes, signature: bytes) -> bool:
        """Whether one of them signed ``content``."""
        for each in self.certificates:
            key = each.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)  # checked when it was parsed
            with contextlib.suppress(InvalidSignature):
                key.verify(signature, _OFFER + content, ec.ECDSA(hashes.SHA256()))
                return True
        return False


_AUTHORITY_HINT: Final = "`space zone ca` of the other zone prints it"


def _authority_identity(certificate: x509.Certificate) -> ZoneIdentity:
    identity = _identity(certificate)
    if identity is None or not identity.sealing_key:
        raise UsageError("a certificate that is not the authority of a zone", hint=_AUTHORITY_HINT)
    try:
        certificate.verify_directly_issued_by(certificate)
        signs = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        signs = False
    if not signs or not isinstance(certificate.public_key(), ec.EllipticCurvePublicKey):
        raise UsageError(f"zone {identity.name}: a certificate that signs for nobody", hint=_AUTHORITY_HINT)
    return identity


def _identity(certificate: x509.Certificate) -> ZoneIdentity | None:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        return None
    found = [identity for uri in uris if (identity := ZoneIdentity.parse(uri))]
    return found[0] if len(found) == 1 else None


def claimed(certificate: bytes) -> ZoneIdentity | None:
    """Whom a certificate (DER) that somebody shows says it is for; believe it when the zone's authority proves it."""
    try:
        return _identity(x509.load_der_x509_certificate(certificate))
    except ValueError:
        return None


def proves(authority: ZoneAuthority, certificate: bytes) -> bool:
    """Whether a certificate (DER) was issued by this zone's authority, for this zone.

    TLS has verified that *some* authority it was given issued it; without this a zone could show itself as another.
    """
    shown = x509.load_der_x509_certificate(certificate)
    identity = _identity(shown)
    if identity is None or (identity.id, identity.name) != (authority.identity.id, authority.identity.name):
        return False
    for each in authority.certificates:
        with contextlib.suppress(ValueError, TypeError, InvalidSignature):
            shown.verify_directly_issued_by(each)
            return True
    return False


# --- a zone's own ----------------------------------------------------------------------------------


@attrs.frozen
class _Signing:
    """An authority with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> bytes:
        return key_bytes(self.key) + certificate_bytes(self.certificate)


class ZoneKeys:
    """The keys of the zone a data directory is in.

    Use :meth:`create` or :meth:`load`.
    """

    def __init__(self, directory: Path, authority: _Signing, sealing: X25519PrivateKey) -> None:
        self._directory = directory
        self._signing = authority
        self.sealing = sealing
        self.authority = ZoneAuthority.parse(certificate_bytes(authority.certificate))

    @property
    def identity(self) -> ZoneIdentity:
        """The zone."""
        return self.authority.identity

    @property
    def expires(self) -> datetime:
        """When the certificate the zone shows ends, or its authority."""
        shown = x509.load_pem_x509_certificate(_read(self._directory / CERTIFICATE_FILE))
        return min(shown.not_valid_after_utc, self.authority.expires)

    @classmethod
    def create(cls, home: Path, name: str, kind: str, zone: bytes, *, now: datetime) -> ZoneKeys:
        """Makes the keys of a new zone.

        Args:
            home: the data directory.
            name: as policies will call it.
            kind: one of :data:`KINDS`.
            zone: its id, 16 random bytes.
            now: the time.

        Raises:
            UsageError: not a name or kind of a zone.
            ConflictError: there are keys already.
            StorageError: they cannot be written.
        """
        check_name(name)
        if kind not in KINDS:
            raise UsageError(f"not a kind of zone: {kind!r:.40}", hint=f"there is: {', '.join(KINDS)}")
        directory = home / ZONE
        if (directory / AUTHORITY_FILE).exists():
            raise ConflictError(f"{directory} has the keys of a zone already", hint="space zone ls shows it")
        sealing = X25519PrivateKey.generate()
        identity = ZoneIdentity(zone, name, kind, sealing.public_key().public_bytes_raw())
        authority = _new_authority(identity, now)
        write_file(directory / SEALING_FILE, _sealing_bytes(sealing), 0o600)
        _issue(authority, identity, directory / CERTIFICATE_FILE, now)
        write_file(directory / AUTHORITY_FILE, authority.pem(), 0o600)  # last: without it there are no keys
        return cls(directory, authority, sealing)

    @classmethod
    def load(cls, home: Path) -> ZoneKeys:
        """The keys in a data directory.

        Raises:
            NotFoundError: there are none, or a part is missing.
            RefusedError: others can read them.
            CorruptionError: they are damaged.
            StorageError: they cannot be read.
        """
        directory = home / ZONE
        _refuse_readable(directory)
        sealing = _load_key(directory / SEALING_FILE)
        if not isinstance(sealing, X25519PrivateKey):
            raise _damaged(directory / SEALING_FILE, "not an X25519 key")
        return cls(directory, _load_signing(directory / AUTHORITY_FILE), sealing)

    # --- the nodes of a zone ---------------------------------------------------------------------

    def bundle(self) -> dict[str, bytes]:
        """The private keys another node of this zone needs, in PEM; ``next`` only while the zone is rolled over."""
        found = {"authority": self._signing.pem(), "sealing": _sealing_bytes(self.sealing)}
        if self.rolling:
            found["next"] = self._following().pem()
        return found

    @classmethod
    def adopt(cls, home: Path, known: ZoneAuthority, bundle: object, *, now: datetime) -> ZoneKeys:
        """Keeps the keys another node gave, with certificates of its own, in place of those there are.

        Args:
            home: the data directory.
            known: what the log says of the zone: nothing else is taken.
            bundle: what :meth:`bundle` returned there.
            now: the time.

        Raises:
            UsageError: those are not the keys the log speaks of.
            StorageError: they cannot be written.
        """
        given = _Given.parse(bundle)
        if not given.fits(known):
            raise UsageError("keys that are not those of this zone", hint="is that node behind the others?")
        directory = home / ZONE
        write_file(directory / SEALING_FILE, _sealing_bytes(given.sealing), 0o600)
        if given.following is not None:
            _issue(given.following, known.identity, directory / NEXT / CERTIFICATE_FILE, now)
            write_file(directory / NEXT / AUTHORITY_FILE, given.following.pem(), 0o600)
        else:
            shutil.rmtree(directory / NEXT, ignore_errors=True)  # of a rollover that ended elsewhere
        _issue(given.authority, known.identity, directory / CERTIFICATE_FILE, now)
        write_file(directory / AUTHORITY_FILE, given.authority.pem(), 0o600)  # last, as in create
        return cls(directory, given.authority, given.sealing)

    def _following(self) -> _Signing:
        return _load_signing(self._directory / NEXT / AUTHORITY_FILE)

    def is_next(self, known: ZoneAuthority) -> bool:
        """Whether the log says that the rollover these keys are in is over."""
        return self.rolling and known.fingerprints == [_fingerprint(self._following().certificate)]

    def agree(self, known: ZoneAuthority) -> bool:
        """Whether these are the keys the log speaks of, with the next authority if it names one."""
        ours = self.authority.fingerprints[0]
        return ours in known.fingerprints and (
            known.fingerprints[0] == ours
            or (self.rolling and known.fingerprints[0] == _fingerprint(self._following().certificate))
        )

    def renew(self, *, now: datetime) -> None:
        """Gives the zone a new certificate of the same authority; the other zones notice nothing.

        Raises:
            StorageError: it cannot be written.
        """
        _issue(self._signing, self.identity, self._directory / CERTIFICATE_FILE, now)

    # --- another authority -----------------------------------------------------------------------

    @property
    def rolling(self) -> bool:
        """Whether the zone is on its way to another authority."""
        return (self._directory / NEXT / AUTHORITY_FILE).exists()

    def begin_rollover(self, *, now: datetime) -> None:
        """Makes the next authority, and a certificate of it; going on with one that was begun changes nothing.

        Raises:
            StorageError: they cannot be written.
        """
        if self.rolling:
            return
        following = _new_authority(self.identity, now)
        _issue(following, self.identity, self._directory / NEXT / CERTIFICATE_FILE, now)
        write_file(self._directory / NEXT / AUTHORITY_FILE, following.pem(), 0o600)

    def offer(self) -> tuple[bytes, bytes]:
        """What other zones are to trust, in PEM, and the signature of the authority they know."""
        pem = self.authority.pem
        if self.rolling:
            pem = certificate_bytes(self._following().certificate) + pem
        return pem, self._signing.key.sign(_OFFER + pem, ec.ECDSA(hashes.SHA256()))

    def finish_rollover(self) -> ZoneKeys:
        """Shows the certificate of the next authority from now on, and signs with it.

        Raises:
            StorageError: the files cannot be moved.
        """
        following = self._directory / NEXT
        try:
            # First what is shown: the other zones trust both, and a stop in between is gone on from by repeating it.
            if (following / CERTIFICATE_FILE).exists():
                (following / CERTIFICATE_FILE).replace(self._directory / CERTIFICATE_FILE)
            (following / AUTHORITY_FILE).replace(self._directory / AUTHORITY_FILE)
            following.rmdir()
        except OSError as error:
            raise StorageError(f"cannot move the keys in {following}: {error.strerror}") from None
        return ZoneKeys.load(self._directory.parent)

    # --- connections -----------------------------------------------------------------------------

    def client_context(self, authority: ZoneAuthority) -> ssl.SSLContext:
        """For connections to one zone: whoever answers there has a certificate of its authority."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, authority)

    def server_context(self) -> ssl.SSLContext:
        """For connections of other zones; :meth:`trust` says which."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, None)
        context.num_tickets = 0  # a resumed session would not show its certificate again
        return context

    def reload(self, context: ssl.SSLContext) -> None:
        """Lets connections made from now on be shown the certificate there is now."""
        context.load_cert_chain(self._directory / CERTIFICATE_FILE)

    def _context(self, protocol: int, authority: ZoneAuthority | None) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.check_hostname = False  # a zone is whom its authority says, not where it is
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if authority is not None:
            trust(context, authority)
        try:
            self.reload(context)
        except (OSError, ssl.SSLError) as error:
            raise _damaged(self._directory / CERTIFICATE_FILE, str(error)) from None
        return context


@attrs.frozen
class _Given:
    """Keys from another node, parsed."""

    authority: _Signing
    sealing: X25519PrivateKey
    following: _Signing | None

    @classmethod
    def parse(cls, bundle: object) -> _Given:
        """What :meth:`ZoneKeys.bundle` made.

        Raises:
            UsageError: it is nothing of the kind.
        """
        if not isinstance(bundle, dict):
            raise UsageError("not the keys of a zone")
        try:
            sealing = serialization.load_pem_private_key(_pem(bundle.get("sealing")), password=None)
            authority = _signing(_pem(bundle.get("authority")))
            following = _signing(_pem(bundle["next"])) if "next" in bundle else None
        except (ValueError, TypeError):
            raise UsageError("not the keys of a zone") from None
        if not isinstance(sealing, X25519PrivateKey):
            raise UsageError("not the sealing key of a zone")
        return cls(authority, sealing, following)

    def fits(self, known: ZoneAuthority) -> bool:
        """Whether these are the keys the log speaks of."""
        newest, *older = known.fingerprints
        ours = _fingerprint(self.authority.certificate)
        following = None if self.following is None else _fingerprint(self.following.certificate)
        wanted = ours == newest or (ours in older and following == newest)
        return wanted and self.sealing.public_key().public_bytes_raw() == known.identity.sealing_key


def _pem(text: object) -> bytes:
    if not isinstance(text, bytes) or len(text) > AUTHORITY_BYTES_MAX:
        raise UsageError("not the keys of a zone")
    return text


def settle(
    home: Path, known: ZoneAuthority, ask: Callable[[], Iterable[object]], *, now: datetime
) -> ZoneKeys:
    """The keys the log speaks of, on a node of a cluster: those that are here, or the other nodes', which are kept.

    Args:
        home: the data directory.
        known: what the log says of the zone.
        ask: asks the other nodes for their :meth:`ZoneKeys.bundle`, if they have to be asked.
        now: the time.

    Raises:
        RefusedError: the keys here are another zone's, or others can read them.
        UnavailableError: no node that has them answers.
        CorruptionError, StorageError: they cannot be read, or not be written.
    """
    try:
        keys = ZoneKeys.load(home)
    except NotFoundError:
        keys = None
    if keys is not None and keys.identity.id != known.identity.id:
        raise RefusedError(
            f"the keys in {home / ZONE} are of another zone than {known.identity.name}",
            hint="put back those of this store",
        )
    if keys is not None and keys.is_next(known):
        return keys.finish_rollover()
    if keys is not None and keys.agree(known):
        return keys
    for bundle in ask():
        with contextlib.suppress(UsageError):
            return ZoneKeys.adopt(home, known, bundle, now=now)
    raise UnavailableError(
        f"the keys of zone {known.identity.name} are not on this node, and no other node gives them",
        hint=f"start the node that has them, or copy its {ZONE}/ into {home}",
    )


def trust(context: ssl.SSLContext, authority: ZoneAuthority) -> None:
    """Lets handshakes from now on succeed with whom ``authority`` signed for; see :func:`proves` for who that is."""
    context.load_verify_locations(cadata=authority.pem.decode("ascii"))


def check_name(name: str) -> None:
    """Refuses what policies could not name.

    Raises:
        UsageError: not the name of a zone.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"not the name of a zone: {name!r:.80}",
            hint="lower-case letters, digits, dots, dashes and underscores, at most 63",
        )


def _new_authority(identity: ZoneIdentity, now: datetime) -> _Signing:
    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own for each: chains are built by names, and both are trusted for a while.
    number = x509.random_serial_number() % 10**8
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"zone {identity.name[:40]} {number}")])
    certificate = (
        builder(name, name, key.public_key(), key.public_key(), now, timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs=True), critical=True)
        .add_extension(_names(identity), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Signing(certificate, key)


def _issue(authority: _Signing, identity: ZoneIdentity, path: Path, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    shown = ZoneIdentity(identity.id, identity.name)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"zone {identity.name[:59]}")])
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer = authority.certificate
    lifetime = min(timedelta(days=CERTIFICATE_DAYS), issuer.not_valid_after_utc - now)
    certificate = (
        builder(name, issuer.subject, key.public_key(), authority.key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(_names(shown), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    write_file(path, key_bytes(key) + certificate_bytes(certificate), 0o600)


def _names(identity: ZoneIdentity) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])


def _sealing_bytes(key: X25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_signing(path: Path) -> _Signing:
    try:
        return _signing(_read(path))
    except (ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from None


def _signing(pem: bytes) -> _Signing:
    """An authority with its private key.

    Raises:
        ValueError, TypeError: it is none.
    """
    key = serialization.load_pem_private_key(pem, password=None)
    certificate = x509.load_pem_x509_certificate(pem)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError("the key is not the certificate's")
    return _Signing(certificate, key)


def _fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()


def _load_key(path: Path) -> object:
    try:
        return serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, why: str) -> CorruptionError:
    return CorruptionError(
        f"{path} is damaged: {why:.120}", segment=path.name, hint="restore it from a copy of the zone's keys"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"no keys of a zone: {path} is missing", hint="space zone init NAME") from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from None


def _refuse_readable(directory: Path) -> None:
    for name in (AUTHORITY_FILE, CERTIFICATE_FILE, SEALING_FILE):
        path = directory / name
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mode & 0o077:
                raise RefusedError(
                    f"others can read {path}", hint=f"chmod 600 {path}, or roll over if they have"
                )
