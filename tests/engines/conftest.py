"""The server that the frame-level tests talk to."""

import os
import pathlib
import random

import frames
import harness
import pytest

from shimmercat import NATIVE_ENGINE

#: more than half a connection's first window, less than all of it: two of
#: these cannot be sent without a WINDOW_UPDATE, one can
CONTENT = random.Random(9113).randbytes(50_000)


def built(choice):
    """The choice, skipped visibly where its engine is not built."""
    missing = choice == "native" and NATIVE_ENGINE is None
    return pytest.param(choice, marks=pytest.mark.skipif(
        missing, reason="the native engine is not built"))


@pytest.fixture(scope="session", params=map(built, ("python", "native")))
def h2_target(request, tmp_path_factory, configuration_home):
    """The server named by SHIMMERCAT_TARGET, else one of our own.

    SHIMMERCAT_TARGET=HOST:PORT,AUTHORITY,/PATH,FILE puts the suite before any
    server that answers /PATH with the octets of FILE.  Of our own we want to
    see, too, that nothing that a peer did was an internal error.
    """
    if named := os.environ.get("SHIMMERCAT_TARGET"):
        if request.param != "python":
            pytest.skip("a server that was named has one engine")
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
    with harness.Server(
            site, "--engine", request.param, mode="devlove") as server:
        said = server.lines("M10008")[0].message
        assert ("nghttp2" in said) is (request.param == "native")
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
