"""What all tests find prepared.

gevent patches nothing here: pytest's plugins import ssl before any conftest,
and patching after that is the very fault that the program refuses to start
with.  Rooms are tested as a library; the patched program is tested as a
process, with harness.Server.
"""

import os

import harness
import hypothesis
import pytest

# Machines that run tests are busy: only what is measured in bench has a time.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def configuration_home(tmp_path_factory):
    """A home for the development CA that is not the user's."""
    home = tmp_path_factory.mktemp("config")
    before = os.environ.get("XDG_CONFIG_HOME")
    os.environ["XDG_CONFIG_HOME"] = str(home)
    yield home
    del os.environ["XDG_CONFIG_HOME"]
    if before is not None:
        os.environ["XDG_CONFIG_HOME"] = before


@pytest.fixture
def site(tmp_path):
    """A folder with a small site of one domain."""
    return harness.make_site(tmp_path)


@pytest.fixture
def server(site):
    """The program in internet mode with two workers, ready."""
    with harness.Server(site, "--workers", "2") as running:
        yield running


@pytest.fixture
def redis_server(tmp_path):
    """Path of the Unix socket of a Redis that lives as long as the test."""
    with harness.running_redis(tmp_path) as path:
        yield path
