from __future__ import annotations

import errno
import logging
from pathlib import Path

import pyfuse3
import pytest

from space._errors import ConflictError, CorruptionError, RefusedError, Status, UsageError
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.projections.fuse.mount import _options, mounted_at
from space.projections.fuse.ops import ERRNO, FORMAT_BITS, InodeTable, caller_of, errno_of
from space.projections.vfs import SYNTHETIC_ROOT, Attributes

pytestmark = pytest.mark.requires("py:pyfuse3")


def node(number: int) -> CapsuleId:
    """An id that is easy to tell from others."""
    return CapsuleId(number.to_bytes(16, "big"))


def attributes(number: int, *, change: int = 1) -> Attributes:
    """Attributes of an empty file with that inode number."""
    return Attributes(node(number), Kind.FILE, 0o644, 1, 0, 0, 0, 0, 0, number, node(9), 0, 0, 0, 0, change)


def test_every_status_has_an_errno() -> None:
    """The table from statuses to errno is complete, and every number in it is one the system names."""
    assert set(ERRNO) == set(Status)
    assert all(number in errno.errorcode for number in ERRNO.values())


def test_statuses_programs_tell_apart_stay_apart() -> None:
    """Only damage and plain input/output errors share a number."""
    shared = [status for status in Status if list(ERRNO.values()).count(ERRNO[status]) > 1]
    assert shared == [Status.CORRUPT, Status.IO]


def test_every_kind_has_a_format() -> None:
    """Each kind of node has a file type of its own in st_mode."""
    assert set(FORMAT_BITS) == set(Kind)
    assert len(set(FORMAT_BITS.values())) == len(Kind)


def test_any_error_becomes_a_number(caplog: pytest.LogCaptureFixture) -> None:
    """Refusals are silent, damage is logged on one line, and what nobody foresaw is EIO with its traceback."""
    assert errno_of(ConflictError("x", status=Status.NOT_EMPTY)) == errno.ENOTEMPTY
    assert errno_of(RefusedError("x")) == errno.EROFS
    assert errno_of(UsageError("x", status=Status.BAD_NAME)) == errno.EILSEQ
    assert errno_of(OSError(errno.ENOSPC, "full")) == errno.ENOSPC
    assert caplog.records == []
    assert errno_of(CorruptionError("bad bytes", segment="s", offset=1)) == errno.EIO
    assert [(each.levelno, each.exc_info) for each in caplog.records] == [(logging.ERROR, None)]
    assert errno_of(KeyError("x")) == errno.EIO
    assert caplog.records[-1].exc_info


def test_an_inode_lives_as_long_as_its_references() -> None:
    """A number means its capsule until the kernel has given back every reference; then it is stale."""
    table = InodeTable(node(1000))
    found = attributes(7)
    table.remember(found)
    table.remember(found)
    table.forget(7, 1)
    assert table.node(7) == node(7)
    table.forget(7, 1)
    with pytest.raises(pyfuse3.FUSEError) as refused:
        table.node(7)
    assert refused.value.errno == errno.ESTALE
    table.forget(7, 1)  # a second time does nothing
    assert len(table) == 1


def test_the_root_is_inode_one_for_ever() -> None:
    """Whatever is the root has inode 1, and no forget takes it away."""
    table = InodeTable(node(7))
    assert table.number(attributes(7)) == pyfuse3.ROOT_INODE
    assert table.number(attributes(8)) == 8
    table.forget(pyfuse3.ROOT_INODE, 5)
    assert table.node(pyfuse3.ROOT_INODE) == node(7)


def test_the_cache_is_kept_only_for_what_did_not_change() -> None:
    """Pages stay valid from one open to the next exactly when the change number did not move."""
    table = InodeTable(SYNTHETIC_ROOT)
    assert not table.unchanged(attributes(7))  # the kernel does not know it
    table.remember(attributes(7))
    answers = [table.unchanged(attributes(7, change=change)) for change in (1, 1, 2, 2, 1)]
    assert answers == [False, True, False, True, False]


def test_the_actor_names_view_and_user() -> None:
    """What a mount writes is in the log as done by fuse for that user."""
    context = pyfuse3.RequestContext()
    caller = caller_of(context)
    assert (caller.actor, caller.uid, caller.gid) == (f"fuse:uid={context.uid}", context.uid, context.gid)


def test_mountinfo_is_read_with_its_escapes(tmp_path: Path) -> None:
    """Blanks, tabs, newlines and backslashes in mount points are octal there; several mounts keep their order."""
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 0:5 / /a\\040b rw shared:1 master:2 - ext4 /dev/vda rw\n"
        "23 1 0:6 / /a\\040b ro - fuse.space space ro\n"
        "24 1 0:7 / /c\\011\\012\\134d rw - tmpfs none rw\n"
    )
    assert mounted_at("/a b", str(table)) == ["ext4", "fuse.space"]
    assert mounted_at("/c\t\n\\d", str(table)) == ["tmpfs"]
    assert mounted_at("/a", str(table)) == []


class _Files:
    root = SYNTHETIC_ROOT
    read_only = True
    immutable = True


def test_names_cannot_become_mount_options() -> None:
    """A comma, quote or newline in the name of the file system cannot add an option of its own."""
    options = _options(_Files(), 'a,allow_other"\n\\ü', allow_other=False)  # type: ignore[arg-type]
    assert options == {"fsname=a_allow_other____", "subtype=space", "default_permissions", "ro"}
