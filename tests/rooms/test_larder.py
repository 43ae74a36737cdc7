"""Rooms 12b and 12c: what is fetched from origins, and how long it is kept."""

import argparse
import contextlib
import hashlib
import random
import shutil
import time
from pathlib import Path

import gevent
import pytest
import zoo
from exchanges import body_of, no_descriptors, request_for
from harness import DOMAIN, eventually

import shimmercat
from shimmercat import (
    AlternateStore,
    HttpFetchBackend,
    Larder,
    LocalNotes,
    NetworkAddress,
    OriginFailed,
    OutOfDescriptors,
    RemoteRoot,
    Repository,
    ShimmerCatError,
    Site,
    load_settings,
    quick_form,
)

CSS = b"".join(b"p.c%d { margin: 0 }\n" % n for n in range(500))
BIG = random.Random(12).randbytes(600_000)
FILES = {"/a.css": CSS, "/big.bin": BIG, "/none.txt": b"",
         "/caf%C3%A9.txt": b"coffee", "/a.42": b"odd",
         "/app.0a1b2c3d.js": b"hashed" * 50}
CONFIGURATION = """\
shimmercat-devlove:
  domains:
    {domain}:
      root-dir:
        fetch-backend: http
        http-port: 127.0.0.1:{port}
{root}
      views-dir: views
{keys}
"""
CONSULTING = """\
shimmercat-devlove:
  domains:
    {domain}:
      root-dir: {{use-consultant: origin}}
      consultants: {{origin: {{connect-to: "127.0.0.1:{port}"}}}}
      views-dir: views
"""


class House:
    """A site whose statics come from an origin, asked without a socket."""

    def __init__(self, folder, animal, root="", keys="", consultant=False,
                 **tweaks):
        self.origin = zoo.Origin(animal)
        self.origin.come()
        self.folder = folder
        (folder / "views").mkdir()
        text = CONSULTING if consultant else CONFIGURATION
        (folder / "devlove.yaml").write_text(text.format(
            domain=DOMAIN, port=self.origin.port, root=root, keys=keys))
        scratch = folder / ".shimmercat.loves.devs"
        scratch.mkdir(mode=0o700)
        (scratch / "tweaks.yaml").write_text("".join(
            f"{key.replace('_', '-')}: {value}\n"
            for key, value in tweaks.items()))
        self.settings = load_settings(argparse.Namespace(
            mode="devlove", working_dir=str(folder)))
        self.store = AlternateStore(folder / "r-cache")
        self.notes = LocalNotes()
        self.jobs = []
        self.restart()

    def restart(self, notes=None):
        """Be another process with the same store."""
        tweaks = self.settings.tweaks
        self.larder = Larder(tweaks, self.store, notes or LocalNotes())
        self.site = Site(self.settings, Repository(
            tweaks, self.store, self, quick_form), self.larder)

    def put(self, job, weight=1):
        """Takes an order for the artisan."""
        self.jobs.append(job)

    def get(self, target, method="GET", **fields):
        """The response to a request, its body read."""
        request = request_for(target, *(
            (name.replace("_", "-").encode(), value.encode())
            for name, value in fields.items()), method=method)
        response = self.site.ready(request)
        response = response or self.site.answer(request)
        response.fields = dict(response.fields)
        response.body = body_of(response)
        return response

    def cache_status(self, target):
        """What Cache-Status says of an answer, without its detail."""
        field = self.get(target).fields[b"cache-status"].decode()
        return field.partition(";detail")[0].partition(";")[2]


@pytest.fixture
def house(tmp_path):
    """Makes a house; its origin ends with the test."""
    made = []

    def make(animal=None, *words, **named):
        made.append(House(
            tmp_path, animal or zoo.Files(FILES), *words, **named))
        return made[-1]
    yield make
    for one in made:
        one.origin.go()


