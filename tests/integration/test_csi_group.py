"""Snapshots of several volumes are one cut: what is true of all of them at every moment is true of the snapshots."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import grpc
import pytest

from tests.csi_client import MIB, device, tree
from tests.csi_support import NEEDS_KERNEL, Machine, code_of, machine

pytestmark = NEEDS_KERNEL

ACCOUNTS = 10
OPENING = 1000
GROUPS = 4
PLACE = 8
"""Bytes of an amount: the account's file or device begins with it."""

JOURNAL_BYTES = 4096


class Bank:
    """Accounts in files of volumes of their own, and who moves money between them.

    A transfer writes the intent into the journal of the account that pays, takes the money, gives it, and writes that
    it is done: what one look at any moment may find is money on its way, and then the journal says how much.
    """

    def __init__(self, files: list[Path]) -> None:
        # A device has a page cache above the store, and no snapshot has what is only there; a file has none.
        flags = os.O_RDWR | (os.O_DSYNC if files[0].is_block_device() else os.O_CREAT)
        self._files = [os.open(each, flags, 0o600) for each in files]
        for file in self._files:
            os.pwrite(file, OPENING.to_bytes(PLACE, "big") + bytes(JOURNAL_BYTES - PLACE), 0)
        self.transfers = 0

    def run(self, over: threading.Event, seed: int) -> None:
        """Moves money until it is over."""
        chance = random.Random(seed)
        while not over.is_set():
            payer, payee = chance.sample(range(ACCOUNTS), 2)
            self._move(payer, payee, chance.randrange(1, 100))

    def _move(self, payer: int, payee: int, amount: int) -> None:
        ours, theirs = self._amount(payer), self._amount(payee)
        if ours < amount:
            return
        intent = b"".join(n.to_bytes(PLACE, "big") for n in (1, payee, ours - amount, theirs + amount))
        os.pwrite(self._files[payer], intent, PLACE)
        os.pwrite(self._files[payer], (ours - amount).to_bytes(PLACE, "big"), 0)
        os.pwrite(self._files[payee], (theirs + amount).to_bytes(PLACE, "big"), 0)
        os.pwrite(self._files[payer], bytes(PLACE), PLACE)
        self.transfers += 1

    def _amount(self, account: int) -> int:
        return int.from_bytes(os.pread(self._files[account], PLACE, 0), "big")

    def close(self) -> None:
        """Closes the books."""
        for file in self._files:
            os.close(file)


def total(files: list[Path]) -> int:
    """All the money, after whatever was under way is finished as the journals say."""
    pages = [each.read_bytes()[: 5 * PLACE] for each in files]
    numbers = [
        [int.from_bytes(page[at : at + PLACE], "big") for at in range(0, 5 * PLACE, PLACE)] for page in pages
    ]
    amounts = [each[0] for each in numbers]
    under_way = [(payer, each) for payer, each in enumerate(numbers) if each[1]]
    assert len(under_way) <= 1, "one transfer at a time"
    for payer, (_, _, payee, ours, theirs) in under_way:
        amounts[payer], amounts[payee] = ours, theirs
    return sum(amounts)


@pytest.mark.parametrize("block", [False, True], ids=["trees", "devices"])
def test_a_group_of_volumes_keeps_the_invariant(tmp_path: Path, block: bool) -> None:
    """Groups of snapshots taken while money moves between ten volumes have all the money, each of them."""
    how = device() if block else tree()
    with machine(tmp_path) as here:
        volumes = [here.create(f"account-{n}", 4 * MIB, how) for n in range(ACCOUNTS)]
        targets = [here.publish(each, how) for each in volumes]
        bank = Bank([each if block else each / "account" for each in targets])
        over = threading.Event()
        teller = threading.Thread(target=bank.run, args=(over, 7))
        teller.start()
        groups = []
        try:
            for number in range(GROUPS):
                at_least = bank.transfers + 20
                groups.append(
                    here.client.CreateVolumeGroupSnapshot(
                        name=f"books-{number}", source_volume_ids=volumes
                    ).group_snapshot
                )
                while bank.transfers < at_least:
                    assert teller.is_alive()
        finally:
            over.set()
            teller.join()
            bank.close()
        seen = set()
        for number, group in enumerate(groups):
            assert group.ready_to_use
            by_volume = {each.source_volume_id: each.snapshot_id for each in group.snapshots}
            assert {each.group_snapshot_id for each in group.snapshots} == {group.group_snapshot_id}
            restored = [
                here.publish(here.restore(f"g{number}-{n}", by_volume[each], 4 * MIB, how), how)
                for n, each in enumerate(volumes)
            ]
            files = [each if block else each / "account" for each in restored]
            pages = [page(each, tmp_path, n) for n, each in enumerate(files)]
            assert total(pages) == ACCOUNTS * OPENING
            seen.add(tuple(each.read_bytes()[:PLACE] for each in pages))
        assert len(seen) > 1  # money did move between the groups


def page(source: Path, home: Path, number: int) -> Path:
    """The first page of a file or device, as a file."""
    copy = home / f"page-{number}"
    with source.open("rb") as file:
        copy.write_bytes(file.read(JOURNAL_BYTES))
    return copy


def test_groups_are_found_and_removed_as_one(tmp_path: Path) -> None:
    """A group is made once by its name, has one position, can be got, and takes its snapshots with it."""
    with machine(tmp_path) as here:
        volumes = [here.create(f"v{n}") for n in range(3)]
        make = here.client.CreateVolumeGroupSnapshot
        first = make(name="g", source_volume_ids=volumes).group_snapshot
        assert (
            make(name="g", source_volume_ids=volumes[::-1]).group_snapshot.group_snapshot_id
            == first.group_snapshot_id
        )
        assert (
            code_of(lambda: make(name="g", source_volume_ids=volumes[:2])) == grpc.StatusCode.ALREADY_EXISTS
        )
        missing = "00000000-0000-0000-0000-000000000000"
        assert (
            code_of(lambda: make(name="h", source_volume_ids=[*volumes, missing]))
            == grpc.StatusCode.NOT_FOUND
        )
        assert positions(here, [each.snapshot_id for each in first.snapshots]) == 1
        assert len(here.client.ListSnapshots().entries) == 3
        got = here.client.GetVolumeGroupSnapshot(group_snapshot_id=first.group_snapshot_id).group_snapshot
        assert got == first
        here.client.DeleteSnapshot(snapshot_id=first.snapshots[0].snapshot_id)
        for _ in range(2):
            here.client.DeleteVolumeGroupSnapshot(group_snapshot_id=first.group_snapshot_id)
        assert not here.client.ListSnapshots().entries


def positions(here: Machine, snapshots: list[str]) -> int:
    """At how many positions of the log snapshots were taken."""
    return len({here.call("stat", capsule=f"/csi/snapshots/{each}/data")["change"] for each in snapshots})
