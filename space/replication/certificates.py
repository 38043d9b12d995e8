"""Who is who between nodes: a certificate authority of the cluster's own, and mutual TLS with it.

An identity is a URI in the subject alternative names (RFC 5280 §4.2.1.6): ``space://<cluster>/node/<id>`` for a
node, ``space://<cluster>/client/<name>`` for an operator's program, where the cluster is a UUID.  Host names are
not checked: a node is whom its certificate says, wherever it runs, and what it says in its introduction has to
agree with it.  Only TLS 1.3 (RFC 8446), both sides show a certificate.

A directory of credentials holds ``ca.pem``, ``node.pem`` and ``node.key``.  To roll over without a pause, replace
them and call :meth:`Tls.reload`: connections that are open stay, new ones use the new files.  To roll over the
authority, let ``ca.pem`` hold both, old and new, until every node has a certificate of the new one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import ssl
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from space._errors import (
    ConflictError,
    CorruptionError,
    NotFoundError,
    RefusedError,
    StorageError,
    UsageError,
)
from space.replication.wire import Reason, WireError

AUTHORITY_FILE: Final = "ca.pem"
AUTHORITY_KEY_FILE: Final = "ca.key"
CERTIFICATE_FILE: Final = "node.pem"
KEY_FILE: Final = "node.key"

AUTHORITY_DAYS: Final = 3650
"""A cluster outlives its hardware; replacing the authority is the one step that touches every node."""
CERTIFICATE_DAYS: Final = 730
"""Long enough that a missed rollover shows as a warning first, short enough that a lost key ends."""
WARNING_DAYS: Final = 30
NODE_MAX: Final = (1 << 63) - 1
_SKEW: Final = timedelta(hours=1)  # clocks of nodes differ; a certificate is to be valid at once everywhere
_CLIENT_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_IDENTITY: Final = re.compile(
    r"space://([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:/(?:node/([1-9][0-9]{0,18})|client/([A-Za-z0-9._-]{1,64})))?"
)


@attrs.frozen
class Identity:
    """Whom a certificate is for.

    Attributes:
        cluster: id of the cluster, 16 bytes.
        node: number of the node, 0 if it is none.
        client: name of the operator's program, empty if it is none.
    """

    cluster: bytes
    node: int = 0
    client: str = ""

    def __str__(self) -> str:
        role = f"/node/{self.node}" if self.node else f"/client/{self.client}" if self.client else ""
        return f"space://{uuid.UUID(bytes=self.cluster)}{role}"

    @classmethod
    def parse(cls, uri: str) -> Identity | None:
        """The identity a URI stands for, if it is one."""
        match = _IDENTITY.fullmatch(uri)
        if match is None:
            return None
        return cls(uuid.UUID(match[1]).bytes, int(match[2] or 0), match[3] or "")


# --- making them -----------------------------------------------------------------------------------


def create_authority(directory: Path, cluster: bytes, *, now: datetime) -> None:
    """Makes the authority of a cluster: ``ca.pem``, and ``ca.key`` that only its owner can read.

    Raises:
        ConflictError: there is one already.
        StorageError: the files cannot be written.
    """
    if (directory / AUTHORITY_KEY_FILE).exists():
        raise ConflictError(
            f"{directory} has a certificate authority already", hint="its nodes trust that one"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"space cluster {uuid.UUID(bytes=cluster)}")])
    certificate = (
        builder(name, name, key.public_key(), key.public_key(), now, timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs=True), critical=True)
        .add_extension(_names(Identity(cluster), ()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_file(directory / AUTHORITY_KEY_FILE, key_bytes(key), 0o600)
    write_file(directory / AUTHORITY_FILE, certificate_bytes(certificate), 0o644)


def issue(authority: Path, directory: Path, node: int, hosts: Iterable[str], *, now: datetime) -> None:
    """Writes ``ca.pem``, ``node.pem`` and ``node.key`` of a node to ``directory``, replacing older ones.

    ``hosts`` are names and addresses of the node; they are in the certificate for other programs to check.

    Raises:
        UsageError: the number of the node is out of its range.
        NotFoundError, CorruptionError: there is no authority in ``authority``, or it cannot be read.
        StorageError: the files cannot be written.
    """
    if not 0 < node <= NODE_MAX:
        raise UsageError(f"the number of a node is 1 to {NODE_MAX}, not {node}")
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    _issue(authority, directory, lambda cluster: Identity(cluster, node=node), hosts, uses, now)


def issue_client(authority: Path, directory: Path, name: str, *, now: datetime) -> None:
    """Writes the same files for an operator's program: it may ask nodes, and never be taken for one.

    Raises:
        UsageError: the name is not 1 to 64 letters, digits, dots, dashes and underscores.
        NotFoundError, CorruptionError: there is no authority in ``authority``, or it cannot be read.
        StorageError: the files cannot be written.
    """
    if not _CLIENT_NAME.fullmatch(name):
        raise UsageError(f"not the name of a client: {name!r:.80}", hint="letters, digits, dots and dashes")
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    _issue(authority, directory, lambda cluster: Identity(cluster, client=name), (), uses, now)


def _issue(
    authority: Path,
    directory: Path,
    identity_in: Callable[[bytes], Identity],
    hosts: Iterable[str],
    uses: list[x509.ObjectIdentifier],
    now: datetime,
) -> None:
    issuer, issuer_key = _load_authority(authority)
    identity = identity_in(_certificate_identity(issuer).cluster)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(identity)[-64:])])
    lifetime = min(timedelta(days=CERTIFICATE_DAYS), issuer.not_valid_after_utc - now)
    certificate = (
        builder(name, issuer.subject, key.public_key(), issuer_key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(_names(identity, hosts), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    write_file(directory / AUTHORITY_FILE, certificate_bytes(issuer), 0o644)
    write_file(directory / KEY_FILE, key_bytes(key), 0o600)
    write_file(directory / CERTIFICATE_FILE, certificate_bytes(certificate), 0o644)


def builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    """A certificate of ``key`` that is valid from a little before ``now``, still without a role and a signature."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def key_usage(*, signs: bool) -> x509.KeyUsage:
    """What a key is for (RFC 5280 §4.2.1.3): signing certificates, or proving who one is."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _names(identity: Identity, hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(identity))]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(_host_name(host))
    return x509.SubjectAlternativeName(names)


def _host_name(host: str) -> x509.DNSName:
    try:
        return x509.DNSName(host)
    except ValueError:
        raise UsageError(f"not the name of a host: {host!r:.80}") from None


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_bytes(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replaces a file by one that was never readable to more people than it is in the end.

    Raises:
        StorageError: it cannot be written.
    """
    made = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            made.unlink()
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        made.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = _load_certificate(directory / AUTHORITY_FILE)
    path = directory / AUTHORITY_KEY_FILE
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise CorruptionError(f"{path} is not a private key: {error!s:.120}", segment=path.name) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CorruptionError(f"{path} is not the key of {AUTHORITY_FILE}", segment=path.name)
    return certificate, key


