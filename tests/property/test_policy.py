from __future__ import annotations

import contextlib

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from space._errors import PolicyFileError, UsageError
from space.policy.model import (
    DEFAULT_POLICY,
    LEVELS,
    Compression,
    Durability,
    Encryption,
    Policy,
    Shards,
    Sovereignty,
    parse_policy,
)
from space.policy.units import VALUE_MAX, format_duration, format_size, parse_duration, parse_size

KEYS = [*DEFAULT_POLICY.to_document(), "targets", "priority", "shards", "data", "parity", "candidates", "x"]
VALUES = ["auto", "zstd:3", "none", "all", "30s", "true", "512", "zone", "global"]
MARKS = [
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "-",
    "?",
    "&a",
    "*a",
    "!!str",
    "'",
    '"',
    "|",
    ">",
    "#",
    "---",
    "...",
    "%",
    "<<",
]
WORDS = st.sampled_from([*KEYS, *VALUES, *MARKS, "\n", "  ", "\t", "\0", "\x85", "\u2028"])
LINES = st.lists(st.tuples(st.sampled_from(KEYS), st.lists(WORDS, max_size=4).map(" ".join)), max_size=6).map(
    lambda rows: "".join(f"{key}: {value}\n" for key, value in rows)
)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True)
DURATIONS = st.integers(1, VALUE_MAX)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy there can be."""
    compression = draw(st.sampled_from(Compression))
    encryption = draw(st.sampled_from(Encryption))
    zones = tuple(draw(st.lists(NAMES, max_size=5, unique=True)))
    targets = zones[: draw(st.integers(0, len(zones)))]
    shards = None
    if len(targets) >= 2 and draw(st.booleans()):
        total = max(3, len(targets) + draw(st.integers(0, 1)))
        parity = draw(st.integers(1, total - 2))
        shards = Shards(total - parity, parity)
    candidates = () if shards else zones[len(targets) :]
    return Policy(
        compression=compression,
        compression_level=draw(st.none() | st.sampled_from(LEVELS[compression]))
        if compression in LEVELS
        else None,
        encryption=encryption,
        dedupe=encryption is not Encryption.AES_256_XTS and draw(st.booleans()),
        transform=tuple(draw(st.lists(NAMES, max_size=3))),
        rpo_ns=draw(st.none() | DURATIONS) if targets and not shards else None,
        latency_target_ns=draw(st.none() | DURATIONS),
        sovereignty=Sovereignty.GLOBAL if targets or candidates else draw(st.sampled_from(Sovereignty)),
        federation_targets=targets,
        federation_priority=draw(st.integers(0, 100)) if targets else 0,
        federation_candidates=candidates,
        federation_shards=shards,
        history_ns=draw(st.none() | st.integers(0, VALUE_MAX)),
        durability=draw(st.sampled_from(Durability)),
        block_size=draw(st.sampled_from([512, 4096])),
    )


@given(policies())
def test_policy_survives_document_and_yaml(policy: Policy) -> None:
    """Every policy is what its document says, and what a YAML file with that document says."""
    document = policy.to_document()
    assert Policy.from_document(document) == policy
    given_keys = {key: value for key, value in document.items() if value is not None}
    assert parse_policy(yaml.safe_dump(given_keys)) == policy


@given(st.text(max_size=300) | st.lists(WORDS, max_size=30).map("".join) | LINES | st.binary(max_size=200))
@example("a: &a [*a]")
@example("? ? ? ? ? ? a")
@example("%YAML 9.9\n---\n")
@example("\ud800")
def test_any_text_is_a_policy_or_one_error(text: str | bytes) -> None:
    """Any text gives a policy that round-trips, or one error with a line number in the file."""
    try:
        policy = parse_policy(text, source="f")
    except PolicyFileError as error:
        line = str(error).split(":", 2)[1]
        content = text if isinstance(text, str) else text.decode("utf-8", "replace")
        assert 1 <= int(line) <= len(content.splitlines()) + 1
    else:
        assert Policy.from_document(policy.to_document()) == policy


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_document_is_a_policy_or_one_error(document: dict[str, object]) -> None:
    """Any plain document gives a policy or a usage error."""
    with contextlib.suppress(UsageError):
        assert isinstance(Policy.from_document(document), Policy)


@given(st.integers(0, VALUE_MAX))
def test_durations_survive(duration_ns: int) -> None:
    """Formatting a duration loses nothing."""
    assert parse_duration(format_duration(duration_ns)) == duration_ns


@given(st.integers(0, VALUE_MAX))
def test_sizes_survive_to_a_digit(size_bytes: int) -> None:
    """A formatted size is within one part in a thousand, or 0.05 of its unit, of what it stands for."""
    number, unit = format_size(size_bytes).split(" ")
    unit_bytes = parse_size(f"1{unit}")
    assert abs(float(number) * unit_bytes - size_bytes) <= 0.051 * unit_bytes


@given(st.text(max_size=80))
def test_any_text_is_a_quantity_or_one_error(text: str) -> None:
    """Any text is a size or duration in range, or a usage error."""
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(UsageError):
            assert 0 <= parse(text) <= VALUE_MAX
