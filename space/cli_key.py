"""``space key ls|rotate|destroy``: master keys and data keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from space._errors import UsageError
from space._node.caller import Document
from space.cli_session import Session, clean, formatted, note

key_app = typer.Typer(no_args_is_help=True, help="Keys of encrypted content: ls, rotate, destroy.")

NAMED_MAX = 8
"""Capsules a question names."""

Sole = Annotated[
    bool,
    typer.Option("--sole", help="No other store uses the master key file: old keys are erased from it."),
]


@key_app.command("ls")
def list_(context: typer.Context) -> None:
    """List master keys and data keys: what they encrypt, what wraps them, and what became of them."""
    session: Session = context.obj
    with session.service() as service:
        found = service.keys()
    session.show(found, "\n".join(clean(line) for line in _lines(found)))


def _lines(found: Document) -> Iterator[str]:
    if not found["masters"]:
        yield f"no master key: {found['file']} is made with the first encrypted content"
    for each in found["masters"]:
        role = "current" if each["current"] else "not used"
        yield f"master key {each['master']}  {role:<8} {each['keys']:>8} data keys  {found['file']}"
    if found["keys"]:
        head = f"{'key':>10} {'state':<10} {'master':<16} {'encryption':<12} {'capsules':>8} {'created':>10}"
        yield f"{head}  first capsule"
    for each in found["keys"]:
        created = "-" if each["created"] is None else f"@{each['created']['position']}"
        zone = f" ({each['zone']})" if each["zone"] else ""
        yield (
            f"{each['key']:>10} {each['state']:<10} {each['master'] or '-':<16} {each['encryption'] or '-':<12} "
            f"{each['capsules']:>8} {created:>10}  {each['capsule'] or '-'}{zone}"
        )


@key_app.command("rotate")
def rotate(
    context: typer.Context,
    capsules: Annotated[
        list[str] | None, typer.Argument(metavar="[CAPSULE…]", help="UUIDs, or paths in the tree.")
    ] = None,
    sole: Sole = False,
) -> None:
    """Make another master key, which wraps every data key; or, for capsules, encrypt them again under new data keys."""
    session: Session = context.obj
    if capsules:
        if sole:
            raise UsageError("--sole is about the master key", hint="leave out the capsules, or --sole")
        _renew(session, capsules)
        return
    with session.service() as service:
        found = service.keys_rotate(sole=sole)
    lines = [f"master key {found['master']} wraps {found['rewrapped']} data keys now, in {found['file']}"]
    session.show(found, "\n".join([*lines, *_erased(found)]))
    if session.json:
        return
    note("copy the file to where its backup is; with the old one alone, content cannot be read any more")


def _renew(session: Session, capsules: list[str]) -> None:
    with session.service() as service:
        done = [service.keys_renew(capsule=each) for each in capsules]
    session.show({"capsules": done}, "\n".join(map(_renewed, done)))


def _renewed(found: Document) -> str:
    return f"{found['capsule']}: {formatted(found['bytes'])} encrypted again, under key {found['key']}"


def _erased(found: Document) -> Iterator[str]:
    if found["erased"]:
        yield "the old master key is erased here; copies of it elsewhere are yours to destroy"
    for each in found["kept"]:
        yield clean(f"NOT gone: {each}")


@key_app.command("destroy")
def destroy(
    context: typer.Context,
    capsules: Annotated[list[str], typer.Argument(metavar="CAPSULE…", help="UUIDs, or paths in the tree.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    with_clones: Annotated[
        bool, typer.Option("--with-clones", help="Also of capsules that have bytes under the same keys.")
    ] = False,
    sole: Sole = False,
) -> None:
    """Destroy the data keys of capsules: nobody can read them any more, at no moment, ever again."""
    session: Session = context.obj
    if not yes:
        _ask(capsules)
    with session.service() as service:
        found = service.keys_destroy(capsules=capsules, with_clones=with_clones, sole=sole)
    keys, named = len(found["keys"]), len(found["capsules"])
    lines = [
        f"destroyed {keys} data {'key' if keys == 1 else 'keys'} of {named} {'capsule' if named == 1 else 'capsules'}"
    ]
    if found["zones"]:
        zones = ", ".join(found["zones"])
        lines.append(
            f"NOT reached: zones that were given the keys: {zones}; run space key destroy there as well"
        )
    if found["plain"]:
        plain = ", ".join(found["plain"])
        lines.append(f"NOT reached: what was stored before it was encrypted, of {plain}")
    session.show(found, "\n".join([*map(clean, lines), *_erased(found)]))
    if not found["erased"]:
        raise typer.Exit(1)


def _ask(capsules: list[str]) -> None:
    """Lets somebody think again.

    Raises:
        UsageError: nobody can be asked.
    """
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked whether to destroy keys", hint="--yes")
    named = ", ".join(map(clean, capsules[:NAMED_MAX])) + (", …" if len(capsules) > NAMED_MAX else "")
    typer.confirm(
        f"Make {named} unreadable for ever, past moments and snapshots included?", abort=True, err=True
    )


__all__ = ["key_app"]
