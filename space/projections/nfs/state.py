"""What clients hold on files: opens, locks and delegations, and what that means for everybody else; no I/O.

Everything here is in memory and ends with the server; clients claim it again in the grace period (RFC 8881 §8.4.2).
Time is an argument, in seconds of a clock that only goes forward.

Rules:

* State is of a client and a file.  A file is what is stored: two exports that show one file share its locks.
* Nothing is taken from a client whose lease runs.  One whose lease has ended (a *courtesy* client) keeps what it
  has until somebody wants what that stands in the way of; then it loses everything at once, and durably, before
  the other one is answered: or it could claim it again after a restart.
* What a courtesy client has of delegations goes one by one, for that they can be lost is their nature.
* A delegation is wanted back before anything is done that its holder must not miss.  Until it is back whoever
  asked is told to come again (NFS4ERR_DELAY); one lease after the recall it is *revoked*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from space.events.ids import CapsuleId
from space.projections.nfs import delegations, handles, opens
from space.projections.nfs.compound import ANONYMOUS, CURRENT, READ_BYPASS, Compound, NfsError, Stateid
from space.projections.nfs.delegations import Answer, Circumstances, Delegation, Question, Report
from space.projections.nfs.locks import Range, RangeLocks, TooManyRangesError, Waiters
from space.projections.nfs.nfs4 import DelegationType, NfsStatus, SequenceFlag, Share, Want, WhyNone
from space.projections.nfs.opens import Mode
from space.projections.nfs.sessions import Client
from space.projections.nfs.stateids import H, Held, Stateids

if TYPE_CHECKING:
    from space.projections.nfs.exports import Node
    from space.projections.nfs.service import Service

HELD_PER_CLIENT_MAX: Final = 65536
"""Most opens, lock owners and delegations of one client: about 30 MiB; the Linux client opens fewer files."""

DELEGATIONS_PER_CLIENT_MAX: Final = 8192
"""Revoked ones count until they are freed; the Linux client returns some by itself from 5000 on."""

RECALL_RETRY_SECONDS: Final = 1.0
"""Who waits for a delegation comes back many times a second; a client that refused need not hear of each time."""

REPORT_SECONDS: Final = 1.0
"""How long an answer to CB_GETATTR is waited for; then the delegation is recalled instead."""

CONTENDED_MAX: Final = 4096
"""Files remembered because a delegation was recalled or given back a short while ago."""

FileKey: TypeAlias = "CapsuleId | Node"
LockOwner = tuple[Client, bytes]


@attrs.define(eq=False, kw_only=True)
class Open(Held):
    """A file open for an open-owner: ``modes`` are the ways it was opened and not downgraded from."""

    owner: bytes
    modes: frozenset[Mode] = frozenset()
    mode: Mode = opens.NOTHING
    locks: dict[bytes, Lock] = attrs.field(factory=dict)

    def set(self, modes: frozenset[Mode]) -> None:
        """How it is open from now on; in no way at all once it is closed."""
        before = self.mode
        self.modes, self.mode = modes, opens.union(modes)
        self.file.denials += bool(self.mode.deny) - bool(before.deny)


@attrs.define(eq=False, kw_only=True)
class Lock(Held):
    """The locks of a lock-owner on a file, had through an open."""

    owner: bytes
    open: Open


@attrs.define(eq=False)
class File:
    """What is held on one file; ``denials`` counts the opens that deny others something."""

    node: Node
    opens: dict[tuple[Client, bytes], Open] = attrs.field(factory=dict)
    denials: int = 0
    delegations: dict[Client, Delegation] = attrs.field(factory=dict)
    lock_owners: dict[LockOwner, Lock] = attrs.field(factory=dict)
    locks: RangeLocks[LockOwner] = attrs.field(factory=RangeLocks)
    waiters: Waiters[LockOwner, Node] = attrs.field(factory=Waiters)

    def opened_by(self, client: Client, *, others: bool) -> int:
        """Union of what a client, or everybody else, has it open for."""
        access = 0
        for each in self.opens.values():
            if (each.client is client) is not others:
                access |= each.mode.access
        return access

    def claimed_by(self, client: Client) -> bool:
        """Whether a client has it open or delegated: then nobody else has a delegation that this conflicts with."""
        return client in self.delegations or bool(self.opened_by(client, others=False))


@attrs.define(eq=False)
class Holdings:
    """What one client holds, by stateid."""

    held: dict[bytes, Held] = attrs.field(factory=dict)
    delegations: int = 0
    revoked: set[bytes] = attrs.field(factory=set)


def file_key(node: Node) -> FileKey:
    """What tells files apart: the capsule, and for a past moment also which moment."""
    return node if node.export.files.immutable else node.id


def client_of(ctx: Compound) -> Client:
    """Who calls; only operations after SEQUENCE come here."""
    assert ctx.client is not None
    return ctx.client


def _current(ctx: Compound, stateid: Stateid) -> Stateid:
    """A stateid, or what the current one stands for (RFC 8881 §16.2.3.1.2)."""
    if stateid != CURRENT:
        return stateid
    if ctx.stateid is None:
        raise NfsError(NfsStatus.BAD_STATEID)
    return ctx.stateid


def gone(client: Client, now: float) -> bool:
    """Whether a client's lease has ended."""
    return client.courtesy or client.expiry <= now


