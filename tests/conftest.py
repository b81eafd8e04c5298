"""Fixtures shared by the tests: the examples, compiled once, and small specs. Markers for tests that need a program."""

from __future__ import annotations

import os
import shutil
from functools import lru_cache

import pytest
from small_specs import ROOT, Compiled, Small, small_spec

import planc

#: marker -> (a program that its tests need, the Debian package that has it)
NEEDS = {"graphviz": ("gvpr", "graphviz"), "browser": ("chromium", "chromium")}


def _left_out() -> dict[str, str]:
    """Markers whose program is missing here -> what to install. Nothing is left out in CI: there a test whose program
    is missing fails and says so."""
    if os.environ.get("CI"):
        return {}
    return {mark: package for mark, (program, package) in NEEDS.items() if shutil.which(program) is None}


def pytest_configure(config: pytest.Config) -> None:
    for mark, (program, package) in NEEDS.items():
        config.addinivalue_line("markers", f"{mark}: needs the program {program} (Debian package {package})")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gone = [item for item in items if any(item.get_closest_marker(mark) for mark in _left_out())]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in set(gone)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for mark, package in _left_out().items():
        text = f"tests marked {mark} were LEFT OUT: they need {NEEDS[mark][0]}; install the Debian package {package}"
        terminalreporter.write_line(text, yellow=True)


@lru_cache(maxsize=64)
def _compiled(name: str, overrides: tuple[str, ...]) -> planc.VerifiedPlan:
    return planc.compile(planc.load_spec(ROOT / "specs" / f"{name}.yaml", overrides))


@pytest.fixture(scope="session")
def example() -> Compiled:
    """``example("moe-4l-64gpu", "workload.batch=64")``: an example spec, compiled once."""
    return lambda name, *overrides: _compiled(name, overrides)


@pytest.fixture(scope="session")
def small() -> Small:
    """See `small_spec`."""
    return small_spec
