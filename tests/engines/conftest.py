"""The server that the frame-level tests talk to."""

import os
import pathlib

import frames
import pytest


@pytest.fixture(scope="session")
def h2_target():
    """The server named by SHIMMERCAT_TARGET, else one of our own.

    SHIMMERCAT_TARGET=HOST:PORT,AUTHORITY,/PATH,FILE puts the suite before any
    server that answers /PATH with the octets of FILE.
    """
    place, authority, path, file = os.environ["SHIMMERCAT_TARGET"].split(",")
    host, _, port = place.rpartition(":")
    content = pathlib.Path(file).read_bytes()
    yield frames.Target(
        host, int(port), authority.encode(), path.encode(), content
    )


@pytest.fixture
def client(h2_target):
    """A connection with a preface, default settings and open windows."""
    with frames.Client(h2_target) as connection:
        yield connection