@pytest.mark.parametrize("target", FILES)
def test_a_static_comes_from_the_origin_once(house, target):
    here = house()
    for _ in range(3):
        response = here.get(target)
        assert (response.status, response.body) == (200, FILES[target])
        assert response.fields[b"content-length"] == b"%d" % len(FILES[target])
    assert here.origin.count() == 1


def test_the_query_does_not_count(house):
    here = house()
    assert here.get("/a.css?v=1").body == here.get("/a.css?v=2").body == CSS
    assert [asked.target for asked in here.origin.asked] == ["/a.css"]


def test_all_forms_are_made_of_what_was_fetched(house):
    here = house()
    response = here.get("/a.css", accept_encoding="br")
    assert response.fields[b"content-encoding"] == b"br"
    assert len(response.body) < len(CSS) / 3
    assert here.get("/a.css", range="bytes=0-4").body == CSS[:5]
    etag = here.get("/a.css").fields[b"etag"].decode()
    assert here.get("/a.css", if_none_match=etag).status == 304
    job, = here.jobs
    assert hashlib.sha256(Path(job["path"]).read_bytes()).hexdigest() == (
        job["sha"])
    assert here.origin.count() == 1


def test_types_come_from_names_and_from_the_origin_only_without(house):
    here = house(lambda asked: zoo.answer(b"x", content_type="image/x-y"))
    assert here.get("/a.css").fields[b"content-type"] == (
        b"text/css; charset=utf-8")
    assert here.get("/a.unknown").fields[b"content-type"] == b"image/x-y"


def test_the_origin_gets_what_is_configured_and_nothing_of_the_client(house):
    here = house(root="        use-host: origin.test\n"
                      "        path-prefix: /webroot/")
    here.origin.animal.files["/webroot/a.css"] = CSS
    assert here.get("/a.css", cookie="a=b", user_agent="x",
                    accept_encoding="gzip").status == 200
    asked, = here.origin.asked
    assert asked.target == "/webroot/a.css"
    assert asked.field("host") == "origin.test"
    assert asked.field("accept-encoding") == "identity"
    assert asked.field("cookie") is None


def test_what_is_kept_survives_a_restart(house):
    here = house()
    here.get("/a.css")
    here.get("/big.bin")
    here.restart()
    assert here.get("/a.css").body == CSS
    assert here.get("/big.bin").body == BIG
    assert here.origin.count() == 2


def test_a_copy_that_was_evicted_is_fetched_again(house):
    here = house()
    here.get("/big.bin")
    for path in here.folder.glob("r-cache/v3/*/*.original.*"):
        path.unlink()
    assert here.get("/big.bin").body == BIG
    here.restart()
    for path in here.folder.glob("r-cache/v3/*/*.original.*"):
        path.unlink()
    assert here.get("/big.bin").body == BIG
    assert here.origin.count() == 3


def test_a_copy_that_was_damaged_is_fetched_again(house, said):
    here = house()
    here.get("/a.css")
    path, = here.folder.glob("r-cache/v3/*/*.original.*")
    path.write_bytes(b"x" * len(CSS))
    here.restart()
    assert here.get("/a.css").body == CSS
    assert here.origin.count() == 2
    assert 40013 in [record.code for record in said]


@pytest.mark.parametrize("animal", [
    zoo.truncating(BIG), zoo.truncating_chunks(BIG), zoo.closing_early,
    zoo.resetting, zoo.closing_in_head, zoo.garbage, zoo.failing,
    lambda asked: zoo.answer(b"", "302 Found", location="/b.css"),
    lambda asked: zoo.head("200 OK", content_length="12junk") + b"x"])
