"""The server that the frame-level tests talk to."""

import os
import pathlib
import random

import frames
import harness
import pytest

#: more than half a connection's first window, less than all of it: two of
#: these cannot be sent without a WINDOW_UPDATE, one can
CONTENT = random.Random(9113).randbytes(50_000)


@pytest.fixture(scope="session")
def h2_target(tmp_path_factory, configuration_home):
    """The server named by SHIMMERCAT_TARGET, else one of our own.

    SHIMMERCAT_TARGET=HOST:PORT,AUTHORITY,/PATH,FILE puts the suite before any
    server that answers /PATH with the octets of FILE.  Of our own we want to
    see, too, that nothing that a peer did was an internal error.
    """
    if named := os.environ.get("SHIMMERCAT_TARGET"):
        place, authority, path, file = named.split(",")
        host, _, port = place.rpartition(":")
        content = pathlib.Path(file).read_bytes()
        yield frames.Target(
            host, int(port), authority.encode(), path.encode(), content
        )
        return
    site = harness.make_site(
        tmp_path_factory.mktemp("h2"), {"body.bin": CONTENT}
    )
    with harness.Server(site, mode="devlove") as server:
        authority = f"{harness.DOMAIN}:{server.port}".encode()
        yield frames.Target(
            "127.0.0.1", server.port, authority, b"/body.bin", CONTENT
        )
        assert not server.lines("M60001"), server.explained("internal error")


@pytest.fixture
def client(h2_target):
    """A connection with a preface, default settings and open windows."""
    with frames.Client(h2_target) as connection:
        yield connection
