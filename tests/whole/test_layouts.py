"""Sites laid out as the product's public examples are work unchanged."""

import json
import subprocess
import sys

import pytest
from harness import PROGRAM, Server

PAGE = b"<!doctype html><title>Example</title>\n"
SCRIPT = b"console.log('example');\n"

#: entries of github.com/shimmercat/django_example_code; no last line end
DJANGO = """\
---
shimmercat-devlove:
    domains:
        www.httpdos.com: {root-dir: www}
        api.httpdos.com: {port: 8080}"""

#: entries of github.com/shimmercat/nodejs_example_project
NODEJS = """\
---
shimmercat-devlove:
   domains:
        www.express-website.mine:
            root-dir: client-bin
        myapi.express-website.mine:
            port: 8000
"""

#: every key that the published schema has for an application with views
VIEWS = """\
---
shimmercat-devlove:
  domains:
    elec www.bicycles.test:
      root-dir: public
      views-dir: views
      cache-key: bicycles
      changelist-settings: { tOld: 7200, tNew: 20 }
      prob-accelerator-kicks-in: 0.5
      bot-protection-enabled: false
      consultants:
        shop:
          connect-to: "unix:///run/php/shop.sock"
          application-protocol: fastcgi
        blog:
          connect-to: "8080"
          application-protocol: http
    api api.bicycles.test:
      port: "127.0.0.1:9100"
"""

#: an edge whose statics are pulled from two origins
REMOTE = """\
---
shimmercat-devlove:
  domains:
    elec www.bicycles.test:
      root-dir:
        use-consultant: origin
      views-dir: views
      consultants:
        origin:
          connect-to: "lookup(origin.bicycles.test):443"
          application-protocol: https
      changelist-settings: { tOld: 7200, tNew: 20 }
    elec files.bicycles.test:
      root-dir:
        fetch-backend: http
        http-port: lookup(origin.bicycles.test):80
        use-host: origin.bicycles.test
        path-prefix: /webroot
      views-dir: views
"""

both_modes = pytest.mark.parametrize("mode", ["devlove", "internet"])


def lay_out(folder, layout, root=None):
    """Make a site after a layout and return its folder."""
    (folder / "devlove.yaml").write_text(layout)
    (folder / "views").mkdir()
    (folder / "views" / "__index.html").write_bytes(PAGE)
    if root:
        (folder / root / "js").mkdir(parents=True)
        (folder / root / "index.html").write_bytes(PAGE)
        (folder / root / "js" / "app.js").write_bytes(SCRIPT)
    return folder


def checked(folder):
    """Return the domains as `check` shows them, which must accept all."""
    done = subprocess.run(
        [sys.executable, PROGRAM, "check", "--working-dir", folder],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)["domains"]


def nobody_answers(server, mode, path, domain):
    """Assert that an application is wanted, which nobody has started.

    Only devlove mode says where it was looked for.
    """
    for protocol in ("h2", "http/1.1"):
        answer = server.fetch(path, protocol, domain)
        assert answer.status_code in (502, 504)
        assert ("What was tried" in answer.text) is (mode == "devlove")
        if mode == "internet":
            assert len(answer.text) < 200 and str(
                server.folder) not in answer.text


@both_modes
@pytest.mark.parametrize(("layout", "root", "site", "api"), [
    (DJANGO, "www", "www.httpdos.com", "api.httpdos.com"),
    (NODEJS, "client-bin", "www.express-website.mine",
     "myapi.express-website.mine")])
def test_a_site_and_its_api_without_prefixes(
        tmp_path, mode, layout, root, site, api):
    lay_out(tmp_path, layout, root)
    assert set(checked(tmp_path)) == {site, api}
    with Server(tmp_path, mode=mode) as server:
        assert server.fetch("/", domain=site).content == PAGE
        assert server.fetch("/js/app.js", domain=site).content == SCRIPT
        assert server.fetch("/none.js", domain=site).status_code == 404
        for path in ("/", "/cars/?color=red", "/index.html"):
            nobody_answers(server, mode, path, api)


@both_modes
def test_an_elec_domain_with_views_and_consultants(tmp_path, mode):
    lay_out(tmp_path, VIEWS, "public")
    site = "www.bicycles.test"
    consultants = checked(tmp_path)[site]["consultants"]
    assert {name: found["connect-to"]
            for name, found in consultants.items()} == {
        "shop": ["unix:///run/php/shop.sock"], "blog": ["127.0.0.1:8080"]}
    with Server(tmp_path, mode=mode) as server:
        assert server.fetch("/js/app.js", domain=site).content == SCRIPT
        assert server.fetch("/index.html", domain=site).content == PAGE
        # Neither the view nor the domain says which of two it is.
        assert server.fetch("/bikes/", domain=site).content == PAGE
        nobody_answers(server, mode, "/", "api.bicycles.test")


@both_modes
def test_an_edge_whose_statics_are_elsewhere(tmp_path, mode):
    lay_out(tmp_path, REMOTE)
    pages, files = checked(tmp_path).values()
    assert pages["remote-root"] == {"use-consultant": "origin"}
    assert files["remote-root"]["http-port"] == (
        "lookup(origin.bicycles.test):80")
    with Server(tmp_path, mode=mode) as server:
        for site in ("www.bicycles.test", "files.bicycles.test"):
            answer = server.fetch("/css/a.css", domain=site)
            assert answer.status_code == 404
            assert ("origin.bicycles.test" in answer.text) is (
                mode == "devlove")
        nobody_answers(server, mode, "/bikes/", "www.bicycles.test")
        page = server.fetch("/bikes/", domain="files.bicycles.test")
        assert page.content == PAGE