@pytest.mark.parametrize("consultant", [False, True])
def test_what_is_not_whole_is_missing_and_nothing_of_it_is_kept(
        house, said, animal, consultant):
    here = house(animal, missing_seconds=0, consultant=consultant)
    assert here.get("/a.bin").status == 404
    assert not [*here.folder.glob("r-cache/v3/**/*.original.*")]
    assert not [*here.folder.glob("r-cache/v3/**/.draft-*")]
    assert 40041 in [record.code for record in said]
    here.origin.animal = zoo.Files({"/a.bin": BIG})
    assert here.get("/a.bin").body == BIG


@pytest.mark.parametrize("consultant", [False, True])
@pytest.mark.parametrize("body", [CSS, BIG])
def test_a_body_that_ends_with_the_connection_is_passed_on_unkept(
        house, consultant, body):
    here = house(lambda asked: [zoo.head(connection="close"), body, zoo.CLOSE],
                 consultant=consultant)
    assert here.get("/a.css").body == here.get("/a.css").body == body
    assert not [*here.folder.glob("r-cache/v3/**/*.original.*")]


def test_an_answer_longer_than_it_says_ends_where_it_says(house):
    here = house(zoo.overlong(CSS))
    assert here.get("/a.css").body == here.get("/b.css").body == CSS


def test_a_silent_origin_is_missing_after_static_seconds(house):
    here = house(zoo.silent, static_seconds=0.3)
    response = here.get("/a.css")
    assert response.status == 404
    assert b"imed out" in response.body


def test_what_is_missing_is_not_asked_for_again_for_a_while(house):
    here = house(missing_seconds=60)
    assert {here.get("/x.css").status for _ in range(5)} == {404}
    assert here.origin.count() == 1
    notes = here.larder.notes
    here.restart(notes)
    assert here.get("/x.css").status == 404
    assert here.origin.count() == 1


def test_what_was_missing_appears_after_missing_seconds(house):
    here = house(missing_seconds=0.1)
    assert here.get("/x.css").status == 404
    here.origin.animal.files["/x.css"] = CSS
    eventually(lambda: here.get("/x.css").status == 200)


def test_an_unchanged_copy_costs_a_304_after_its_lifetime(house):
    here = house(fetched_seconds=0)
    assert here.cache_status("/a.css") == (
        "fwd=uri-miss; fwd-status=200; stored")
    assert here.cache_status("/a.css") == "fwd=stale; fwd-status=304; stored"
    assert here.get("/a.css").body == CSS
    assert [asked.field("if-none-match") is not None
            for asked in here.origin.asked] == [False, True, True]
    assert here.origin.asked[1].field("if-modified-since") == (
        "Fri, 14 Jul 2017 02:40:00 GMT")


def test_a_change_replaces_the_copy(house):
    here = house(fetched_seconds=0)
    here.get("/a.css")
    here.origin.animal.files["/a.css"] = b"changed"
    response = here.get("/a.css")
    assert (response.body, response.status) == (b"changed", 200)


def test_a_fresh_copy_says_how_long_it_is(house):
    here = house(fetched_seconds=100)
    here.get("/a.css")
    status, _, seconds = here.cache_status("/a.css").partition("; ttl=")
    assert status == "hit" and 60 < int(seconds) < 100


@pytest.mark.parametrize("animal", [
    zoo.failing, zoo.resetting, zoo.truncating(CSS), zoo.garbage,
    zoo.silent, None])
def test_a_copy_is_served_stale_while_its_origin_fails(house, animal):
    here = house(fetched_seconds=0, static_seconds=0.3)
    here.get("/a.css")
    here.origin.animal = animal
    if animal is None:
        here.origin.go()
    for _ in range(3):
        response = here.get("/a.css")
        assert (response.status, response.body) == (200, CSS)
    assert b"ttl=-" in here.get("/a.css").fields[b"cache-status"]
    here.restart()
    assert here.get("/a.css").body == CSS


def test_a_copy_is_not_served_for_longer_than_stale_seconds(house):
    here = house(fetched_seconds=0, stale_seconds=0)
    here.get("/a.css")
    here.origin.animal = zoo.failing
    assert here.get("/a.css").status == 404


