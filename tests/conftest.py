"""What all tests share: random numbers that can be drawn again, golden texts and their flag."""

from __future__ import annotations

import difflib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Time is no property of what is tested: a busy machine, or the first call, may take seconds.
settings.register_profile("dilu", deadline=None)
settings.register_profile("dilu again", deadline=None, derandomize=True)

# Artifacts made by hand, a driver without a device, and captures that are kept.
pytest_plugins = ["toy", "fake_gpu", "captured_once"]

GOLDEN = Path(__file__).parent / "golden"

#: Files that take longest, longest first. They begin first, since each is one worker's: what is
#: left at the end is short, and no core waits long for another.
LONGEST = (
    "e2e/test_interpreted.py",
    "e2e/test_sharded.py",
    "e2e/test_sharded_devices.py",
    "e2e/test_families.py",
    "test_numerics.py",
    "frontend/language/test_language_model.py",
    "e2e/test_scale.py",
    "codegen/triton/test_attention.py",
    "codegen/triton/test_families.py",
    "e2e/test_stored.py",
    "codegen/triton/test_kernels.py",
    "frontend/language/test_runs.py",
    "test_planning.py",
    "test_mesh_options.py",
    "e2e/test_bundled_model.py",
    "e2e/test_mutations.py",
    "test_casts.py",
    "codegen/c/test_kernels.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden texts anew (not in CI)"
    )
    parser.addoption(
        "--seed", type=int, default=0, help="draw other random inputs, the same for the same number"
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.getoption('--seed')}"


def seed_of(item: pytest.Item) -> int:
    """Return a number of the test's own: what it draws does not depend on what ran before it."""
    return zlib.crc32(f"{item.config.getoption('--seed')} {item.nodeid}".encode())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what draws without being given a generator, before any fixture does."""
    torch.manual_seed(seed_of(item))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return a source of random inputs, as `--seed` says."""
    return np.random.default_rng(seed_of(request.node))


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("dilu" if config.getoption("--seed") else "dilu again")
    if config.getoption("--update-golden") and os.environ.get("CI"):
        raise pytest.UsageError("golden texts are not updated in CI: do it at home, and look at it")
    config.option.loadscopereorder = False  # pytest-xdist's order is by the number of tests


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files in the order they are to begin: the longest, then others with slow tests."""
    here = Path(__file__).parent
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    rank = {here / name: place for place, name in enumerate(LONGEST)}
    gone = [str(file) for file in rank if not file.exists()]
    assert not gone, f"LONGEST names files that are gone: {gone}"
    items.sort(key=lambda item: rank.get(item.path, len(rank) + (item.path not in slow)))


@pytest.fixture
def compiled_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """C is compiled in two thirds of the time, and computes the same: kernels fix the order of
    every operation. For tests of what is around the code of models, not of it."""
    monkeypatch.setenv("DILU_CFLAGS", "-O1")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return `check(name, text)`: compare a text with `tests/golden/<name>`."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden {name}: run with --update-golden and look at it")
        want = path.read_text("utf-8")
        if text != want:
            lines = difflib.unified_diff(
                want.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm=""
            )
            pytest.fail("\n".join(lines), pytrace=False)

    return check
