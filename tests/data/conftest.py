"""Shared by the tests of the data room."""

import os

import pytest


@pytest.fixture
def real_files():
    """Skips where the sets themselves are not at hand: they are no part of the project, whose own files stand in elsewhere."""
    if "STILLHOUSE_DATA" not in os.environ:
        pytest.skip("STILLHOUSE_DATA names no directory with the real files")
