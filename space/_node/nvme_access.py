"""Who may connect to an NVMe view, from what the user wrote on the command line.

A secret never stands there: everybody on the machine can read the arguments of a process.  It is in a file, or in an
environment variable, which only the user's own processes can read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from space._errors import UsageError
from space.projections.nvme.auth import ANYBODY, Access, Credentials, Secret
from space.projections.nvme.target import check_nqn

SECRET_FILE_BYTES_MAX: Final = 4096
"""A secret has less than 100 characters; a file of more is some other file."""
_VARIABLE: Final = "env:"
_LITERAL: Final = "DHHC-1:"


def parse_access(
    hosts: Sequence[str],
    host_keys: Sequence[str],
    controller_key: str | None,
    environment: Mapping[str, str] = os.environ,
) -> Access:
    """Who may connect: hosts by name, and hosts that have to prove theirs (``NQN=FILE`` or ``NQN=env:NAME``).

    Where any host is named, the others may not connect.

    Raises:
        UsageError: a name, a file or a secret is not one; no secret is repeated.
    """
    if controller_key is not None and not host_keys:
        raise UsageError(
            "--controller-key answers hosts that authenticate; there are none", hint="add --host-key NQN=FILE"
        )
    if not hosts and not host_keys:
        return ANYBODY
    controller = _secret("--controller-key", controller_key, environment) if controller_key else None
    credentials: dict[str, Credentials] = {}
    for each in host_keys:
        nqn, separator, source = each.partition("=")
        if not separator:
            raise UsageError(
                f"--host-key has no '=': {_shown(each)}",
                hint="--host-key NQN=FILE or --host-key NQN=env:NAME",
            )
        if check_nqn(nqn) in credentials:
            raise UsageError(f"two keys for {nqn}", hint="a host has one")
        credentials[nqn] = Credentials(_secret("--host-key", source, environment), controller)
    return Access(frozenset(map(check_nqn, hosts)) | credentials.keys(), credentials)


def _secret(option: str, source: str, environment: Mapping[str, str]) -> Secret:
    if source.startswith(_LITERAL):
        raise UsageError(
            f"{option} with a secret in it: everybody on this machine can read arguments",
            hint="write it to a file and name that, or env:NAME for an environment variable",
        )
    if source.startswith(_VARIABLE):
        name = source.removeprefix(_VARIABLE)
        text = environment.get(name)
        if text is None:
            raise UsageError(f"{option}: there is no environment variable {name!r}")
    else:
        text = _content(option, Path(source))
    try:
        return Secret.parse(text)
    except UsageError as error:
        raise UsageError(f"{option}: {source} holds what is {error.args[0]}", hint=error.hint) from None


def _content(option: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(SECRET_FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{option}: cannot read {str(path)!r}: {reason}") from None
    if len(data) > SECRET_FILE_BYTES_MAX:
        raise UsageError(f"{option}: {str(path)!r} is too long to be a secret")
    return data.decode("ascii", "replace")


def _shown(text: str) -> str:
    """What was given, unless it is a secret."""
    return "a secret" if _LITERAL in text else repr(text)
