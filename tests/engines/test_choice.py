"""Option --engine: who speaks HTTP/2, and what is said when nobody can."""

import shutil
import subprocess
import sys

import harness
import pytest

import shimmercat
from shimmercat import NATIVE_ENGINE, Http2Engine, http2_engine


@pytest.fixture
def alone(tmp_path):
    """A folder with the file, a site, and a package that has no engine."""
    shutil.copy(harness.PROGRAM, tmp_path)
    package = tmp_path / "shimmercat_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    return harness.make_site(tmp_path)


@pytest.fixture
def run(alone):
    """Runs the copied file as a mode until its end."""
    def run(mode, *words):
        return subprocess.run(
            [sys.executable, "shimmercat.py", mode, *words], cwd=alone,
            capture_output=True, text=True, timeout=60, check=False)
    return run


@pytest.mark.parametrize("mode", ["devlove", "internet"])
def test_a_native_engine_that_is_not_built_is_said_to_be_missing(run, mode):
    done = run(mode, "--engine", "native")
    assert done.returncode == 69
    assert "libnghttp2-dev" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_built_for_another_version_is_none(run, alone):
    (alone / "shimmercat_ext" / "native.py").write_text(
        "def bind(abi, *words):\n    return None\n")
    assert run("devlove", "--engine", "native").returncode == 69


def test_without_the_native_engine_the_one_in_python_serves(alone):
    with harness.Server(alone, "--engine", "auto", mode="devlove",
                        program=alone / "shimmercat.py") as server:
        assert server.lines("M10008", "HTTP/2 through h2 ")
        assert server.fetch().status_code == 200


@pytest.mark.parametrize("engine, name", [
    ("python", "h2"), pytest.param("native", "nghttp2", marks=(
        pytest.mark.skipif(NATIVE_ENGINE is None, reason="not built")))])
def test_the_engine_that_serves_is_said_once(site, engine, name):
    with harness.Server(site, "--workers", "2", "--engine", engine) as server:
        answer = server.fetch()
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2")
        (said,) = server.lines("M10008")
        assert said.message.split()[2] == name


def test_auto_takes_the_native_engine_where_it_is_built():
    assert http2_engine() is (NATIVE_ENGINE or Http2Engine)
    assert http2_engine("python") is Http2Engine
    limits = shimmercat.EngineLimits()
    for choice in ("auto", "python"):
        engine = shimmercat.make_engine("h2", limits, choice)
        assert type(engine) is http2_engine(choice)