class State:
    """Everything clients hold on the files of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stateids = Stateids(service.epoch)
        self._files: dict[FileKey, File] = {}
        self._clients: dict[Client, Holdings] = {}
        self._contended: dict[FileKey, float] = {}
        self._recalled: set[Delegation] = set()
        self._questions: set[Delegation] = set()
        self._delegated = 0

    # --- what others ask -------------------------------------------------------------------------

    def has_state(self, client: Client) -> bool:
        """Whether a client holds anything."""
        return client in self._clients

    def open_count(self, node: Node) -> int:
        """How often a file is open."""
        file = self._files.get(file_key(node))
        return len(file.opens) if file else 0

    def sequence_flags(self, client: Client) -> SequenceFlag:
        """What SEQUENCE must tell a client of its state."""
        holdings = self._clients.get(client)
        revoked = holdings is not None and holdings.revoked
        return SequenceFlag.RECALLABLE_STATE_REVOKED if revoked else SequenceFlag(0)

    def release_client(self, client: Client) -> None:
        """Takes everything from a client: it is gone, or has started anew."""
        holdings = self._clients.get(client)
        for held in list(holdings.held.values()) if holdings else ():
            if isinstance(held, Open):
                self.close(held)
            elif isinstance(held, Delegation):
                self.forget_delegation(held)

    def expire(self, client: Client) -> None:
        """Ends a courtesy client because somebody wants what it holds."""
        self._service.expire_client(client)
        assert client not in self._clients

    def check_io(self, ctx: Compound, node: Node, stateid: Stateid, write: bool) -> bool:
        """Whether the holder of a stateid may read or write a file (RFC 8881 §9.1.2).

        True if it was opened (or delegated) for that: permission was checked then, and POSIX lets a file that is open
        be written whatever has become of its mode.  False for a special stateid: nobody has checked anything.

        Raises:
            NfsError: BAD_STATEID and its like; OPENMODE: it was not opened for that; LOCKED: others denied it;
                GRACE; DELAY: a delegation has to come back first.
        """
        if stateid in {ANONYMOUS, READ_BYPASS}:
            self._check_anonymous(ctx, node, write=write, bypass=stateid == READ_BYPASS and not write)
            return False
        held = self.resolve(ctx, stateid)
        if held.file is not self._files.get(file_key(node)):
            raise NfsError(NfsStatus.BAD_STATEID)
        if isinstance(held, Delegation):
            allowed = held.write or not write
        else:
            # One who may write may read what it is about to change a part of (§18.22.3 leaves that to the server).
            opened = held.open if isinstance(held, Lock) else held
            assert isinstance(opened, Open)
            allowed = not write or bool(opened.mode.access & Share.WRITE)
        if not allowed:
            raise NfsError(NfsStatus.OPENMODE)
        return True

    def _check_anonymous(self, ctx: Compound, node: Node, *, write: bool, bypass: bool) -> None:
        """``bypass``: reading whatever others deny."""
        if self._service.in_grace(ctx.now) and not bypass:
            raise NfsError(NfsStatus.GRACE)
        file = self._files.get(file_key(node))
        if file is None:
            return
        wanted = Mode(Share.WRITE if write else Share.READ, Share.NONE)
        if not bypass:
            self._yield_share(
                file, ctx.now, wanted, lambda each: each.mode.conflicts(wanted), NfsStatus.LOCKED
            )
        self._recall_conflicting(file, client_of(ctx), ctx.now, write=write)

    def before_change(self, ctx: Compound, node: Node) -> None:
        """To be called before a file is changed, or one of its names: nobody else may hold a delegation of it.

        Raises:
            NfsError: DELAY: a delegation has to come back first; GRACE: somebody may still claim one.
        """
        client = client_of(ctx)
        file = self._files.get(file_key(node))
        if file is not None:
            self._recall_conflicting(file, client, ctx.now, write=True)
        if self._service.in_grace(ctx.now) and not (file is not None and file.claimed_by(client)):
            raise NfsError(NfsStatus.GRACE)

    def before_read(self, ctx: Compound, node: Node) -> None:
        """To be called before something is said of a file that only the holder of a write delegation knows.

        Raises:
            NfsError: DELAY: a delegation has to come back first.
        """
        file = self._files.get(file_key(node))
        if file is not None:
            self._recall_conflicting(file, client_of(ctx), ctx.now, write=False)

    def is_delegated(self, capsule: bytes) -> bool:
        """Whether anybody has a delegation of a file; may be asked on any thread."""
        file = self._files.get(CapsuleId(capsule)) if self._delegated and capsule else None
        return file is not None and bool(file.delegations)

    def changed_elsewhere(self, capsule: CapsuleId, now: float) -> None:
        """Somebody has changed a file through another view: delegations of it are wanted back."""
        file = self._files.get(capsule)
        if file is not None:
            for each in list(file.delegations.values()):
                self._recall(each, now)

    def delegated_for_writing(self, node: Node, client: Client | None) -> Delegation | None:
        """Another client's write delegation: only its holder knows how large the file is."""
        file = self._files.get(file_key(node)) if self._delegated else None
        for each in file.delegations.values() if file else ():
            if each.write and each.client is not client:
                return each
        return None

    async def ask(self, held: Delegation, now: float) -> Report | None:
        """What the holder of a write delegation has made of the file; None: nothing yet (RFC 8881 §10.4.3).

        Raises:
            NfsError: DELAY: it does not say, and the delegation is wanted back.
        """
        if held.recalled is None and not gone(held.client, now):
            question = held.question or self._ask(held, now)
            await question.answered.wait()
            if question.report is not None:
                return question.report if question.report.change != held.change else None
        if held.file.delegations.get(held.client) is held and self._recall(held, now):
            raise NfsError(NfsStatus.DELAY)
        return None

    def _ask(self, held: Delegation, now: float) -> Question:
        question = held.question = Question(self._service.shell.event(), now + REPORT_SECONDS)
        self._questions.add(held)

        def told(found: tuple[int, int] | None) -> None:
            question.report = Report(*found) if found else None
            if held.question is question:
                self._answer(held)

        self._service.callbacks.getattr(held.client, handles.encode(held.node), told, now=now)
        return question

    def _answer(self, held: Delegation) -> None:
        """Whoever waits for a report goes on, with or without one."""
        if held.question is not None:
            held.question.answered.set()
            held.question = None
            self._questions.discard(held)

    # --- stateids ----------------------------------------------------------------------------------

    def resolve(self, ctx: Compound, stateid: Stateid) -> Held:
        """What a stateid of a request names.

        Raises:
            NfsError: nothing (BAD_STATEID, STALE_STATEID, OLD_STATEID), or nothing any more (DELEG_REVOKED).
        """
        held = self._stateids.find(client_of(ctx), _current(ctx, stateid))
        if held.revoked:
            raise NfsError(NfsStatus.DELEG_REVOKED)
        return held

    def test(self, client: Client, stateid: Stateid) -> NfsStatus:
        """Whether a stateid is good (TEST_STATEID)."""
        try:
            held = self._stateids.find(client, stateid)
        except NfsError as error:
            return error.status
        return NfsStatus.DELEG_REVOKED if held.revoked else NfsStatus.OK

    def free(self, ctx: Compound, stateid: Stateid) -> NfsStatus:
        """Forgets a stateid that stands for nothing any more (FREE_STATEID)."""
        client = client_of(ctx)
        held = self._stateids.find(client, _current(ctx, stateid))
        if isinstance(held, Delegation) and held.revoked:
            self.forget_delegation(held)
        elif isinstance(held, Lock) and not held.file.locks.held((client, held.owner)):
            self._forget_lock(held)
        else:
            return NfsStatus.LOCKS_HELD
        return NfsStatus.OK

    # --- opens -------------------------------------------------------------------------------------

    def admit(
        self, client: Client, node: Node, owner: bytes, mode: Mode, now: float, *, truncate: bool = False
    ) -> None:
        """Makes sure that an open may be; ``truncate``: it will also cut the file.

        Raises:
            NfsError: SHARE_DENIED: somebody has it open in a way that conflicts; DELAY: a delegation is recalled, or
                the client holds all it may.
        """
        self._check_room(client)
        file = self._files.get(file_key(node))
        if file is None:
            return
        mine = (client, owner)
        self._yield_share(
            file,
            now,
            mode,
            lambda each: (each.client, each.owner) != mine and each.mode.conflicts(mode),
            NfsStatus.SHARE_DENIED,
        )
        # Who reads under a delegation would not notice that reading is denied, so a denial counts like writing.
        write = truncate or bool(mode.access & Share.WRITE or mode.deny & Share.READ)
        self._recall_conflicting(file, client, now, write=write)

    def open(self, client: Client, node: Node, owner: bytes, mode: Mode, now: float) -> Open:
        """Opens a file, or opens it for more: see :meth:`admit`."""
        self.admit(client, node, owner, mode, now)
        file = self._file(node)
        found = file.opens.get((client, owner))
        if found is None:
            found = file.opens[client, owner] = self._give(Open(client, file, owner=owner))
        found.set(found.modes | {mode})
        found.changed()
        return found

    def downgrade(self, held: Open, wanted: Mode) -> Stateid:
        """Gives up a part of what a file was opened for.

        Raises:
            NfsError: INVAL: that is no union of ways it was opened.
        """
        modes = opens.downgraded(held.modes, wanted)
        if modes is None:
            raise NfsError(NfsStatus.INVAL)
        held.set(modes)
        return held.changed()

    def close(self, held: Open) -> None:
        """Ends an open, with the locks had through it (RFC 8881 §18.2.3)."""
        for lock in list(held.locks.values()):
            held.file.locks.release((held.client, lock.owner))
            self._forget_lock(lock)
        held.set(frozenset())
        del held.file.opens[held.client, held.owner]
        self._take(held)
        self._wake(held.file)
        self._leave(held.file)

    def _yield_share(
        self, file: File, now: float, wanted: Mode, conflicts: Callable[[Open], bool], status: NfsStatus
    ) -> None:
        """Ends courtesy clients whose opens are in the way.

        Raises:
            NfsError: with ``status``, if somebody's is in the way whose lease runs.
        """
        if not wanted.deny and not file.denials:
            return  # as with every client but Windows': there may be thousands of opens to ask
        blocking = [each for each in file.opens.values() if conflicts(each)]
        if any(not gone(each.client, now) for each in blocking):
            raise NfsError(status)
        for client in {each.client for each in blocking}:
            self.expire(client)

    # --- locks -------------------------------------------------------------------------------------

    def lock_owner(self, held: Open, owner: bytes) -> Lock:
        """The locks of an owner on an open file; there may be none yet."""
        file, client = held.file, held.client
        found = file.lock_owners.get((client, owner))
        if found is None:
            self._check_room(client)
            found = file.lock_owners[client, owner] = self._give(Lock(client, file, owner=owner, open=held))
            held.locks[owner] = found
        return found

    def lock_conflict(
        self, node: Node, owner: LockOwner, wanted: Range, now: float
    ) -> tuple[LockOwner, Range] | None:
        """A lock that is in the way of a new one; those of courtesy clients are not."""
        file = self._files.get(file_key(node))
        while file is not None and (found := file.locks.conflict(owner, wanted)):
            (client, _), _ = found
            if not gone(client, now):
                return found
            self.expire(client)
        return None

    def lock(self, held: Lock, wanted: Range) -> Stateid:
        """Gives a lock that nothing is in the way of.

        Raises:
            NfsError: LOCK_RANGE: the owner has too many; to come again would not help.
        """
        owner = held.client, held.owner
        try:
            held.file.locks.lock(owner, wanted)
        except TooManyRangesError:
            raise NfsError(NfsStatus.LOCK_RANGE) from None
        held.file.waiters.discard(owner)
        self._wake(held.file)  # a lock for writing may have become one for reading
        return held.changed()

    def unlock(self, held: Lock, start: int, end: int) -> Stateid:
        """Takes an owner's locks off a range: see :meth:`lock`."""
        try:
            held.file.locks.unlock((held.client, held.owner), start, end)
        except TooManyRangesError:
            raise NfsError(NfsStatus.LOCK_RANGE) from None
        self._wake(held.file)
        return held.changed()

    def wait(self, node: Node, owner: LockOwner, wanted: Range) -> None:
        """Will tell an owner when a lock it was denied could be had."""
        file = self._files.get(file_key(node))
        if file is not None:
            file.waiters.add(owner, wanted, node)

    def _wake(self, file: File) -> None:
        for (client, owner), node in file.waiters.take_free(file.locks):
            if client in self._clients:
                self._service.callbacks.notify_lock(client, handles.encode(node), owner)

    def _forget_lock(self, held: Lock) -> None:
        del held.file.lock_owners[held.client, held.owner]
        del held.open.locks[held.owner]
        self._take(held)

    # --- delegations -------------------------------------------------------------------------------

    def offer(
        self, client: Client, node: Node, access: int, want: Want, now: float, *, created: bool = False
    ) -> Delegation | WhyNone | None:
        """Gives a delegation with an open if that is wanted, safe, and worth it; None: none, and nobody asked why."""
        self._check_alive(client)
        if want == Want.NO_PREFERENCE and created:
            return None  # it will be written, closed, and given its final name and mode: not worth a recall or return
        file = self._file(node)
        mine = file.delegations.get(client)
        answer: Answer = delegations.decide(
            access,
            want,
            Circumstances(
                others=file.opened_by(client, others=True),
                others_delegated=any(
                    each.write or access & Share.WRITE for each in file.delegations.values()
                ),
                mine=mine.type if mine else None,
                reachable=self._service.config.delegations and self._service.callbacks.reachable(client),
                room=self._delegations_room(client),
                contended=self._contended.get(file_key(node), now) > now,
                read_only=node.export.read_only or node.export.files.read_only,
            ),
        )
        if isinstance(answer, WhyNone):
            self._leave(file)
            return None if want == Want.NO_PREFERENCE else answer
        return self.delegate(client, node, write=answer == DelegationType.WRITE)

    def delegate(self, client: Client, node: Node, *, write: bool) -> Delegation:
        """Gives a delegation, or what the client has of it already."""
        self._check_alive(client)
        file = self._file(node)
        given = file.delegations.get(client)
        if given is None:
            change = node.export.files.attributes(node.id).change if write else 0
            given = self._give(Delegation(client, file, node=node, write=write, change=change))
            given.changed()
            file.delegations[client] = given
            self._clients[client].delegations += 1
            self._delegated += 1
        return given

    def may_reclaim_delegation(self, client: Client, node: Node, *, write: bool) -> bool:
        """Whether nobody has claimed what cannot be together with a delegation held before a restart."""
        file = self._files.get(file_key(node))
        if file is None:
            return True
        rivals = [each for each in file.delegations.values() if each.client is not client]
        others = file.opened_by(client, others=True) & (Share.BOTH if write else Share.WRITE)
        return not others and not any(write or each.write for each in rivals)

    def want_back(self, held: Delegation, now: float) -> None:
        """Wants a delegation back that the client is told of with an answer, which says so; later it is also asked."""
        held.recalled = now
        held.ask_after = now + RECALL_RETRY_SECONDS
        self._recalled.add(held)

    def return_delegation(self, held: Delegation, now: float) -> None:
        """A client gives a delegation back; where it was not asked to, it was in the client's own way (§10.4.1)."""
        self._contend(held.node, now)
        self.forget_delegation(held)

    def forget_delegation(self, held: Delegation) -> None:
        """A delegation is no more, revoked or not."""
        self._clients[held.client].delegations -= 1
        if not held.revoked:
            self._drop_delegation(held)
        self._take(held)
        self._leave(held.file)

    def recall_failed(self, client: Client, stateid: Stateid, now: float) -> None:
        """A client could not be asked for a delegation, or did not know it: it is asked again, but not at once."""
        held = self._stateids.get(stateid.other)
        if isinstance(held, Delegation):
            held.ask_after = now + RECALL_RETRY_SECONDS

    def tick(self, now: float) -> None:
        """Revokes delegations that were not returned in time, and gives up questions that were not answered."""
        for each in list(self._questions):
            if each.question is not None and each.question.deadline <= now:
                self._answer(each)
        for each in list(self._recalled):
            if each in self._recalled:
                self._recall(each, now)

    def _recall_conflicting(self, file: File, client: Client, now: float, *, write: bool) -> None:
        """Wants delegations of others back that somebody's reading or writing is not to be hidden from.

        Raises:
            NfsError: DELAY, as long as there is one.
        """
        waiting = False
        for each in list(file.delegations.values()):
            if each.client is not client and (write or each.write) and not each.revoked:
                waiting = self._recall(each, now) or waiting
        if waiting:
            raise NfsError(NfsStatus.DELAY)

    def _recall(self, held: Delegation, now: float) -> bool:
        """Wants a delegation back: whether it has to be waited for."""
        if gone(held.client, now):
            self._service.forget_claims(held.client)
            self._revoke(held)
            return False
        if held.recalled is None:
            held.recalled = now
            self._recalled.add(held)
            self._contend(held.node, now)
        elif now - held.recalled >= self._service.config.lease_seconds:
            self._revoke(held)
            return False
        if now >= held.ask_after:
            held.ask_after = math.inf
            handle = handles.encode(held.node)
            self._service.callbacks.recall(held.client, held.stateid, handle, truncate=False, now=now)
        return True

    def _revoke(self, held: Delegation) -> None:
        """Takes a delegation that was not returned in time; its stateid stays until the client frees it."""
        held.revoked = True
        self._drop_delegation(held)
        self._clients[held.client].revoked.add(held.other)
        self._leave(held.file)

    def _drop_delegation(self, held: Delegation) -> None:
        del held.file.delegations[held.client]
        self._recalled.discard(held)
        self._delegated -= 1
        self._answer(held)

    def _contend(self, node: Node, now: float) -> None:
        """For a while nobody gets a delegation of this file who does not ask for one."""
        key = file_key(node)
        self._contended.pop(key, None)
        if len(self._contended) >= CONTENDED_MAX:
            del self._contended[next(iter(self._contended))]
        self._contended[key] = now + self._service.config.lease_seconds

    def _delegations_room(self, client: Client) -> bool:
        holdings = self._clients.get(client)
        return holdings is None or (
            holdings.delegations < DELEGATIONS_PER_CLIENT_MAX and len(holdings.held) < HELD_PER_CLIENT_MAX
        )

    # --- bookkeeping -------------------------------------------------------------------------------

    def file(self, node: Node) -> File | None:
        """What is held on a file, if anything is."""
        return self._files.get(file_key(node))

    def _file(self, node: Node) -> File:
        key = file_key(node)
        found = self._files.get(key)
        if found is None:
            found = self._files[key] = File(node)
            node.export.files.hold(node.id)
        return found

    def _leave(self, file: File) -> None:
        """Forgets a file nobody holds anything on."""
        if not file.opens and not file.delegations and file_key(file.node) in self._files:
            del self._files[file_key(file.node)]
            file.node.export.files.drop(file.node.id)

    def _check_alive(self, client: Client) -> None:
        """A client that was forgotten while its request was at work holds nothing any more, and gets nothing."""
        if self._service.clients.get(client.id) is not client:
            raise NfsError(NfsStatus.STALE_CLIENTID)

    def _check_room(self, client: Client) -> None:
        self._check_alive(client)
        holdings = self._clients.get(client)
        if holdings is not None and len(holdings.held) >= HELD_PER_CLIENT_MAX:
            raise NfsError(NfsStatus.DELAY)

    def _give(self, held: H) -> H:
        self._stateids.name(held)
        self._clients.setdefault(held.client, Holdings()).held[held.other] = held
        return held

    def _take(self, held: Held) -> None:
        self._stateids.forget(held)
        holdings = self._clients[held.client]
        del holdings.held[held.other]
        holdings.revoked.discard(held.other)
        if not holdings.held:
            del self._clients[held.client]
