"""csi-sanity, the specification's own suite (kubernetes-csi/csi-test), where its program is given."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csi_client import MIB
from tests.csi_support import NEEDS_KERNEL, machine

pytestmark = NEEDS_KERNEL

PROGRAM = os.environ.get("CSI_SANITY") or shutil.which("csi-sanity") or ""
PASSED_MIN = 94
"""What csi-driver-host-path passes of the same 96."""


@pytest.mark.skipif(not PROGRAM, reason="csi-sanity is neither at CSI_SANITY nor on PATH")
@pytest.mark.parametrize("access", ["mount", "block"])
def test_the_suite_passes(tmp_path: Path, access: str) -> None:
    """All of the suite passes for trees and for block devices, and leaves no mount and no device behind."""
    parameters = tmp_path / "mutable.yaml"
    parameters.write_text("compression: zstd\nhistory: 1d\n")
    with machine(tmp_path, "--max-volumes", "4") as here:
        done = subprocess.run(
            [
                PROGRAM,
                f"--csi.endpoint=unix://{here.socket}",
                f"--csi.mountdir={here.pods}/target",
                f"--csi.stagingdir={here.pods}/staging",
                f"--csi.testvolumesize={16 * MIB}",
                f"--csi.testvolumeexpandsize={32 * MIB}",
                f"--csi.testvolumeaccesstype={access}",
                "--csi.testnodevolumeattachlimit",
                f"--csi.testvolumemutableparameters={parameters}",
                "--ginkgo.no-color",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        passed, failed = map(
            int, re.findall(r"(\d+) (?:Passed|Failed)", done.stdout.splitlines()[-3:].__str__())[:2]
        )
        assert (failed, done.returncode) == (0, 0), done.stdout
        assert passed >= PASSED_MIN
        assert (here.mounts(), here.loops()) == ([], [])
        assert not here.client.ListVolumes().entries
        assert not here.client.ListSnapshots().entries
