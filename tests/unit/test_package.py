"""The package as a stranger gets it: what it declares is what it uses, and one node needs no extras."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SPACE: Final = ROOT / "space"
EXTRAS: Final = {
    "fuse": (SPACE / "projections" / "fuse",),
    "csi": (SPACE / "projections" / "csi", *(SPACE / "_node").glob("csi_*.py")),
    "nvme": (SPACE / "_node" / "loops.py",),
    "federation": tuple(
        SPACE / "federation" / name for name in ("server.py", "shipper.py", "shelf_routes.py", "parity.py")
    ),
    "cluster": (
        SPACE / "replication",
        *(SPACE / "_node" / name for name in ("cluster.py", "serve.py", "http.py", "doctor.py")),
    ),
}
pytest_plugins = ["pytester"]

IMPORT_ALL = """
import pkgutil, sys
extras = ["pyfuse3", "trio", "space_raft_engine", "aiohttp", "uvloop", "grpc", "google", "pyeclib"]
sys.modules.update(dict.fromkeys(extras))
import space
for module in pkgutil.walk_packages(space.__path__, "space."):
    late = ("space.projections.fuse", "space._node.http", "space.projections.csi.", "space._node.csi_")
    ships = (".server", ".shipper", ".shelf_routes", "_node.federation", "_receive", "_send")
    if not module.name.startswith(late) and not ("federation" in module.name and module.name.endswith(ships)):
        __import__(module.name)
"""

NEEDY = """
import pytest

@pytest.mark.requires("sh", "/", "py:attrs", "no-such-program")
def test_it(): pass
"""


def normal(requirement: str) -> str:
    """The normalised distribution name of a requirement."""
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def imported(path: Path) -> set[str]:
    """Top-level names of the foreign modules a source file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"space"}


@functools.cache
def providers() -> Mapping[str, list[str]]:
    """The distributions that provide each module, by what is installed: all their files are looked at, once."""
    return importlib.metadata.packages_distributions()


def distributions(modules: set[str]) -> set[str]:
    """The distributions that provide the modules."""
    return {normal(name) for module in modules for name in providers().get(module, [module])[:1]}


def test_every_import_is_declared() -> None:
    """A module imports only what the distribution depends on; some may use the extra they are for."""
    core = {normal(requirement) for requirement in PROJECT["dependencies"]}
    for path in SPACE.rglob("*.py"):
        allowed = set(core)
        for extra, places in EXTRAS.items():
            if any(path.is_relative_to(place) for place in places):
                allowed |= {normal(each) for each in PROJECT["optional-dependencies"][extra]}
        assert distributions(imported(path)) <= allowed, path


def test_every_dependency_has_its_reason() -> None:
    """Each declared dependency, of the core and of every extra, has a row in the record on dependencies."""
    extras = [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    reasons = (ROOT / "docs" / "adr" / "0006-dependencies.md").read_text()
    for requirement in [*PROJECT["dependencies"], *extras]:
        assert f"| `{normal(requirement)}` |" in reasons


def test_one_node_imports_without_extras() -> None:
    """Every module but the mount, the HTTP server, the CSI driver and what ships imports without the extras."""
    subprocess.run([sys.executable, "-c", IMPORT_ALL], check=True, cwd=ROOT)


def test_the_package_says_it_is_typed() -> None:
    """Type checkers find the annotations of the installed package."""
    assert (ROOT / "space" / "py.typed").is_file()


@pytest.mark.parametrize("ci, errors", [("true", 1), ("", 0)])
def test_missing_needs_fail_in_ci_only(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, errors: int
) -> None:
    """A test that requires what is missing fails in CI, naming it, and is skipped on a user's machine."""
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text())
    (pytester.path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (pytester.mkdir("unit") / "test_it.py").write_text(NEEDY)
    monkeypatch.setenv("CI", ci)
    result = pytester.runpytest_subprocess("unit")
    result.assert_outcomes(errors=errors, skipped=1 - errors)
    result.stdout.fnmatch_lines(["*test_it requires no-such-program"])
