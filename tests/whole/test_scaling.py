"""Images come in the width that is asked for, where that is allowed."""

import io
import pathlib

import pytest
from harness import DEMO, Server, eventually, make_site
from PIL import Image

PHOTO = (DEMO / "www/photos/small/petals.jpg").read_bytes()
ACCEPT = {"accept": "image/avif,image/webp,*/*"}


@pytest.fixture
def scaling(tmp_path):
    make_site(tmp_path, {"a.jpg": PHOTO, "index.html": b"<p>Hello\n"},
              {"images": "scale"})
    with Server(tmp_path) as server:
        yield server


def width_of(server, target, **fields):
    """Return the width of an image as it is served now."""
    answer = server.fetch(target, headers={**ACCEPT, **fields})
    assert answer.status_code == 200
    assert answer.headers["vary"] == "accept, sec-ch-width, sec-ch-dpr"
    return Image.open(io.BytesIO(answer.content)).width


OWN = Image.open(io.BytesIO(PHOTO)).width


@pytest.mark.parametrize("target, fields, width", [
    ("/a.jpg?sc-width=100", {}, 160), ("/a.jpg?v=1&sc-width=160", {}, 160),
    ("/a.jpg?sc-width=161", {}, 320),
    ("/a.jpg?sc-width=100", {"sec-ch-dpr": "2.0"}, 320),
    ("/a.jpg", {"sec-ch-width": "300"}, 320)])
def test_an_image_comes_in_the_next_step_of_its_width(
        scaling, target, fields, width):
    assert width_of(scaling, target, **fields) == OWN
    eventually(lambda: width_of(scaling, target, **fields) == width, 30)


@pytest.mark.parametrize("target", [
    "/a.jpg?sc-width=2000", "/a.jpg?sc-width=99999", "/a.jpg?sc-width=0",
    "/a.jpg?sc-width=-5", "/a.jpg?sc-width=ten", "/a.jpg?xsc-width=100"])
def test_an_image_is_never_made_larger_than_it_is(scaling, target):
    width_of(scaling, target)
    scaling.await_line("M20004", 2, seconds=30)
    assert width_of(scaling, target) == OWN


def test_nobody_can_have_more_forms_made_than_there_are_steps(scaling):
    for n in range(1, 700, 7):
        width_of(scaling, f"/a.jpg?sc-width={n}")
    scaling.await_line("M20004", 10, seconds=60)
    cache = pathlib.Path(scaling.folder, ".shimmercat.loves.devs", "r-cache")
    widths = {name.partition("_")[2].partition("-")[0]
              for name in (path.name.split(".")[-3]
                           for path in cache.rglob("*.*-*.*"))}
    assert widths <= {"", "160", "320", "480", "640", "960"}


def test_pages_ask_browsers_for_the_width_of_images(scaling):
    assert scaling.fetch("/").headers["accept-ch"] == (
        "Sec-CH-Width, Sec-CH-DPR")


def test_without_the_policy_a_width_means_nothing(tmp_path):
    make_site(tmp_path, {"a.jpg": PHOTO})
    with Server(tmp_path) as server:
        first = server.fetch("/a.jpg?sc-width=100", headers=ACCEPT)
        assert first.content == PHOTO
        assert first.headers["vary"] == "accept"
        assert "accept-ch" not in server.fetch("/").headers
        server.await_line("M20004", seconds=30)
        later = server.fetch("/a.jpg?sc-width=100", headers=ACCEPT)
        assert Image.open(io.BytesIO(later.content)).width == OWN
