"""Delegations (RFC 8881 §10.2, §10.4): when to give one, and how it looks in a reply; no I/O.

A client with a read delegation may answer opens for reading by itself, because it will be asked before anybody changes
the file; one with a write delegation may do anything by itself, because nobody else has the file open.  Nobody has to
be given one: it is given where it is likely to last.  A client that asks for one by name gets it whenever it may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from space.projections.nfs.nfs4 import DelegationType, Share, Want, WhyNone
from space.projections.nfs.stateids import Held

if TYPE_CHECKING:
    from space.projections.nfs.exports import Node
    from space.projections.nfs.sessions import Event
    from space.projections.nfs.xdr import Writer

_SPACE_LIMIT_SIZE: Final = 1  # NFS_LIMIT_SIZE
_UNLIMITED: Final = (1 << 64) - 1

Answer = DelegationType | WhyNone
"""A delegation of that type, or why there is none."""


@attrs.frozen
class Report:
    """What the holder of a write delegation says of the file: its change attribute and size."""

    change: int
    size: int


@attrs.define(eq=False)
class Question:
    """CB_GETATTR under way, for all who wait for it; without an answer by ``deadline`` there will be none."""

    answered: Event
    deadline: float
    report: Report | None = None


@attrs.define(eq=False, kw_only=True)
class Delegation(Held):
    """A delegation; ``node`` is the way it was opened by, ``change`` the file's change attribute at that time.

    ``recalled`` is when it was first wanted back; ``ask_after`` is when the client may be sent the next recall: never,
    unless the last one failed.
    """

    node: Node
    write: bool
    change: int = 0
    question: Question | None = None
    recalled: float | None = None
    ask_after: float = 0.0

    @property
    def type(self) -> DelegationType:
        return DelegationType.WRITE if self.write else DelegationType.READ


@attrs.frozen(kw_only=True)
class Circumstances:
    """What is known about a file and a client when a delegation is considered.

    ``others`` is the union of what other clients have it open for; ``mine`` what the client holds already;
    ``reachable``: it can be called back; ``room``: it and everybody hold few enough; ``contended``: one was
    recalled or given back a short while ago.
    """

    others: int
    others_delegated: bool
    mine: DelegationType | None
    reachable: bool
    room: bool
    contended: bool
    read_only: bool


def decide(access: int, want: Want, at: Circumstances) -> Answer:
    """Whether to give a delegation with an open for ``access``."""
    if want == Want.NONE:
        return WhyNone.NOT_WANTED
    if want == Want.CANCEL:
        return WhyNone.CANCELLED
    write = _writes(access, want, at)
    if at.mine is not None:
        return _held_already(at.mine, write=write)
    if not (at.reachable and at.room):
        return WhyNone.RESOURCE
    if at.others & Share.WRITE or at.others_delegated:
        return WhyNone.CONTENTION
    if write and at.others:
        if want == Want.WRITE:
            return WhyNone.CONTENTION
        write = False
    if want == Want.NO_PREFERENCE and _likely_short(access, at, write=write):
        return WhyNone.CONTENTION
    return DelegationType.WRITE if write else DelegationType.READ


def _writes(access: int, want: Want, at: Circumstances) -> bool:
    """Whether it is the write delegation that is considered.

    It lets the client read too, so an open for writing alone gets none: whether reading is allowed was not asked.
    """
    wanted = want in {Want.WRITE, Want.ANY, Want.NO_PREFERENCE}
    return wanted and access == Share.BOTH and not at.read_only


def _held_already(mine: DelegationType, *, write: bool) -> WhyNone:
    if mine == DelegationType.READ and write:
        return WhyNone.NOT_SUPP_UPGRADE
    if mine == DelegationType.WRITE and not write:
        return WhyNone.NOT_SUPP_DOWNGRADE
    return WhyNone.CONTENTION


def _likely_short(access: int, at: Circumstances, *, write: bool) -> bool:
    """Whether an unasked delegation would cost a recall or a return and save nothing: the file is changing."""
    return at.contended or (bool(access & Share.WRITE) and not write)


def write_answer(out: Writer, answer: Delegation | WhyNone | None, *, recalled: bool = False) -> None:
    """open_delegation4; None: no delegation, and the client did not ask in a way that needs a reason.

    The access control entry allows nobody anything: the client asks with ACCESS, as it would anyway.
    """
    if answer is None:
        out.u32(DelegationType.NONE)
    elif isinstance(answer, WhyNone):
        out.u32(DelegationType.NONE_EXT)
        out.u32(answer)
        if answer in {WhyNone.CONTENTION, WhyNone.RESOURCE}:
            out.boolean(False)  # it will neither be pushed nor announced later
    else:
        out.u32(answer.type)
        out.u32(answer.seqid)
        out.fixed(answer.other)
        out.boolean(recalled)
        if answer.write:
            out.u32(_SPACE_LIMIT_SIZE)
            out.u64(_UNLIMITED)
        for _ in range(3):  # type ALLOW, no flags, no permissions
            out.u32(0)
        out.opaque(b"")
