"""What is mounted, as the kernel says it; notes of what belongs where."""

from __future__ import annotations

from pathlib import Path

import pytest

from space._errors import UsageError
from space._node import csi_mounts
from space._node.csi_host import MOUNTED, PUBLISHED, STAGED, LinuxHost, Note, Notes, _remove

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf")]

LINES = """\
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
43 27 0:39 / /var/lib/space/csi/volumes rw,nosuid,nodev shared:7 master:1 - fuse.space space:/csi/volumes rw,user_id=0
44 27 0:39 /0a1b/data /pods/a\\040b/mount ro,noexec - fuse.space space:/csi/volumes rw,user_id=0
45 27 0:6 /loop3 /pods/\\134x\\011\\043 rw - devtmpfs devtmpfs rw
"""


def test_mountinfo_is_read() -> None:
    """Optional fields are passed over, octal escapes are characters, roots and options are kept."""
    found = csi_mounts.parse_mountinfo(LINES.splitlines())
    assert [each.point for each in found] == [
        "/",
        "/var/lib/space/csi/volumes",
        "/pods/a b/mount",
        "/pods/\\x\t#",
    ]
    assert (found[2].root, found[2].kind, found[2].readonly) == ("/0a1b/data", "fuse.space", True)
    assert (found[3].root, found[3].readonly, found[1].device) == ("/loop3", False, "0:39")


def test_flags_are_attributes() -> None:
    """Flags a mount has of its own become its attributes; one that says when times change clears the others."""
    assert csi_mounts.attributes_of(["noexec", "nosuid"], readonly=True) == (0x1 | 0x2 | 0x8, 0)
    assert csi_mounts.attributes_of(["noatime"], readonly=False) == (0x10, 0x70)
    assert csi_mounts.attributes_of(["defaults", "exec"], readonly=False) == (0, 0)


def test_notes_come_back_staged_first(tmp_path: Path) -> None:
    """A note kept is found by its path, those of staged volumes first; what is no note is left out and left alone."""
    notes = Notes(tmp_path / "notes")
    published = Note("v", "/a/published", PUBLISHED, block=False, phase=MOUNTED, flags=("noexec",), group=5)
    staged = Note("v", "/z/staged", STAGED, block=False, phase=MOUNTED)
    notes.keep(published)
    notes.keep(staged)
    (tmp_path / "notes" / "broken.json").write_text('{"volume": 1}')
    assert notes.all() == [staged, published]
    assert notes.find("/a/published") == published
    notes.drop("/a/published")
    notes.drop("/a/published")
    assert notes.find("/a/published") is None
    assert (tmp_path / "notes" / "broken.json").exists()


def test_paths_of_our_own_are_nobodys(tmp_path: Path) -> None:
    """No target is inside of what is ours or around it, however it is written, nor a symbolic link."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for each in (ours, theirs):
        each.mkdir()
    (theirs / "in").symlink_to(ours)
    host = LinuxHost(tmp_path / "notes", lambda: "", "here", relay=lambda _: 0, forbidden=[ours])
    for path in (ours, ours / "wal", tmp_path, theirs / "in", theirs / "in" / "wal"):
        with pytest.raises(UsageError):
            host._point(str(path))
    assert host._point(str(theirs / "new")) == str(theirs / "new")
    host.close()


def test_only_what_is_empty_is_removed(tmp_path: Path) -> None:
    """A target goes if it is an empty directory or file, or is gone; anything with something in it stays."""
    for name in ("directory", "file"):
        path = tmp_path / name
        path.mkdir() if name == "directory" else path.touch()
        for _ in range(2):
            _remove(str(path))
        assert not path.exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("precious")
    with pytest.raises(OSError, match="not empty"):
        _remove(str(full))
    with pytest.raises(UsageError):
        _remove(str(full / "x"))
    assert (full / "x").read_text() == "precious"
