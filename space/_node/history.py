"""Tables at a position: checkpoints, recovery and past moments, all by one road.

``build`` makes tables that stand at any moment of the log: it copies the nearest sealed checkpoint before
it and folds the log from there.  Recovery after a crash, ``--at`` and verification are all this.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import attrs

from space._errors import CorruptionError, NotFoundError
from space._node.views import start_time
from space.events.ids import AtTime, Moment
from space.projections.contract import View
from space.projections.feed import Progress, fold
from space.statemachine.store import (
    STATE_VERSION,
    STATE_VIEW,
    Applied,
    Layout,
    Store,
    copy_sealed,
    read_seal,
)
from space.statemachine.tables import TABLES
from space.wal.log import Log

LIVE: Final = "state"
CHECKPOINTS: Final = "checkpoints"
SCRATCH: Final = "scratch"
CHECKPOINTS_KEPT: Final = 8
_PAST: Final = re.compile(r"past-(\d{1,10})-(\d{1,20})-[0-9a-f]+")

OnProgress = Callable[[Progress], None]


@attrs.frozen
class Target:
    """A moment as the log counts: after batch ``position``, or after event ``event`` of it."""

    position: int
    event: int | None = None


def layout_of(views: Sequence[View]) -> Layout:
    """Tables of the state and of all views."""
    return Layout(
        {STATE_VIEW: TABLES, **{view.name: view.tables for view in views}},
        {STATE_VIEW: STATE_VERSION, **{view.name: view.version for view in views}},
    )


def locate(log: Log, moment: Moment, last: int | None = None) -> Target:
    """Where in the log a moment is; ``last`` is where the log ends for readers, if not at its end.

    Raises:
        NotFoundError: the log does not reach it, or begins after it.
    """
    last = log.last_index if last is None else last
    if isinstance(moment, AtTime):
        position = min(log.index_at_time(moment.time_ns), last)
        if position < max(1, log.first_index):
            raise NotFoundError(f"nothing was stored yet at {moment}")
        return Target(position)
    if not 1 <= moment.position <= last:
        raise NotFoundError(f"no position {moment}", hint=f"the log holds @1 to @{last}")
    return Target(moment.position, moment.event)


def fits(log: Log, applied: Applied) -> bool:
    """Whether tables at ``applied`` belong to this log: the chain says so."""
    if applied.position == 0:
        return True
    if not log.first_index <= applied.position <= log.last_index:
        return False
    return log.read(applied.position).chain == applied.chain


def checkpoints(home: Path) -> list[Path]:
    """Checkpoint directories, newest first; not yet judged."""
    try:
        names = [name for name in os.listdir(home / CHECKPOINTS) if name.isdecimal()]
    except FileNotFoundError:
        return []
    return [home / CHECKPOINTS / name for name in sorted(names, key=int, reverse=True)]


def write_checkpoint(home: Path, tables: Store) -> Path | None:
    """A sealed copy of the tables as they are now; the caller made the log durable up to there."""
    position = tables.applied.position
    if position == 0 or _checkpoint_path(home, position).exists():
        return None
    partial = home / SCRATCH / f"checkpoint-{uuid.uuid4().hex}"
    try:
        partial.parent.mkdir(exist_ok=True)
        target = _checkpoint_path(home, tables.copy_to(partial).position)  # others may have written meanwhile
        if target.exists():
            shutil.rmtree(partial)
            return None
        target.parent.mkdir(exist_ok=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _thin(home)
    return target


def _checkpoint_path(home: Path, position: int) -> Path:
    return home / CHECKPOINTS / f"{position:020d}"


def _thin(home: Path) -> None:
    """Keeps the newest checkpoints dense and older ones ever sparser."""
    kept = checkpoints(home)
    while len(kept) > CHECKPOINTS_KEPT:
        spans = [(int(kept[i - 1].name) - int(kept[i + 1].name), i) for i in range(2, len(kept) - 1)]
        victim = min(spans)[1] if spans else len(kept) - 1
        shutil.rmtree(kept.pop(victim), ignore_errors=True)


def past_directory(home: Path) -> Path:
    """A new name in ``scratch/`` for tables of a past moment; it says which process they belong to."""
    pid = os.getpid()
    return home / SCRATCH / f"past-{pid}-{start_time(pid)}-{uuid.uuid4().hex}"


def clear_scratch(home: Path, *, owner: bool) -> None:
    """Removes what processes that have ended left behind; past moments of living ones stay.

    Only the owner of the store may judge anything else than past moments: nobody but it makes that.
    """
    with contextlib.suppress(OSError):
        for path in list((home / SCRATCH).iterdir()):
            past = _PAST.fullmatch(path.name)
            if _is_served(past) if past else not owner:
                continue
            shutil.rmtree(path, ignore_errors=True)


def _is_served(past: re.Match[str]) -> bool:
    return 0 < start_time(int(past[1])) == int(past[2])


def build(
    home: Path,
    log: Log,
    views: Sequence[View],
    path: Path,
    target: Target,
    *,
    use_checkpoints: bool = True,
    on_progress: OnProgress | None = None,
) -> Store:
    """Tables at ``path`` that stand at ``target``, from the nearest checkpoint and the log.

    Raises:
        CorruptionError: the log is damaged on the way.
    """
    last = target.position if target.event is None else target.position - 1
    tables = _nearest(home, log, views, path, last if use_checkpoints else 0)
    try:
        catch_up(tables, log, views, target, on_progress=on_progress)
    except BaseException:
        tables.close(seal=False)
        raise
    return tables


def _nearest(home: Path, log: Log, views: Sequence[View], path: Path, last: int) -> Store:
    """Tables at ``path`` as the newest checkpoint up to ``last`` has them; empty ones if there is none."""
    shutil.rmtree(path, ignore_errors=True)
    for checkpoint in checkpoints(home):
        if int(checkpoint.name) <= last:
            applied = read_seal(checkpoint, layout_of(views))
            if applied is not None and applied.position <= last and fits(log, applied):
                try:
                    copy_sealed(checkpoint, path)
                except FileNotFoundError:  # thinned meanwhile by the process that owns the store
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    break
    return Store(path, layout_of(views))


def catch_up(
    tables: Store, log: Log, views: Sequence[View], target: Target, *, on_progress: OnProgress | None = None
) -> Applied:
    """Folds the log into ``tables`` from where they stand up to ``target``.

    Raises:
        CorruptionError: the log is damaged on the way.
    """
    applied = tables.applied
    last = target.position if target.event is None else target.position - 1
    if applied.position < last:
        records = log.records(applied.position + 1, last + 1)
        applied = fold(tables, views, records, start=applied, on_progress=on_progress)
    if target.event is not None:
        records = itertools.islice(log.records(target.position, target.position + 1), 1)
        applied = fold(tables, views, records, start=applied, stop_event=target.event)
    if applied.position != target.position:
        raise CorruptionError(
            f"the log ends at position {applied.position} instead of {target.position}",
            position=applied.position,
        )
    return applied


def open_live(
    home: Path,
    log: Log,
    views: Sequence[View],
    *,
    last: int | None = None,
    until: Callable[[int, int], int] | None = None,
    on_progress: OnProgress | None = None,
) -> Store:
    """The tables of the present: as the last clean close left them, or rebuilt.

    ``last`` is the present, where it is not the end of the log; tables that are further stay so.  Where not all of the
    log may be folded up to there, ``until`` says how much, given where they stand and ``last``.

    Raises:
        CorruptionError: they have to be rebuilt and the log is damaged.
    """
    path = home / LIVE
    last = log.last_index if last is None else last
    applied = read_seal(path, layout_of(views))
    if applied is None or not fits(log, applied):
        tables = _nearest(home, log, views, path, last)
    else:
        tables = Store(path, layout_of(views))
    try:
        stand = tables.applied.position
        target = Target(last if until is None else until(stand, last))
        if stand < target.position:
            catch_up(tables, log, views, target, on_progress=on_progress)
    except BaseException:
        tables.close(seal=False)
        raise
    return tables
