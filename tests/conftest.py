"""What every test shares: hypothesis profiles, tiers by directory, and what a test needs from the machine.

``pytest`` runs the `short` profile: the same examples every time, so that a red run is the change's
fault.  ``tools/fuzz`` runs `long`: many more examples, new ones each time.  Neither has deadlines:
on a shared machine a slow example says nothing about the code.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings

TIERS: Final = ("unit", "golden", "property", "integration", "chaos")
HERE: Final = Path(__file__).parent

TOGETHER: Final = (
    "tests/unit/", "tests/golden/", "tests/property/",
    *(f"tests/chaos/test_{each}" for each in ("federation", "kill9", "linearizability", "rules", "simulation")),
    *(f"tests/integration/test_{each}" for each in (
        "beside", "cli_", "cluster_cli", "cluster_keys", "csi_driver", "csi_group", "csi_kill", "csi_network",
        "federation_arrival", "federation_keys", "federation_link", "federation_move", "federation_promote",
        "federation_zones", "fuse_", "nfs_kernel", "nfs_limits", "nfs_others", "nfs_referrals", "nfs_sockets",
        "node_life", "nvme_kernel", "nvme_sockets", "policy_actions", "shards",
    )),
)  # fmt: skip
"""Tests that compute, or have one server of their own, which they reach over loopback, by a mount or from a guest whose
kernel is the client, or ask a cluster as patiently as people do: ``pytest -n`` runs them at once, a file a process.

All others are one after the other, when these are done: they wait for elections and leases that a machine with more to
do than it can makes late, or look at all there is on it."""

ALONE: Final = "alone"

settings.register_profile(
    "short",
    max_examples=100,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "long",
    settings.get_profile("short"),
    max_examples=5_000,
    stateful_step_count=100,
    derandomize=False,
)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background: what tests interrupt has to hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.load_profile("short")  # --hypothesis-profile=long overrides it


def missing(things: tuple[str, ...]) -> list[str]:
    """Those of ``things`` this machine lacks: a program on PATH, an /absolute/path or a py:module."""
    return [thing for thing in things if not _present(thing)]


def _present(thing: str) -> bool:
    if thing.startswith("/"):
        return os.access(thing, os.R_OK)
    if thing.startswith("py:"):
        return importlib.util.find_spec(thing.removeprefix("py:")) is not None
    return shutil.which(thing) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the tier whose directory it lives in."""
    for item in items:
        tier = item.path.relative_to(HERE).parts[0]
        if tier not in TIERS:
            raise pytest.UsageError(f"{item.path} is in no tier: move it below one of {', '.join(TIERS)}")
        item.add_marker(tier)
    items.sort(key=lambda item: _lane(item.nodeid) == ALONE)


def _lane(nodeid: str) -> str:
    """What the tests have in common that one process runs, one after the other."""
    return nodeid.partition("::")[0] if nodeid.startswith(TOGETHER) else ALONE


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How ``pytest -n`` divides the tests: see :data:`TOGETHER`."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
        """Files in the order of the collection, and then, by the last process left, all that runs alone."""

        def _split_scope(self, nodeid: str) -> str:
            return _lane(nodeid)

        def _reschedule(self, node: Any) -> None:
            others = [each for each in self.nodes if each is not node and not each.shutting_down]
            if list(self.workqueue) != [ALONE] or not others:
                super()._reschedule(node)
            elif self._pending_of(self.assigned_work[node]) <= 2 and not node.shutting_down:
                node.shutdown()

    config.option.loadscopereorder = False
    return Lanes(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hold ``@pytest.mark.requires("git", "/dev/fuse", "py:pyfuse3")``: fail in CI, skip elsewhere."""
    things = tuple(thing for mark in item.iter_markers("requires") for thing in mark.args)
    if lacking := missing(things):
        reason = f"{item.nodeid} requires {', '.join(lacking)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
