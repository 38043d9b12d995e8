"""Any damage to any one file: everything acknowledged is there bit by bit, or the damage is named."""

from __future__ import annotations

import collections
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import space
from tests.store_support import VARIANTS, Template, files_of, look, open_store, template

PAGE: Final = 4096
OUTCOMES: Final = collections.Counter[tuple[str, str]]()


@attrs.frozen
class Damage:
    """One thing that happens to one file."""

    file: str
    kind: str
    offset: int = 0
    value: int = 0

    def inflict(self, home: Path) -> None:
        """Changes the file; of ``value`` bytes or bits at ``offset``."""
        path = home / self.file
        if self.kind == "delete":
            path.unlink()
            return
        if self.kind == "truncate":
            os.truncate(path, self.offset)
            return
        with path.open("r+b") as file:
            file.seek(self.offset)
            if self.kind == "flip":
                (byte,) = file.read(1)
                file.seek(self.offset)
                file.write(bytes([byte ^ self.value]))
            elif self.kind == "zero":
                file.write(bytes(min(PAGE, path.stat().st_size - self.offset)))
            else:
                file.seek(0, os.SEEK_END)
                file.write(bytes([self.value, 1, self.value]) * self.offset)


def damages(variant: str) -> st.SearchStrategy[Damage]:
    """Damage anywhere in a template, mostly where bytes mean something."""
    home = template(variant).path
    return st.sampled_from(files_of(home)).flatmap(lambda name: damage_of(name, (home / name).read_bytes()))


def damage_of(name: str, content: bytes) -> st.SearchStrategy[Damage]:
    """Damage to one file."""
    size = len(content)
    extended = st.builds(Damage, st.just(name), st.just("extend"), st.integers(1, 5000), st.integers(0, 255))
    kinds = [st.just(Damage(name, "delete")), extended]
    if size:
        meaning = [at for at, byte in enumerate(content) if byte]
        anywhere = st.integers(0, size - 1)
        offsets = st.sampled_from(meaning) | anywhere if meaning else anywhere
        kinds += [
            st.builds(
                Damage, st.just(name), st.just("flip"), offsets, st.integers(0, 7).map(lambda bit: 1 << bit)
            ),
            st.builds(Damage, st.just(name), st.just("flip"), offsets, st.integers(1, 255)),
            st.builds(Damage, st.just(name), st.just("truncate"), offsets),
            st.builds(Damage, st.just(name), st.just("zero"), offsets.map(lambda at: at & -PAGE)),
        ]
    return st.one_of(kinds)


def outcome(home: Path, expected: Template) -> str:
    """What opening and reading everything comes to: "whole", or what error said so.

    Wrong bytes, missing names and errors of any other kind fail the test here.
    """
    try:
        return read_all(home, expected)
    except space.CorruptionError as error:
        place = (error.kind.exit_status, bool(error.segment), error.offset >= -1, error.position >= 0)
    assert place == (6, True, True, True)
    return "corruption"


def read_all(home: Path, expected: Template) -> str:
    """Opens and reads everything there is, present and past, and verifies it."""
    with open_store(home) as store:
        assert look(store) == expected.present
        assert list(store.log()) == expected.log
        for moment, view in expected.past.items():
            with store.at(f"@{moment}") as past:
                assert look(past) == view
        findings = store.verify().findings
        for finding in findings:
            assert finding["segment"], finding
            assert finding["position"] >= 0, finding
    return "found by verify" if findings else "whole"


def check(variant: str, damage: Damage) -> str:
    """Damages a copy of a template; the outcome, after which the store must be as good after another try."""
    original = template(variant)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        home = original.copy(Path(scratch) / "store")
        damage.inflict(home)
        found = outcome(home, original)
        OUTCOMES[variant, f"{damage.kind}: {found}"] += 1
        if found != "corruption":
            assert outcome(home, original) == found
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.data())
@settings(max_examples=max(25, settings.default.max_examples // 10 if settings.default else 25))
def test_damage_anywhere_is_mended_or_named(variant: str, data: st.DataObject) -> None:
    """One damaged file: all that was acknowledged is read back equal, or CorruptionError names the place."""
    check(variant, data.draw(damages(variant)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_file_may_be_missing(variant: str) -> None:
    """Each file of the directory in turn is deleted: only segments of the log are missed."""
    for name in files_of(template(variant).path):
        found = check(variant, Damage(name, "delete"))
        missed = name.endswith(".seg")
        assert (found == "corruption") == missed, (name, found)


@pytest.mark.parametrize("name", ["format.json", "lock"])
def test_every_byte_of_a_small_file_may_change(name: str) -> None:
    """Files the log knows the content of are restored from it, whichever byte is wrong."""
    size = (template("closed").path / name).stat().st_size
    for offset in range(size):
        value = (1, 2, 0x20, 0xFF)[
            offset % 4
        ]  # each takes a start of a store: all four of each would be half a minute
        assert check("closed", Damage(name, "flip", offset, value)) == "whole"
    for length in range(size):
        assert check("closed", Damage(name, "truncate", length)) == "whole"


def test_deleting_everything_that_can_be_rebuilt(tmp_path: Path) -> None:
    """State, checkpoints, sidecars, lock and format file gone: the log alone brings it all back."""
    original = template("checkpointed")
    home = original.copy(tmp_path / "store")
    shutil.rmtree(home / "state")
    shutil.rmtree(home / "checkpoints")
    for name in files_of(home):
        if not name.endswith(".seg"):
            (home / name).unlink()
    assert outcome(home, original) == "whole"


def test_a_lost_log_is_not_taken_for_a_new_store(tmp_path: Path) -> None:
    """Without its log directory a store is damaged, not empty."""
    original = template("checkpointed")
    home = original.copy(tmp_path / "store")
    shutil.rmtree(home / "wal")
    with pytest.raises(space.CorruptionError):
        open_store(home)
    shutil.rmtree(home / "state")
    with pytest.raises(space.CorruptionError):
        open_store(home)
    shutil.rmtree(home / "checkpoints")
    with pytest.raises(space.CorruptionError):
        open_store(home)