def test_a_copy_goes_when_its_origin_says_that_it_is_gone(house):
    here = house(fetched_seconds=0, missing_seconds=0)
    here.get("/a.css")
    here.get("/app.0a1b2c3d.js")
    here.origin.animal.files.clear()
    assert here.get("/a.css").status == 404
    here.restart()
    assert here.get("/a.css").status == 404
    # One with a hash in its name stays for pages that are open somewhere.
    assert here.get("/app.0a1b2c3d.js").body == FILES["/app.0a1b2c3d.js"]


@pytest.mark.parametrize("fields", [
    {"cache_control": "max-age=60, No-Store"}, {"cache_control": "private"},
    {"set_cookie": "a=b"}, {"vary": "Cookie"}, {"vary": "*"},
    {"content_encoding": "gzip"}])
def test_what_may_be_personal_is_not_kept(house, fields):
    here = house(lambda asked: zoo.answer(CSS, **fields))
    for _ in range(2):
        response = here.get("/a.css")
        assert response.body == CSS
        assert b"set-cookie" not in response.fields
        assert response.fields.get(b"content-encoding", b"") == fields.get(
            "content_encoding", "").encode()
    assert here.origin.count() == 2
    assert not [*here.folder.glob("r-cache/v3/**/*.original.*")]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_is_too_large_is_passed_on(house, is_chunked):
    animal = zoo.in_chunks(BIG[:1000], BIG[1000:])
    here = house(animal if is_chunked else zoo.Files(FILES),
                 fetch_limit_bytes="100 KiB")
    if is_chunked:
        # That it is too large shows too late, once.
        here.get("/big.bin")
    for _ in range(2):
        assert here.get("/big.bin").body == BIG
    assert not [*here.folder.glob("r-cache/v3/**/*.original.*")]


def test_the_changelist_is_not_for_clients(house):
    here = house()
    here.origin.animal.files["/__sc_changelist__/0/5a"] = b"x"
    for target in ("/__sc_changelist__/0/5a.x", "/__SC_CHANGELIST__/a.txt",
                   "/%5F_sc_changelist__/a.txt", "/__sc_changelist__.x/../"):
        assert here.get(target).status == 404
    assert here.origin.count() == 0


def test_other_methods_than_those_of_statics_are_refused(house):
    here = house()
    assert here.get("/a.css", "POST").status == 405
    assert here.get("/a.css", "HEAD").fields[b"content-length"] == (
        b"%d" % len(CSS))


class Listed(zoo.Files):
    """Files with a changelist."""

    def change(self, path, content, moment=None):
        """Change a file, and say so."""
        moment = int(moment or time.time())
        self.files["/" + path] = content
        octets = f"{moment:016x}"
        name = "/".join([f"/__sc_changelist__/{int(octets[:8], 16):x}",
                         octets[8:10], octets[10:12], octets[12:14]])
        line = f"{octets[14:]} m {path}\n".encode()
        self.files[name] = self.files.get(name, b"") + line

    def readings(self, origin):
        """Return how often the changelist was asked for."""
        return len([asked for asked in origin.asked
                    if "__sc_changelist__" in asked.target])


def test_what_the_changelist_does_not_name_is_not_asked_for_again(house):
    animal = Listed({f"/{n}.css": b"%d" % n for n in range(100)})
    here = house(animal, keys="      changelist-settings:"
                              " {tOld: 3000, tNew: 0.2}")
    names, started = [*animal.files], time.monotonic()
    for name in names:
        here.get(name)
    before = here.origin.count() - animal.readings(here.origin)
    begun = time.monotonic()
    while time.monotonic() < begun + 1:
        for name in names:
            assert here.get(name).status == 200
    readings = animal.readings(here.origin)
    # Once in tNew, and at first all slots of tOld.
    spent = time.monotonic() - started
    assert readings <= spent / 0.2 + 3000 / 256 + 4
    assert here.origin.count() - readings == before


