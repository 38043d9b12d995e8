from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import msgpack
import pytest

from space._errors import NotFoundError, PolicyFileError, UsageError
from space.policy.model import (
    DEFAULT_POLICY,
    POLICY_BYTES_MAX,
    Compression,
    Durability,
    Encryption,
    Policy,
    Sovereignty,
    load_policy,
    parse_policy,
)

EVERY_KEY = """\
# a cold archive, kept twice
compression: zstd:19
dedupe: no
encryption: aes-256-gcm
transform: [strip-exif, redact.v2]
rpo: 30s
latency_target: 5ms
sovereignty: global
federation:
  targets:
    - paris
    - oslo-2
  priority: 7
history: 30d
durability: buffered
block_size: 512
"""
EVERY_VALUE = Policy(
    compression=Compression.ZSTD,
    compression_level=19,
    dedupe=False,
    encryption=Encryption.AES_256_GCM,
    transform=("strip-exif", "redact.v2"),
    rpo_ns=30_000_000_000,
    latency_target_ns=5_000_000,
    sovereignty=Sovereignty.GLOBAL,
    federation_targets=("paris", "oslo-2"),
    federation_priority=7,
    history_ns=30 * 86_400 * 1_000_000_000,
    durability=Durability.BUFFERED,
    block_size=512,
)


def test_every_key_is_read() -> None:
    """A document with every key gives the policy with every value."""
    assert parse_policy(EVERY_KEY) == EVERY_VALUE
    assert parse_policy(EVERY_KEY.encode()) == EVERY_VALUE


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}", "\ufeff", b"\xef\xbb\xbf"])
def test_empty_document_is_the_default(text: str | bytes) -> None:
    """A document without keys is the default policy."""
    assert parse_policy(text) == DEFAULT_POLICY


def test_defaults_are_the_documented_ones() -> None:
    """The canonical document of the default policy has every key, in the documented spelling."""
    assert DEFAULT_POLICY.to_document() == {
        "compression": "auto",
        "dedupe": True,
        "encryption": "none",
        "transform": [],
        "rpo": None,
        "latency_target": None,
        "sovereignty": "zone",
        "federation": {"targets": [], "priority": 0},
        "history": "all",
        "durability": "durable",
        "block_size": 4096,
    }


@pytest.mark.parametrize("policy", [DEFAULT_POLICY, EVERY_VALUE, Policy(history_ns=0), Policy(rpo_ns=None)])
def test_document_round_trip(policy: Policy) -> None:
    """A policy survives its document, and the document survives msgpack."""
    document = policy.to_document()
    assert Policy.from_document(msgpack.unpackb(msgpack.packb(document))) == policy


def test_sealed_is_in_the_document_only_where_it_is_true() -> None:
    """Documents of before the key are canonical still, and the key survives its document."""
    sealed = parse_policy(
        "encryption: aes-256-gcm\nsovereignty: global\nfederation: {targets: [a], sealed: true}"
    )
    assert sealed.to_document()["federation"] == {"targets": ["a"], "priority": 0, "sealed": True}
    assert Policy.from_document(sealed.to_document()) == sealed
    assert "sealed" not in attrs.evolve(sealed, federation_sealed=False).to_document()["federation"]


def test_dedupe_has_to_be_asked_for_with_encryption() -> None:
    """Plain content is deduplicated by default, encrypted content only when the document says so."""
    assert parse_policy("compression: none").dedupe
    assert not parse_policy("encryption: aes-256-gcm").dedupe
    assert not parse_policy("encryption: aes-256-xts").dedupe
    assert parse_policy("encryption: aes-256-gcm\ndedupe: true").dedupe


@pytest.mark.parametrize(
    "text, history_ns", [("all", None), ("none", 0), ("0s", 0), ("1h", 3_600_000_000_000)]
)
def test_history(text: str, history_ns: int | None) -> None:
    """History is for ever, not at all, or a time."""
    assert parse_policy(f"history: {text}").history_ns == history_ns


