"""``space policy plan|apply``, ``space resolve``, ``space shards``: what policies want done, and where content is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from space._node.caller import Document
from space.cli_session import Session, clean, formatted, system_error

shards_app = typer.Typer(no_args_is_help=True, help="Shards of capsules over zones: ls, get, mend.")

Since = Annotated[
    int, typer.Option("--since", metavar="POSITION", help="Only capsules that changed after it.", min=0)
]
Capsule = Annotated[str, typer.Argument(metavar="CAPSULE", help="A UUID, or a path in the tree.")]


def plan(context: typer.Context, since: Since = 0) -> None:
    """Show what the policies ask for now, and why; change nothing."""
    session: Session = context.obj
    with session.service() as service:
        found = service.policy_plan(since=since)
    session.show(found, "\n".join(map(_action_line, found["actions"])) or "nothing to do")


def apply(context: typer.Context, since: Since = 0) -> None:
    """Do what the policies ask for now; exit with 1 if something could not be done."""
    session: Session = context.obj
    with session.service() as service:
        found = service.policy_apply(since=since)
    lines = [line for each in found["actions"] for line in _result_lines(each)]
    session.show(found, "\n".join(lines) or "nothing to do")
    if not all(each["done"] for each in found["actions"]):
        raise typer.Exit(1)


def _action_line(action: Document) -> str:
    what = str(action.get("path") or action.get("capsule") or "")
    if action["action"] == "Rebalance":
        what = f"shard {action['shard']} to node {action['node']}"
    elif action["action"] == "Evacuate":
        what = f"node {action['node']}"
    where = ", ".join(
        action.get("zones") or [action["zone"]] if "zone" in action or "zones" in action else []
    )
    place = f" → {where}" if where else ""
    return clean(f"{action['action']} {what}{place}: {action['reason']}")


def _result_lines(action: Document) -> Iterator[str]:
    yield ("done   " if action["done"] else "FAILED ") + _action_line(action)
    if not action["done"]:
        yield clean(f"       {action['error']}")


def resolve(context: typer.Context, capsule: Capsule) -> None:
    """Show where a capsule can be read, nearest first."""
    session: Session = context.obj
    with session.service() as service:
        found = service.replicas(capsule=capsule)
    lines = [clean(_replica_line(each)) for each in found["replicas"]]
    session.show(found, "\n".join(lines) or "nowhere that is known")


def _replica_line(replica: Document) -> str:
    rtt = "not measured" if replica["rtt_ns"] is None else f"{replica['rtt_ns'] / 1e6:.1f} ms"
    words = [word for word in ("local", "home") if replica[word]]
    words += [] if replica["reachable"] else ["does not answer"]
    zone = replica["zone"] or "this store"
    return f"{zone:<16} {'-' if replica['local'] else rtt:>12}  {', '.join(words)}".rstrip()


@shards_app.command("ls")
def list_(context: typer.Context) -> None:
    """List capsules this zone has a layout of: its own, and those it keeps shards of."""
    session: Session = context.obj
    with session.service() as service:
        found = service.shards()
    session.show(found, "\n".join(clean(_layout_line(each)) for each in found))


def _layout_line(layout: Document) -> str:
    scheme = f"{layout['data']}+{layout['parity']}"
    zones = ", ".join(layout["zones"])
    return (
        f"{layout['id']} {layout['home']}@{layout['position']} {formatted(layout['size']):>10} {scheme} {zones}  "
        f"{layout['name']}"
    )


@shards_app.command("get")
def get(
    context: typer.Context,
    capsule: Capsule,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Write here.")] = None,
) -> None:
    """Read a capsule from its shards, to standard output or a file; its home need not be there."""
    session: Session = context.obj
    with session.service() as service:
        if output is None:
            sys.stdout.flush()
            service.shards_get(capsule=capsule, descriptor=sys.stdout.fileno())
            return
        existed = os.path.lexists(output)
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise system_error(error, output) from None
        try:
            result = service.shards_get(capsule=capsule, descriptor=descriptor, replace=True)
        except BaseException:
            if not existed:
                Path(output).unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    session.show({**result, "file": output}, f"{output}: {formatted(result['size'])}")


@shards_app.command("mend")
def mend(context: typer.Context, capsule: Capsule) -> None:
    """Look whether every zone has its shards, and make anew those that are lost or damaged."""
    session: Session = context.obj
    with session.service() as service:
        found = service.shards_mend(capsule=capsule)
    session.show(found, f"{found['shards']} shards, {found['lost']} lost, {found['mended']} made anew")
    if found["lost"] != found["mended"]:
        raise typer.Exit(1)


__all__ = ["apply", "plan", "resolve", "shards_app"]
