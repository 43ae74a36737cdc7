"""What tests of rooms find prepared."""

import pytest

from shimmercat import LOG


@pytest.fixture
def said():
    """The records that this process says."""
    before = LOG.sink
    records = []
    LOG.configure(sink=records.append)
    yield records
    LOG.configure(sink=before)