BAD = [
    # document, line, parts of the message
    ("compresion: zstd", 1, "compresion: unknown key; did you mean compression?"),
    ("\n\nDedupe: true", 3, "Dedupe: unknown key; did you mean dedupe?"),
    ("colour: blue", 1, "colour: unknown key"),
    ("1: 2", 1, "1: unknown key"),
    ("<<: {dedupe: true}", 1, "<<: unknown key"),
    ("dedupe: true\nhistory: all\ndedupe: false", 3, "dedupe: given twice; first on line 1"),
    ("federation:\n  targets: [a]\n  targets: [b]", 3, "federation.targets: given twice; first on line 2"),
    ("compression: gzip", 1, "must be one of auto, none, lz4, zstd, brotli, not 'gzip'"),
    ("compression: zstandard", 1, "not 'zstandard'; did you mean zstd?"),
    ("compression: zstd:23", 1, "zstd has levels 1 to 22, not 23"),
    ("compression: zstd:0", 1, "zstd has levels 1 to 22, not 0"),
    ("compression: lz4:13", 1, "lz4 has levels 1 to 12"),
    ("compression: brotli:12", 1, "brotli has levels 0 to 11"),
    ("compression: zstd:fast", 1, "the level must be a number"),
    ("compression: zstd:-5", 1, "the level must be a number"),
    ("compression: 'zstd:'", 1, "the level must be a number"),
    ("compression: auto:3", 1, "auto takes no level"),
    ("compression: none:3", 1, "none takes no level"),
    ("compression: true", 1, "compression: must be text, not true"),
    ("compression: [zstd]", 1, "compression: must be text, not a list"),
    ("dedupe: 1", 1, "dedupe: must be true or false, not 1"),
    ("dedupe: 'true'", 1, "dedupe: must be true or false, not 'true'"),
    ("\nencryption: aes", 2, "must be one of none, aes-256-gcm, aes-256-xts, not 'aes'"),
    ("encryption: no", 1, "encryption: must be text, not false"),
    ("encryption:", 1, "encryption: has no value"),
    ("encryption: ~", 1, "encryption: has no value"),
    ("encryption: null", 1, "encryption: has no value"),
    ("encryption: aes-256-xts\ndedupe: true", 2, "aes-256-xts frames cannot be deduplicated"),
    ("transform: strip", 1, "transform: must be a list of names"),
    ("transform: [a, B C]", 1, "transform.1: 'B C' is not a name"),
    ("transform:\n- ok\n- 5", 3, "transform.1: 5 is not a name"),
    ("transform:\n- ok\n- ../x", 3, "transform.1: '../x' is not a name"),
    ("transform: [" + "a," * 65 + "]", 1, "holds 65 names; 64 at most"),
    ("rpo: 30", 1, "rpo: '30' has no unit"),
    ("history:\n  30", 1, "history: '30' has no unit"),
    ("rpo: 30 parsecs", 1, "rpo: '30 parsecs' is not a duration"),
    ("rpo: 1:30", 1, "rpo: '1:30' is not a duration"),
    ("rpo: 30s", 1, "rpo: means nothing without federation.targets"),
    ("federation: {sealed: true}", 1, "federation.sealed: means nothing without federation.targets"),
    (
        "sovereignty: global\nfederation: {targets: [a], sealed: true}",
        2,
        "federation.sealed: needs encryption",
    ),
    ("federation:\n  sealed: 1", 2, "federation.sealed: must be true or false, not 1"),
    ("latency_target: 0s", 1, "latency_target: must be more than 0"),
    ("latency_target: -1ms", 1, "is not a duration"),
    ("latency_target: 1e400", 1, "is not a duration"),
    ("latency_target: {a: 1s}", 1, "latency_target: must be text, not a mapping"),
    ("sovereignty: europe", 1, "must be one of local, zone, global"),
    ("sovereignty: local\nfederation:\n  targets: [paris]", 3, "need sovereignty: global; local content"),
    ("history: all\nfederation: {targets: [paris]}", 2, "need sovereignty: global; zone content"),
    ("federation: [paris]", 1, "federation: must be a mapping with targets and priority, not a list"),
    ("federation: paris", 1, "federation: must be a mapping"),
    (
        "sovereignty: global\nfederation:\n  target: [a]",
        3,
        "federation.target: unknown key; did you mean targets?",
    ),
    ("federation:\n  targets: paris", 2, "federation.targets: must be a list of names"),
    ("sovereignty: global\nfederation:\n  targets:\n  - a\n  - b\n  - a", 6, "zone a is listed twice"),
    (
        "sovereignty: zone\nfederation: {candidates: [a]}",
        2,
        "federation.candidates: need sovereignty: global",
    ),
    (
        "sovereignty: global\nfederation:\n  targets: [a]\n  candidates: [b, a]",
        4,
        "federation.candidates: zone a is a target already",
    ),
    ("federation:\n  shards: 4", 2, "federation.shards: must be a mapping with data and parity, not 4"),
    ("federation:\n  shards: {data: 4}", 2, "federation.shards: lacks parity"),
    ("federation:\n  shards:\n    data: 1\n    parity: 1", 3, "data: must be a whole number from 2 to 31"),
    ("federation:\n  shards:\n    data: 30\n    parity: 3", 4, "parity: must be a whole number from 1 to 2"),
    ("federation:\n  shards:\n    data: 2\n    parity: 0", 4, "parity: must be a whole number from 1 to 30"),
    ("federation:\n  shards:\n    data: 2\n    extra: 0", 4, "federation.shards.extra: unknown key"),
    (
        "sovereignty: global\nfederation:\n  targets: [a, b, c, d]\n  shards: {data: 2, parity: 1}",
        4,
        "federation.shards: data: 2 and parity: 1 need 3 targets, or 2 and this zone, and there are 4",
    ),
    (
        "sovereignty: global\nrpo: 1s\nfederation: {targets: [a, b, c], shards: {data: 2, parity: 1}}",
        2,
        "rpo: means nothing with federation.shards",
    ),
    (
        "sovereignty: global\nfederation:\n  targets: [a, b]\n  candidates: [c]\n  shards: {data: 2, parity: 1}",
        4,
        "federation.candidates: mean nothing with federation.shards",
    ),
    ("federation:\n  priority: high", 2, "federation.priority: must be a whole number from 0 to 100"),
    ("federation:\n  priority: 101", 2, "from 0 to 100, not 101"),
    ("federation:\n  priority: -1", 2, "from 0 to 100, not -1"),
    ("federation:\n  priority: 1.5", 2, "from 0 to 100, not '1.5'"),
    ("federation:\n  priority: true", 2, "from 0 to 100, not true"),
    ("federation:\n  priority: 5", 2, "means nothing without federation.targets"),
    ("federation:\n  priority: " + "9" * 5000, 2, "federation.priority: must be a whole number"),
    ("history: 30 days", 1, "history: '30 days' is not a duration"),
    ("history: [all]", 1, "history: must be text, not a list"),
    ("durability: fsync", 1, "must be one of buffered, durable, not 'fsync'"),
    ("block_size: 1024", 1, "block_size: must be 512 or 4096, not 1024"),
    ("block_size: 4KiB", 1, "block_size: must be 512 or 4096, not '4KiB'"),
    ("block_size: 0x200", 1, "block_size: must be 512 or 4096, not '0x200'"),
    ("- dedupe", 1, "a policy is a mapping of keys to values, not a list"),
    ("just text", 1, "a policy is a mapping of keys to values, not 'just text'"),
    ("? [a, b]\n: 1", 1, "a key must be plain text"),
    ("dedupe: true\n? {a: b}\n: 1", 2, "a key must be plain text"),
    # not YAML, or more than a policy needs of it
    ("dedupe: true\n\tcompression: zstd", 2, "not valid YAML"),
    ("dedupe: 'true", 1, "not valid YAML"),
    ("transform: [a, b", 1, "not valid YAML"),
    ("a: b: c", 1, "not valid YAML"),
    ("dedupe: true\nhistory: @all", 2, "not valid YAML"),
    ("dedupe: true\n---\ndedupe: false", 2, "a second document"),
    ("history: &h all", 1, "anchors and aliases are not allowed"),
    ("\nhistory: *h", 2, "anchors and aliases are not allowed"),
    ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", 1, "anchors and aliases are not allowed"),
    ("dedupe: true\nhistory: !!python/object/apply:os.system [id]", 2, "tags are not allowed"),
    ("history: !!str all", 1, "tags are not allowed"),
    ("transform: " + "[" * 50_000, 1, "nested deeper than 4 levels"),
    ("{" * 50_000, 1, "nested deeper than 4 levels"),
    ("- " * 20_000, 1, "nested deeper than 4 levels"),
    ("dedupe: true\nhistory: a\0ll", 2, "U+0000 is not allowed"),
    ("dedupe: true\n\x1b[31m", 2, "U+001B is not allowed"),
    (b"dedupe: true\nhistory: \xff", 2, "byte 0xff is not UTF-8"),
    ("dedupe: true\nhistory: \udcff", 2, "is not UTF-8"),
    ("#" * (POLICY_BYTES_MAX + 1), 1, "longer than 65536 bytes"),
]


