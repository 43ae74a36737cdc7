"""Room 14, Hints."""

import pytest

from shimmercat import Request, Response, Urgency, urgency_of


def urgency(kind=None, *fields):
    request = Request.from_fields([
        (b":method", b"GET"), (b":scheme", b"https"),
        (b":authority", b"a.example"), (b":path", b"/"), *fields],
        "h2", "192.0.2.1")
    head = ((b"content-type", kind),) if kind else ()
    return urgency_of(request, Response(200, head, b"x"))


@pytest.mark.parametrize("kind, expected", [
    (b"text/html; charset=utf-8", Urgency(1, True)),
    (b"text/html", Urgency(1, True)),
    (b"text/css; charset=utf-8", Urgency(2, False)),
    (b"text/javascript", Urgency(3, False)),
    (b"font/woff2", Urgency(3, False)),
    (b"image/jpeg", Urgency(4, True)),
    (b"video/mp4", Urgency(5, True)),
    (b"application/x-unknown", Urgency(3, True)),
    (None, Urgency(3, True)),
])
def test_a_silent_client_gets_what_the_type_needs(kind, expected):
    assert urgency(kind) == expected


@pytest.mark.parametrize("field, expected", [
    (b"u=0", Urgency(0, False)),
    (b"u=7, i", Urgency(7, True)),
    (b"i", Urgency(2, True)),
    (b"u=9", Urgency(2, False)),
    (b"nonsense", Urgency(2, False)),
])
def test_what_the_client_says_goes_before(field, expected):
    assert urgency(b"text/css", (b"priority", field)) == expected


def test_a_page_comes_before_its_style_its_script_and_its_pictures():
    kinds = [b"text/html", b"text/css", b"text/javascript", b"image/png"]
    levels = [urgency(kind).level for kind in kinds]
    assert levels == sorted(levels) and len(set(levels)) == len(levels)