def test_an_edit_shows_after_t_new(house):
    animal = Listed({"/a.css": CSS, "/b.css": CSS})
    here = house(animal, keys="      changelist-settings:"
                              " {tOld: 3000, tNew: 0.3}")
    here.get("/a.css")
    here.get("/b.css")
    animal.change("a.css", b"edited")
    eventually(lambda: here.get("/a.css").body == b"edited")
    assert here.get("/b.css").body == CSS
    assert here.origin.count("/b.css") == 1


def test_one_process_reads_the_changelist_for_all(house):
    animal = Listed({"/a.css": CSS})
    here = house(animal, keys="      changelist-settings:"
                              " {tOld: 300, tNew: 0.1}")
    here.get("/a.css")
    sites = []
    for _ in range(4):
        here.restart(here.notes)
        here.get("/a.css")
        sites.append(here.site)
    begun = time.monotonic()
    while time.monotonic() < begun + 1:
        for here.site in sites:
            assert here.get("/a.css").body == CSS
    spent = time.monotonic() - begun
    assert animal.readings(here.origin) <= spent / 0.1 + 300 / 256 + 4
    assert here.origin.count("/a.css") == 1


def test_an_origin_may_listen_on_a_unix_socket(house, tmp_path):
    here = house()
    path = tmp_path / "Origin.sock"
    with zoo.Origin(zoo.Files({"/u.css": CSS}), path) as origin:
        backend = HttpFetchBackend(
            RemoteRoot(http_port=NetworkAddress.parse(f"unix://{path}")),
            DOMAIN, here.settings.tweaks)
        for _ in range(2):
            answer = backend.get("/u.css")
            assert b"".join(answer.pieces) == CSS
            answer.close()
        assert origin.asked[0].field("host") == DOMAIN
        assert origin.accepted == 1
    with pytest.raises(OriginFailed):
        backend.get("/u.css")


@pytest.mark.parametrize("consultant", [False, True])
def test_a_want_of_descriptors_is_not_held_against_the_origin(
        house, said, consultant):
    here = house(consultant=consultant)
    with no_descriptors():
        response = here.get("/a.css")
    assert response.status == 503
    assert response.fields[b"retry-after"]
    assert [line.code for line in said] == [40049]
    assert here.get("/a.css").body == CSS


def test_nor_is_one_against_an_origin_on_a_unix_socket(tmp_path):
    backend = HttpFetchBackend(RemoteRoot(
        http_port=NetworkAddress("unix", path=str(tmp_path / "x"))),
        DOMAIN, shimmercat.Tweaks())
    with no_descriptors(), pytest.raises(OutOfDescriptors):
        backend.get("/a.css")


def test_connections_are_used_again_and_one_that_was_closed_is_renewed(house):
    here = house(fetched_seconds=0, missing_seconds=0)
    for _ in range(3):
        assert here.get("/a.css").status == 200
        assert here.get("/missing.css").status == 404
    assert here.origin.accepted == 1
    here.origin.go()
    here.origin.come()
    here.origin.animal.files["/a.css"] = b"new"
    assert here.get("/a.css").body == b"new"


@pytest.mark.parametrize("consultant", [False, True])
def test_an_origin_that_drips_is_given_up(house, monkeypatch, consultant):
    monkeypatch.setattr(shimmercat, "_LONGEST_FETCH", 0.2)
    monkeypatch.setattr(shimmercat, "_WHOLE_SECONDS", 10)
    here = house(zoo.dripping(CSS, 0.05), consultant=consultant)
    assert here.get("/a.css").status == 404
    eventually(lambda: not here.origin.has_open())


