"""Shared by all tests: one thread, a cache of the test session's own, no network."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws must not depend on which tests its worker ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    before = os.environ.get("STILLHOUSE_CACHE")
    os.environ["STILLHOUSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield
    if before is None:
        del os.environ["STILLHOUSE_CACHE"]
    else:
        os.environ["STILLHOUSE_CACHE"] = before


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A real browser, headless; tests that need one are skipped where there is none."""
    from chromium import BINARIES, Chromium, binary

    program = binary()
    if program is None:
        pytest.skip(f"there is no browser: none of {', '.join(BINARIES)} is on the path")
    browser = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