def _load_certificate(path: Path) -> x509.Certificate:
    return _load_certificates(path)[0]


def _load_certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise CorruptionError(f"{path} is not a certificate: {error!s:.120}", segment=path.name) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(
            f"{path} is missing", hint="copy it from where the authority of the cluster is"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from None


def _certificate_identity(certificate: x509.Certificate) -> Identity:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        uris = []
    return _only_identity(uris)


def _only_identity(uris: Iterable[str]) -> Identity:
    found = [identity for uri in uris if (identity := Identity.parse(uri))]
    if len(found) != 1:
        raise WireError(
            "a certificate that is not one of a cluster",
            reason=Reason.CERTIFICATE,
            hint="certificates are issued by the authority of the cluster",
        )
    return found[0]


# --- using them ------------------------------------------------------------------------------------


@attrs.frozen
class _Loaded:
    identity: Identity
    expires: datetime
    client: ssl.SSLContext
    server: ssl.SSLContext


class Tls:
    """The credentials of one node, and what both sides of a connection need of them.

    Use :meth:`load`.
    """

    def __init__(self, directory: Path, loaded: _Loaded) -> None:
        self._directory = directory
        self._loaded = loaded

    @classmethod
    def load(cls, directory: Path) -> Tls:
        """The credentials in a directory.

        Raises:
            NotFoundError: a file is missing.
            RefusedError: others than its owner can read the key.
            CorruptionError: the files are damaged or do not belong together.
            StorageError: they cannot be read.
        """
        return cls(directory, _load(directory))

    def reload(self) -> None:
        """Takes the files as they are now, for connections made from now on.

        Raises:
            SpaceError: as for :meth:`load`; what was loaded before stays in use.
        """
        self._loaded = _load(self._directory)

    @property
    def identity(self) -> Identity:
        """Whom the certificate is for."""
        return self._loaded.identity

    @property
    def expires(self) -> datetime:
        """When the certificate ends, or the last authority before it."""
        return self._loaded.expires

    @property
    def client(self) -> ssl.SSLContext:
        """For connections this node opens."""
        return self._loaded.client

    @property
    def server(self) -> ssl.SSLContext:
        """For connections that come in."""
        return self._loaded.server


def days_left(expires: datetime, *, now: datetime) -> int:
    """Whole days until a certificate ends; negative after that.  Below :data:`WARNING_DAYS`, somebody is told."""
    return (expires - now).days


def peer_identity(certificate: Mapping[str, Any] | None) -> tuple[Identity, datetime]:
    """Whom the verified certificate of a connection is for, and when it ends.

    Arguments:
        certificate: as :meth:`ssl.SSLSocket.getpeercert` gives it.

    Raises:
        WireError: it names no member of a cluster.
    """
    names = (certificate or {}).get("subjectAltName", ())
    identity = _only_identity(value for kind, value in names if kind == "URI")
    seconds = ssl.cert_time_to_seconds(str((certificate or {})["notAfter"]))
    return identity, datetime.fromtimestamp(seconds, UTC)


def _load(directory: Path) -> _Loaded:
    key = directory / KEY_FILE
    authorities = _load_certificates(directory / AUTHORITY_FILE)
    certificate = _load_certificate(directory / CERTIFICATE_FILE)
    _read(key)
    if key.stat().st_mode & 0o077:
        raise RefusedError(f"others can read {key}", hint=f"chmod 600 {key}, or issue a new one if they have")
    try:
        identity = _certificate_identity(certificate)
        contexts = [_context(directory, side) for side in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)]
    except (ssl.SSLError, WireError) as error:
        hint = "issue the certificate of the node again"
        raise CorruptionError(
            f"the certificate, key and authority in {directory} do not fit: {error}", hint=hint
        ) from None
    expires = min(certificate.not_valid_after_utc, max(each.not_valid_after_utc for each in authorities))
    return _Loaded(identity, expires, *contexts)


def _context(directory: Path, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # the identity in the certificate is checked against the introduction
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # a resumed session would not show its certificate again
    context.load_verify_locations(directory / AUTHORITY_FILE)
    context.load_cert_chain(directory / CERTIFICATE_FILE, directory / KEY_FILE)
    return context
