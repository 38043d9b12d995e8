"""Moving the home of single capsules to a zone that has them, in agreement with it, and taking back what it declined.

The zone is asked first whether all of them are there.  Then their homes are given away in one entry of this log
(:class:`space.events.commands.GiveHomes`), and nothing here changes them any more; the zone takes them when the stream
has brought it everything before that (:mod:`space.statemachine.handover`).  Whoever waits for it asks the zone; whoever
does not finds it done.  If it cannot be done (the stream stands, the zone gave a replica another key), they can be
taken back: the zone declines to take them from then on, and says which it had taken before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from space._errors import NotFoundError, RefusedError, UnavailableError
from space._node.caller import Document
from space._node.federation_keys import ZoneAuthority
from space._node.federation_promote import ASKED_MAX
from space._node.federation_zones import ask
from space.events import commands as cmd
from space.events.ids import ROOT, CapsuleId
from space.events.types import Kind
from space.federation.exchange import HOMES
from space.federation.scope import Scope
from space.federation.sealing import is_for_home
from space.federation.selection import Selection
from space.statemachine import zones as rows
from space.statemachine.handover import GIVEN_MAX
from space.statemachine.tables import KEY, U32, Overlay, Reader

if TYPE_CHECKING:
    from space._node.federation_zones import Zone, Zones
    from space._node.store import Store

WAIT_SECONDS: Final = 60.0
"""How long the zone may take to get what is left and take the homes, before that is called unfinished."""

ASK_EVERY_SECONDS: Final = 0.1


class Residence(IntEnum):
    """How a capsule of another zone is here."""

    ABSENT = 0
    """Not here, or not all of it, or not to be opened here."""
    REPLICA = 1
    HOME = 2


Given = Mapping[bytes, int]
"""Capsules, each with the position of this log at which its home was given away; 0 if it was not."""

Ask = Callable[[Given, int], list[Residence]]
"""Asks the zone how capsules are there; before it answers it declines what was given away up to a position."""


def hand_over(
    store: Store,
    zones: Zones,
    capsule: str | CapsuleId,
    name: str,
    *,
    actor: str | None = None,
    noted: Sequence[cmd.Command] = (),
) -> Document:
    """:meth:`move`, where something ships, and to its end.

    Raises:
        UnavailableError: nothing ships here; or the zone has not taken the homes after a minute.
        SpaceError: as :meth:`move`.
    """
    if store.federation is None and store.nodes is None:
        raise UnavailableError(
            "nothing ships to other zones in this process", hint="start it: space federation serve"
        )
    done = move(store, zones, capsule, name, actor=actor, noted=noted)
    if not done.pop("taken"):
        raise UnavailableError(
            f"zone {name} gets {done['capsules']} capsules, and has not taken their home after {WAIT_SECONDS:.0f} s",
            hint=f"it does when the rest has come there; or take them back: space zone take-back {name}",
        )
    return done


def move(
    store: Store,
    zones: Zones,
    capsule: str | CapsuleId,
    name: str,
    *,
    actor: str | None = None,
    noted: Sequence[cmd.Command] = (),
    wait_seconds: float = WAIT_SECONDS,
    asked: Ask | None = None,
) -> Document:
    """Gives the home of a capsule, or a directory with all that is in it, to a zone, and waits until it took it.

    Args:
        actor: on whose behalf.
        noted: what the log is to say in the same batch.
        wait_seconds: how long to wait; 0 does not.
        asked: how the zone is asked; over the network.

    Returns:
        ``capsules``, how many; ``position``, at which their home was given away; ``taken``, whether the zone has it.

    Raises:
        NotFoundError: there is no such zone or capsule.
        RefusedError: policies do not let all of them be there, or they are in third zones too.
        UnavailableError: the zone does not answer, or has not all of them.
    """
    zone = zones.find(name)
    ask_there = asked or asking(zones, zone)
    top = bytes(store.resolve(capsule))
    with store._read() as txn:
        capsules = _below(txn, zones, zone, top)
    for each, residence in _answers(ask_there, dict.fromkeys(capsules, 0), 0):
        if residence is Residence.ABSENT:
            raise UnavailableError(
                f"capsule {CapsuleId(each)} is not in zone {name} yet, or cannot be opened there",
                hint="space federation status shows what is on its way",
            )
    give = cmd.GiveHomes(zone.id, capsules)
    receipt = store.execute(cmd.Together([*noted, give]) if noted else give, actor=actor)
    return {
        "zone": name,
        "capsules": len(capsules),
        "position": receipt.position,
        "taken": _taken(ask_there, dict.fromkeys(capsules, receipt.position), wait_seconds),
    }


def _below(txn: Reader, zones: Zones, zone: Zone, top: bytes) -> list[bytes]:
    """A capsule and all that is in it, each of which has to be allowed to go."""
    own = zones.own()
    if own is None:
        raise NotFoundError("this store belongs to no zone yet", hint="space zone init NAME")
    selection = Selection(zone.name)
    scope = Scope(txn, selection, own.id)
    row = scope.state.capsule(top)
    if row is None or top == ROOT:
        raise NotFoundError(f"no capsule {CapsuleId(top)} that could move")
    below = scope.below(top) if row.kind == Kind.DIRECTORY else ()
    found = list(dict.fromkeys((top, *(child for _, child in below))))
    if len(found) > GIVEN_MAX:
        raise RefusedError(
            f"{len(found)} capsules are in that directory, and {GIVEN_MAX} can move at a time",
            hint="move what is in it first",
        )
    others = {each.name for each in zones.others()} - {zone.name}
    for capsule in found:
        _check(scope, selection, zone, capsule, others)
    return found


def _check(scope: Scope, selection: Selection, zone: Zone, capsule: bytes, others: set[str]) -> None:
    row = scope.state.capsule(capsule)
    if row is None or scope.moved(capsule):
        return  # which is decided, and said, where all else is
    third = sorted(others.intersection(selection.policy(scope.state, row.policy).federation_targets))
    if third:
        raise RefusedError(
            f"the policy of capsule {CapsuleId(capsule)} lets zone {third[0]} have it as well, which would follow the "
            f"wrong zone",
            hint=f"take {third[0]} out of its federation.targets, and put it back in zone {zone.name}",
        )
    if scope.lane(capsule) is not None and not selection.sealed(scope.state, row.policy):
        return
    raise RefusedError(
        f"the policy of capsule {CapsuleId(capsule)} does not let zone {zone.name} hold it, or not read it",
        hint="its home has to be among federation.targets, without federation.sealed",
    )


def asking(zones: Zones, zone: Zone) -> Ask:
    """Asks over the network."""

    def ask_zone(given: Given, declined: int) -> list[Residence]:
        question = {
            "capsules": [[each.hex(), position] for each, position in given.items()],
            "declined": declined,
        }
        answer = ask(zone.url, zones.keys(), ZoneAuthority.parse(zone.authorities), "POST", HOMES, question)
        return parse_residences(answer, len(given))

    return ask_zone


def parse_residences(document: Document, count: int) -> list[Residence]:
    """What another zone answered about so many capsules.

    Raises:
        UnavailableError: it is nothing of the kind.
    """
    found = document.get("capsules")
    if not isinstance(found, list) or len(found) != count or not all(type(each) is int for each in found):
        raise UnavailableError("the zone answers something else than was asked", hint="is it newer?")
    try:
        return [Residence(each) for each in found]
    except ValueError:
        raise UnavailableError("the zone answers what is not known here", hint="is it newer?") from None


def _answers(ask_there: Ask, given: Given, declined: int) -> Iterator[tuple[bytes, Residence]]:
    rest = list(given.items())
    for at in range(0, len(rest), ASKED_MAX):
        some = dict(rest[at : at + ASKED_MAX])
        yield from zip(some, ask_there(some, declined), strict=True)


def _taken(ask_there: Ask, given: Given, wait_seconds: float) -> bool:
    """Waits until the zone has taken all homes; False if that takes too long, or it cannot be asked."""
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            if all(residence is Residence.HOME for _, residence in _answers(ask_there, given, 0)):
                return True
        except UnavailableError:
            pass  # it may be back before the time is over
        if time.monotonic() >= deadline:
            return False
        time.sleep(ASK_EVERY_SECONDS)


# --- back ------------------------------------------------------------------------------------------


def take_back(store: Store, zones: Zones, name: str, *, asked: Ask | None = None) -> Document:
    """Takes back every home that was given to a zone and that it has not taken; it declines them first.

    Returns:
        ``capsules``, how many have their home here again, and ``taken``, how many the zone had taken.

    Raises:
        NotFoundError: there is no such zone.
        UnavailableError: the zone does not answer: nobody knows what it has taken.
    """
    zone = zones.find(name)
    with store._read() as txn:
        found = rows.given_to(Overlay(txn), zone.id)
    position = max(found.values(), default=0)
    back = [
        capsule
        for capsule, residence in _answers(asked or asking(zones, zone), found, position)
        if residence is not Residence.HOME
    ]
    for at in range(0, len(back), GIVEN_MAX):
        store.execute(cmd.KeepHomes(zone.id, back[at : at + GIVEN_MAX], position))
    return {"zone": name, "capsules": len(back), "taken": len(found) - len(back)}


# --- as the other zone sees it ---------------------------------------------------------------------


def residences(store: Store, zone: bytes, given: Sequence[tuple[bytes, int]]) -> list[Residence]:
    """How some capsules of another zone are here; it gave away the home of each at the position, if that is not 0."""
    with store._read() as txn:
        state = Overlay(txn)
        return [_residence(state, zone, *each) for each in given]


def _residence(state: Overlay, zone: bytes, capsule: bytes, given: int) -> Residence:
    row = state.capsule(capsule)
    if row is None:  # purged: what had its home here is what the zone was sent
        return Residence.HOME if rows.sent_as_of(state, zone, capsule) else Residence.ABSENT
    home, of = rows.home_row(state, capsule), rows.home_of(state, capsule, row)
    if of is None or (home is not None and home.zone == zone and 0 < given <= home.came):
        return Residence.HOME  # or it was, and was given away again
    if row.deleted or of != zone or (home is not None and home.copy):
        return Residence.ABSENT
    wrapped = state.get(KEY, U32.pack(row.key) + U32.pack(1)) if row.key else None
    return Residence.ABSENT if wrapped is not None and is_for_home(wrapped) else Residence.REPLICA