@pytest.mark.parametrize("text, line, message", BAD, ids=[f"{n}-{row[2][:30]}" for n, row in enumerate(BAD)])
def test_bad_document_names_line_and_reason(text: str | bytes, line: int, message: str) -> None:
    """Each wrong document is refused with file, line, key and reason, on one line."""
    with pytest.raises(PolicyFileError) as caught:
        parse_policy(text, source="archive.yaml")
    shown = str(caught.value)
    assert shown.startswith(f"archive.yaml:{line}: ")
    assert message in shown
    assert "\n" not in shown
    assert len(shown) < 400


@pytest.mark.parametrize(
    "document, message",
    [
        ({"compression": 5}, "policy: compression: must be text, not 5"),
        ({"colour": "blue"}, "policy: colour: unknown key"),
        ({5: "blue"}, "policy: 5: unknown key"),
        ({"federation": {"targets": ["a"]}}, "policy: federation.targets: need sovereignty: global"),
        ({"history": None}, "policy: history: must be text, not nothing"),
        ({"block_size": True}, "policy: block_size: must be 512 or 4096, not true"),
        ([], "policy: a policy is a mapping"),
        (None, "policy: a policy is a mapping"),
    ],
)
def test_bad_stored_document_is_a_usage_error(document: Any, message: str) -> None:
    """A document that is no policy is refused with the key at fault, wherever it comes from."""
    with pytest.raises(UsageError, match=message):
        Policy.from_document(document)


