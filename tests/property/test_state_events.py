"""Events and their bytes under hypothesis."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from space._errors import EventDecodeError
from space.events.codec import Entry, decode_batch, decode_event, encode_batch, encode_event
from space.events.types import Event
from tests.property.strategies import events, links

entries = st.builds(
    Entry,
    client=st.just(b"") | st.binary(min_size=16, max_size=16),
    sequence=st.integers(0, 2**63 - 1),
    time_ns=st.integers(0, 2**63 - 1),
    actor=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    events=st.lists(st.tuples(links, events), max_size=4).map(tuple),
)


@given(event=events)
def test_an_event_is_what_it_was(event: Event) -> None:
    """Encoding and decoding loses nothing, and there is one encoding."""
    encoded = encode_event(event)
    assert decode_event(encoded) == event
    assert encode_event(decode_event(encoded)) == encoded


@given(batch=st.lists(entries, max_size=4))
def test_a_batch_is_what_it_was(batch: list[Entry]) -> None:
    """The same for a batch of them."""
    encoded = encode_batch(batch)
    assert decode_batch(encoded) == batch
    assert encode_batch(decode_batch(encoded)) == encoded


@given(data=st.binary(max_size=300))
def test_any_bytes_are_an_event_or_one_error(data: bytes) -> None:
    """Decoding raises EventDecodeError and nothing else; what it accepts can be encoded."""
    with contextlib.suppress(EventDecodeError):
        encode_event(decode_event(data))
    with contextlib.suppress(EventDecodeError):
        encode_batch(decode_batch(data))


@given(batch=st.lists(entries, min_size=1, max_size=3), data=st.data())
def test_mutated_bytes_are_events_or_one_error(batch: list[Entry], data: st.DataObject) -> None:
    """Bytes changed, cut out or put in anywhere: events that can be encoded again, or EventDecodeError."""
    encoded = bytearray(encode_batch(batch))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(encoded) - 1)))
        length = data.draw(st.integers(0, 4))
        encoded[at : at + length] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(EventDecodeError):
        found = decode_batch(bytes(encoded))
        assert decode_batch(encode_batch(found)) == found
