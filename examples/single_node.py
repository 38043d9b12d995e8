"""Put, get, the same bytes at a past moment, and the events behind them: one node, no server, no root."""

from __future__ import annotations

import tempfile

import space


def main() -> None:
    """Run in a throw-away data directory."""
    with tempfile.TemporaryDirectory() as data, space.open(data) as store:
        capsule = store.put(b"hello", name="/hello.txt")
        assert store.get(capsule.id) == b"hello"
        past = store.at(f"@{capsule.position}")
        store.put(b"another", name="/another.txt")
        assert past.get(capsule.id) == b"hello"
        for event in store.log(capsule=capsule.id):
            print(event)


if __name__ == "__main__":
    main()