@pytest.mark.parametrize(
    "values",
    [
        {"encryption": Encryption.AES_256_XTS, "dedupe": True},
        {"compression_level": 3},
        {"federation_priority": 1},
        {"federation_targets": ("a",)},
        {"rpo_ns": 1},
        {"block_size": 1000},
    ],
)
def test_contradiction_is_refused_in_code_too(values: dict[str, Any]) -> None:
    """No way to make a policy gets round what must hold together, evolving one included."""
    with pytest.raises(UsageError):
        Policy(**values)
    with pytest.raises(UsageError):
        attrs.evolve(DEFAULT_POLICY, **values)


def test_policy_is_a_value() -> None:
    """Equal policies are equal keys, and none can be changed."""
    assert {parse_policy(EVERY_KEY): 1}[EVERY_VALUE] == 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        DEFAULT_POLICY.dedupe = False  # type: ignore[misc]


def test_load_policy(tmp_path: Path) -> None:
    """A policy file is read with its name in messages; no file and a directory are clear errors."""
    path = tmp_path / "p.yaml"
    path.write_text(EVERY_KEY)
    assert load_policy(path) == EVERY_VALUE
    path.write_text("\nx: 1")
    with pytest.raises(PolicyFileError, match=r"p\.yaml:2: x: unknown key"):
        load_policy(str(path))
    with pytest.raises(NotFoundError, match="does not exist"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(PolicyFileError, match="cannot be read"):
        load_policy(tmp_path)


def test_endless_file_is_refused() -> None:
    """A file without end is not read to its end."""
    with pytest.raises(PolicyFileError, match="longer than"):
        load_policy("/dev/zero")
