"""What tests of the engine and the partition share."""

from __future__ import annotations

import pytest
from durably_processor.engine import guards
from partition_lab import Lab


@pytest.fixture
def guarded():
    """Workflow code runs as in a processor."""
    guards.install()
    yield
    guards.uninstall()


@pytest.fixture
def lab(tmp_path, guarded):
    """A partition driven by hand."""
    lab = Lab(tmp_path)
    yield lab
    lab.partition.drop()
    lab.store.close()
