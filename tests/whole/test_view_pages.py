"""Views in front of an application: real clients, a real backend."""

import json

import pytest
from harness import DOMAIN, Server, eventually, make_site
from zoo import Origin, answer, head, in_chunks

HTML = b"<!doctype html>\n<title>Shop</title>\n<body>\n<p>Hello</p>\n</body>\n"
TAG = b'<script async type="text/javascript" src="'
VIEWS = {
    "__index.html": b"",
    "page/index.html": b"<!-- shimmercat: {cache-seconds: 9} -->" + HTML * 30,
    "php/__index.html":
        b"<!--\nshimmercat:\n  change-url:\n    - /php/*/ -> /$1.php\n-->",
    "tagged/__index.html":
        b"<!-- shimmercat: {sc-snippet-after: [<body>]} -->",
    "consult/__index.html":
        b"<!-- shimmercat: {content-disposition: consult} -->" + HTML,
    "json/__index.html":
        b"<!-- shimmercat: {content-disposition: use-json} -->"
        b"<h1>{{ path }}</h1>",
}


def application(asked):
    """Says what it was asked, in the form that the path is for."""
    if asked.target.startswith("/json/"):
        return answer(json.dumps({"path": asked.target}).encode(),
                      content_type="application/json")
    if asked.target.startswith("/tagged/"):
        if asked.method == "HEAD":
            return head(content_type="text/html", transfer_encoding="chunked")
        return in_chunks(HTML[:40], HTML[40:], content_type="text/html")(asked)
    body = f"{asked.method} {asked.target} {asked.body.decode()}".encode()
    if asked.target.endswith("/nowhere/"):
        return answer(body if asked.method != "HEAD" else b"", "404 Not Found")
    whole = answer(body, set_cookie="a=b")
    return whole[:-len(body)] if asked.method == "HEAD" else whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A running server before an application: (server, its folder)."""
    folder = make_site(tmp_path_factory.mktemp("views"), {
        "img/a.css": b"p { margin: 0 }\n" * 99})
    for name, content in VIEWS.items():
        path = folder / "views" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with Origin(application) as origin:
        (folder / "devlove.yaml").write_text(f"""
shimmercat-devlove:
  domains:
    {DOMAIN}:
      root-dir: www
      views-dir: views
      consultants:
        application: {{connect-to: "{origin.port}"}}
      change-url:
        - /legacy/*.php -> dynamic /php/$1/
        - /old -> redirect /new/+common
        - /pictures -> static /img/+common
    elec pages.example.test:
      root-dir: www
      views-dir: views/page
""")
        with Server(folder, "--workers", "2") as server:
            yield server, folder


@pytest.fixture(params=["h2", "http/1.1"])
def client(place, request):
    """A client of each protocol."""
    with place[0].client(request.param) as client:
        yield client


def test_requests_find_their_way_through_rules_and_views(client):
    assert client.get("/a/b/?c=d").content == b"GET /a/b/?c=d "
    assert client.post("/a/", content=b"body").content == b"POST /a/ body"
    assert client.get("/legacy/x.php?y").content == b"GET /x.php?y "
    assert client.get("/pictures/a.css").content == b"p { margin: 0 }\n" * 99
    moved = client.get("/old/a?b=c")
    assert (moved.status_code, moved.headers["location"]) == (
        301, "/new/a?b=c")
    assert client.get("/a").headers["location"] == "/a/"
    assert client.get("/a/%2e%2e/b/").status_code == 404


def test_the_tag_is_in_the_page_and_loads_its_script(client):
    page = client.get("/tagged/").content
    before, tag, after = page.partition(TAG)
    assert before == HTML.partition(b"<body>")[0] + b"<body>"
    assert tag
    script = client.get(after.partition(b'"')[0].decode())
    assert script.status_code == 200
    assert script.headers["content-type"].startswith("text/javascript")
    assert client.head("/tagged/").content == b""


def test_the_page_of_a_view_is_there_when_the_application_agrees(client):
    found = client.get("/consult/a/")
    assert (found.content, found.headers["set-cookie"]) == (HTML, "a=b")
    missing = client.get("/consult/nowhere/")
    assert (missing.status_code, missing.content) == (
        404, b"GET /consult/nowhere/ ")


def test_json_becomes_a_page(client):
    found = client.get("/json/%3Cb%3E/?a=<b>")
    assert found.content == b"<h1>/json/%3Cb%3E/?a=%3Cb%3E</h1>"
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert client.head("/json/").headers["content-length"] == "15"


def test_a_page_without_an_application_is_an_asset_like_others(place):
    server, _ = place
    with server.client(domain="pages.example.test") as client:
        client.headers["host"] = "pages.example.test"
        options = {"extensions": {"sni_hostname": "pages.example.test"}}
        page = client.get("/", **options)
        assert page.content == HTML * 30
        assert page.headers["cache-control"] == "public, max-age=9"
        smallest = eventually(lambda: int(client.get(
            "/", headers={"accept-encoding": "br"}, **options).headers[
                "content-length"]) < 90)
        assert smallest
        again = client.get("/", headers={
            "if-none-match": page.headers["etag"]}, **options)
        assert again.status_code in (200, 304)


def test_a_view_edited_while_serving_is_what_answers(place):
    server, folder = place
    path = folder / "views" / "edited" / "index.html"
    path.parent.mkdir(exist_ok=True)
    with server.client() as client:
        assert client.get("/edited/").content == b"GET /edited/ "
        path.write_bytes(b"<!-- shimmercat: {change-url: [/ -> /x]} -->")
        assert client.get("/edited/").content == b"GET /x "
        path.write_bytes(b"<!-- shimmercat: {change-url: [/ -> x]} -->")
        failed = client.get("/edited/")
        assert failed.status_code == 500
        assert b"views" not in failed.content
        said = server.await_line("M60025")[0].message
        assert f"{path}:1: shimmercat > change-url > 1: got '/ -> x'" in said
        path.unlink()
        assert client.get("/edited/").content == b"GET /edited/ "


def test_a_start_with_mistaken_views_ends_with_78(tmp_path):
    make_site(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "www" / name).mkdir()
        (tmp_path / "www" / name / "index.html").write_bytes(
            b"<!--\nshimmercat: {consultant: nobody}\n-->")
    server = Server(tmp_path)
    server.start()
    assert server.wait() == 78
    assert [line.text.partition(": ")[0] for line in server.lines()] == [
        f"{tmp_path}/www/{name}/index.html:2" for name in ("a", "b")]