def test_a_store_that_is_cleared_away_amid_a_fetch_fails_no_visitor(
        house, monkeypatch, said):
    def clearing(asked):
        yield zoo.head(content_length=len(CSS))
        yield 0.1
        shutil.rmtree(here.folder / "r-cache", ignore_errors=True)
        yield CSS

    monkeypatch.setattr(shimmercat, "_WHOLE_SECONDS", 10)
    here = house(clearing, missing_seconds=0.1)
    assert here.get("/a.css").body == CSS
    assert not said
    here.origin.animal = zoo.Files(FILES)
    eventually(lambda: here.cache_status("/a.css").startswith("hit"))


@pytest.mark.parametrize("animal", [
    lambda asked: zoo.answer(BIG), lambda asked: zoo.answer(BIG, "404 None"),
    lambda asked: zoo.head(), zoo.in_chunks(b"x", 600),
    zoo.truncating(BIG)], ids=[
        "large", "missing", "headless", "endless", "broken"])
def test_an_answer_that_is_given_up_takes_no_connection_along(house, animal):
    here = house(animal, fetch_connections=1, static_seconds=5)
    backend = HttpFetchBackend(
        here.settings.domains[DOMAIN].remote_root, DOMAIN,
        here.settings.tweaks)
    for _ in range(3):
        with contextlib.suppress(OriginFailed):
            answer = backend.get("/a.css")
            next(answer.pieces)
            answer.close()
    here.origin.animal = zoo.Files(FILES)
    answer = backend.get("/a.css")
    assert b"".join(answer.pieces) == CSS


@pytest.mark.parametrize("animal, is_whole", [
    (lambda asked: zoo.answer(BIG, cache_control="no-store"), True),
    (zoo.truncating(BIG, cache_control="no-store"), False)])
@pytest.mark.parametrize("consultant", [False, True])
def test_what_is_not_kept_is_read_ahead_and_its_end_is_told(
        house, animal, is_whole, consultant):
    here = house(animal, consultant=consultant)
    for _ in range(3):
        response = here.site.answer(request_for("/a.css"))
        if is_whole:
            assert body_of(response) == BIG
        else:
            with pytest.raises(ShimmerCatError):
                body_of(response)
    # Who leaves takes nothing along either.
    here.site.answer(request_for("/a.css")).close()
    eventually(lambda: gevent.sleep(0.01) or here.larder._spool.left
               == here.settings.tweaks.fetch_limit_bytes)


@pytest.mark.parametrize("value", ["a\r\n b", "x\x00y"])
def test_odd_fields_of_an_origin_reach_nobody(house, value):
    here = house(lambda asked: zoo.answer(
        CSS, content_disposition=value, cache_control="private"))
    response = here.get("/a.css")
    assert response.body == CSS
    assert response.fields.get(b"content-disposition", b"") in (b"", b"a b")


def test_too_many_fetches_at_a_time_are_refused(house, monkeypatch):
    monkeypatch.setattr(shimmercat, "_MOST_ERRANDS", 0)
    response = house().get("/a.css")
    assert (response.status, response.fields[b"retry-after"]) == (503, b"2")


def test_who_only_explains_asks_no_origin(house):
    here = house()
    tweaks = here.settings.tweaks
    site, here.site = here.site, Site(
        here.settings, Repository(tweaks, here.store, here),
        Larder(tweaks, here.store, LocalNotes(), asks=False), asks=False)
    response = here.get("/a.css")
    assert (response.answered, response.representation) == (
        "origin", "not asked")
    assert here.origin.count() == 0
    there, here.site = here.site, site
    here.get("/a.css")
    here.site = there
    assert here.get("/a.css").body == CSS


def test_a_copy_goes_when_its_origin_wants_it_kept_no_more(house):
    here = house(fetched_seconds=0, missing_seconds=0.1)
    here.get("/a.css")
    here.origin.animal = lambda asked: zoo.answer(
        b"personal", cache_control="no-store")
    assert here.get("/a.css").body == b"personal"
    here.origin.animal = zoo.failing
    eventually(lambda: here.get("/a.css").status == 404)
