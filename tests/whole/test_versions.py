"""A deploy: what was renamed stays, and comes as what changed."""

import base64
import hashlib
import random

import zstandard
from harness import Server, eventually, make_site

FIRST = random.Random(1).randbytes(9000).hex().encode()
SECOND = FIRST[:7000] + b"/* changed */" + FIRST[7000:]
DICTIONARY = base64.b64encode(hashlib.sha256(FIRST).digest()).decode()
ASKING = {"accept-encoding": "gzip, br, zstd, dcz",
          "available-dictionary": f":{DICTIONARY}:",
          "sec-fetch-site": "same-origin"}


def deploy(folder, name, content):
    """Put a file in place of all others of its kind."""
    for old in (folder / "www").glob("app.*.js"):
        old.unlink()
    (folder / "www" / name).write_bytes(content)


def is_kept(server, name):
    """Return whether the artisan is done with a file, having served it."""
    assert server.fetch(f"/{name}").status_code == 200
    return any(name in line.message for line in server.lines("M20004"))


def test_after_a_deploy_old_names_are_served_and_new_ones_come_as_changes(
        tmp_path):
    make_site(tmp_path, {"app.3f2a9c1b.js": FIRST})
    with Server(tmp_path) as server:
        offered = server.fetch("/app.3f2a9c1b.js").headers
        assert offered["use-as-dictionary"] == 'match="/app.*.js"'
        eventually(lambda: is_kept(server, "app.3f2a9c1b.js"))
    deploy(tmp_path, "app.77c0ffee.js", SECOND)
    with Server(tmp_path) as server:
        assert server.fetch("/app.3f2a9c1b.js").content == FIRST
        assert server.fetch("/app.00c0ffee.js").status_code == 404
        answer = eventually(lambda: changed(server))
        body = bytes(answer)
        assert body[8:40] == hashlib.sha256(FIRST).digest()
        known = zstandard.ZstdCompressionDict(
            FIRST, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        assert zstandard.ZstdDecompressor(dict_data=known).decompress(
            body[40:]) == SECOND
        assert len(body) < 500
        assert server.fetch("/app.77c0ffee.js").content == SECOND


def changed(server):
    """Return the answer's octets once it comes as a change."""
    with server.client() as client, client.stream(
            "GET", "/app.77c0ffee.js", headers=ASKING,
            extensions={"sni_hostname": "www.example.test"}) as answer:
        assert answer.status_code == 200
        is_delta = answer.headers.get("content-encoding") == "dcz"
        body = b"".join(answer.iter_raw())
        return body if is_delta else None
