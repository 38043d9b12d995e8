"""Names of what clients hold: stateid4 (RFC 8881 §8.2); no I/O.

The twelve opaque bytes are the boot epoch of the server and a number that is never used again in it.  So a stateid of
an earlier start is told from one that was never given out, and no stateid ever means something else than it did.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, TypeVar

import attrs

from space.projections.nfs.compound import NfsError, Stateid
from space.projections.nfs.nfs4 import OTHER_BYTES, NfsStatus

if TYPE_CHECKING:
    from space.projections.nfs.sessions import Client
    from space.projections.nfs.state import File

_OTHER: Final = struct.Struct(">IQ")
assert _OTHER.size == OTHER_BYTES
_SEQUENCES: Final = 1 << 32


@attrs.define(eq=False)
class Held:
    """Something a client holds on a file: an open, the locks of one owner, or a delegation.

    ``seqid`` grows with every change of it, from 1 when the client first hears of it; 0 never comes again (RFC 8881
    §8.2.2).
    """

    client: Client
    file: File
    other: bytes = b""
    seqid: int = 0
    revoked: bool = False

    @property
    def stateid(self) -> Stateid:
        """Its name as of now."""
        return Stateid(self.seqid, self.other)

    def changed(self) -> Stateid:
        """Its name after one more change."""
        self.seqid = (self.seqid + 1) % _SEQUENCES or 1
        return self.stateid


H = TypeVar("H", bound=Held)


class Stateids:
    """All stateids of one start of the server."""

    def __init__(self, epoch: int) -> None:
        """``epoch`` is another one at each start, and grows."""
        self._epoch = epoch & 0xFFFF_FFFF
        self._last = 0
        self._held: dict[bytes, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def name(self, held: H) -> H:
        """Gives something its name."""
        self._last += 1
        held.other = _OTHER.pack(self._epoch, self._last)
        self._held[held.other] = held
        return held

    def forget(self, held: Held) -> None:
        """The name means nothing any more."""
        del self._held[held.other]

    def get(self, other: bytes) -> Held | None:
        """What has that name, whoever's it is."""
        return self._held.get(other)

    def find(self, client: Client, stateid: Stateid) -> Held:
        """What a stateid names, revoked or not.

        Raises:
            NfsError: STALE_STATEID: it is from before a restart; BAD_STATEID: it never was, is no more, or is
                somebody else's; OLD_STATEID: it has changed since.
        """
        held = self._held.get(stateid.other)
        if held is None or held.client is not client:
            raise NfsError(self._unknown(stateid.other))
        if stateid.seqid not in {0, held.seqid}:
            behind = (held.seqid - stateid.seqid) % _SEQUENCES < _SEQUENCES // 2
            raise NfsError(NfsStatus.OLD_STATEID if behind else NfsStatus.BAD_STATEID)
        return held

    def _unknown(self, other: bytes) -> NfsStatus:
        epoch, number = _OTHER.unpack(other)
        earlier = 0 < epoch < self._epoch and number
        return NfsStatus.STALE_STATEID if earlier else NfsStatus.BAD_STATEID
