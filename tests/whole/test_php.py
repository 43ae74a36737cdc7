"""PHP behind shimmercat: a real php-fpm, asked over FastCGI."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading

import harness
import httpx
import pytest
import zoo

FPM = next(iter(sorted(glob.glob("/usr/sbin/php-fpm*"))), None)
pytestmark = pytest.mark.skipif(FPM is None, reason="no php-fpm")

SCRIPTS = {
    "index.php": "<?php echo 'home of ', $_SERVER['REQUEST_URI'];",
    "vars.php": "<?php header('content-type: application/json');"
    " echo json_encode($_SERVER);",
    "upload.php": "<?php $text = file_get_contents('php://input');"
    " echo strlen($text), ' ', hash('sha256', $text), ' ',"
    " $_SERVER['CONTENT_LENGTH'], ' ', $_SERVER['CONTENT_TYPE'] ?? '-';",
    "form.php": "<?php move_uploaded_file($_FILES['f']['tmp_name'],"
    " '/dev/null'); echo $_POST['a'], ' ', $_FILES['f']['size'];",
    "big.php": "<?php header('content-length: ' . (64 << 20));"
    " for ($i = 0; $i < 1024; $i++) echo str_repeat('x', 65536);",
    "endless.php": "<?php for (;;) { echo str_repeat('x', 65536); flush(); }",
    "events.php": "<?php header('content-type: text/event-stream');"
    " foreach ([1, 2, 3] as $n) { echo \"data: $n\\n\\n\"; @ob_flush();"
    " flush(); while (!file_exists(__DIR__ . \"/go$n\")) { usleep(10000);"
    " clearstatcache(); } }",
    "head.php": "<?php http_response_code(418); header('x-odd: 1');"
    " header('set-cookie: a=1', false); header('set-cookie: b=2', false);"
    " header('transfer-encoding: chunked'); echo 'short';",
    "go.php": "<?php header('location: /elsewhere/');",
    "warn.php": "<?php error_log(\"bad\\nforged\\x1b line\"); echo 'warned';",
    "pid.php": "<?php header('content-type: text/plain'); echo getmypid();",
    "die.php": "<?php header('content-length: 1000000');"
    " echo str_repeat('x', 100000); @ob_flush(); flush();"
    " posix_kill(getmypid(), 9); sleep(9);",
    "lie.php": "<?php header('content-length: 1000'); echo 'short';",
    "slow.php": "<?php sleep(4);",
}

#: those of nginx's fastcgi_params that are the same for each site, for a
#: POST to /vars.php/rest/?q
FASTCGI_PARAMS = {
    "QUERY_STRING": "q", "REQUEST_METHOD": "POST",
    "CONTENT_TYPE": "text/x-odd", "CONTENT_LENGTH": "2",
    "SCRIPT_NAME": "/vars.php", "REQUEST_URI": "/vars.php/rest/?q",
    "DOCUMENT_URI": "/vars.php/rest/", "SERVER_PROTOCOL": "HTTP/1.1",
    "REQUEST_SCHEME": "https", "HTTPS": "on", "GATEWAY_INTERFACE": "CGI/1.1",
    "REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": None,
    "SERVER_ADDR": "127.0.0.1", "SERVER_PORT": "8443", "SERVER_NAME": None,
    "REDIRECT_STATUS": "200"}


@contextlib.contextmanager
def running_fpm(folder, listen, children):
    """php-fpm at an address; give its process."""
    (folder / "fpm.conf").write_text(
        f"[global]\nerror_log = {folder}/fpm.log\ndaemonize = no\n"
        f"[www]\nlisten = {listen}\npm = static\nuser = {os.geteuid()}\n"
        f"pm.max_children = {children}\ncatch_workers_output = no\n"
        "php_admin_flag[log_errors] = on\nphp_flag[output_buffering] = off\n"
        "php_value[post_max_size] = 64M\nphp_value[memory_limit] = 256M\n"
        "php_value[upload_max_filesize] = 64M\n")
    process = subprocess.Popen(
        [FPM, "-F", "-R", "-y", str(folder / "fpm.conf")],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=harness._die_with_parent)
    try:
        harness.eventually(lambda: "ready to handle" in (
            folder / "fpm.log").read_text() if (
            folder / "fpm.log").exists() else False, 20)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A site with scripts."""
    folder = tmp_path_factory.mktemp("php")
    harness.make_site(folder, {"style.css": b"a {}"})
    (folder / "app").mkdir()
    for name, text in SCRIPTS.items():
        (folder / "app" / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def fpm(home):
    """php-fpm on a Unix socket."""
    with running_fpm(home, home / "fpm.sock", children=6) as process:
        yield process


def configure(folder, address, protocol="fastcgi", more=""):
    """Write devlove.yaml of a site behind php-fpm."""
    (folder / "devlove.yaml").write_text(f"""
shimmercat-devlove:
  domains:
    {harness.DOMAIN}:
      root-dir: www
      change-url:
        - /*.php -> dynamic /$1.php
      consultant:
        connect-to: {address}
        application-protocol: {protocol}
        document-root: {folder}/app
        first-byte-timeout: 2
        {more}
    api.example.test:
      port: {address}
      application-protocol: {protocol}
      document-root: {folder}/app
""")


@pytest.fixture(scope="module")
def server(home, fpm):
    configure(home, f"unix://{home}/fpm.sock")
    with harness.Server(home, "--workers", "2") as running:
        yield running


def memory(server):
    """Return the resident bytes of the workers."""
    return sum(
        int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        for pid in server.workers().values())


def test_a_folder_is_answered_by_its_index(server):
    answer = server.fetch("/?a=b")
    assert answer.status_code == 200
    assert answer.text == "home of /?a=b"


def test_all_of_an_api_domain_may_be_of_php(server):
    answer = server.fetch("/index.php/style.css", domain="api.example.test")
    assert answer.text == "home of /index.php/style.css"


def test_statics_are_not_asked_for(server):
    assert server.fetch("/style.css").headers["content-type"].startswith(
        "text/css")


def test_variables_are_those_that_php_needs(server, home):
    answer = server.fetch("/vars.php/a%20b/c/?x=1&y=%20", headers={
        "x-one": "1", "proxy": "evil:80", "x_under": "1",
        "authorization": "Basic eDp5", "cookie": "a=1; b=2",
        "accept-language": "sv"})
    told = json.loads(answer.text)
    assert {name: told.get(name) for name in (
        "SCRIPT_NAME", "SCRIPT_FILENAME", "DOCUMENT_ROOT", "PATH_INFO",
        "QUERY_STRING", "REQUEST_URI", "REQUEST_METHOD", "HTTPS",
        "SERVER_NAME", "SERVER_PORT", "REMOTE_HOST", "GATEWAY_INTERFACE",
        "REDIRECT_STATUS", "HTTP_HOST", "HTTP_X_ONE", "HTTP_COOKIE",
        "HTTP_AUTHORIZATION", "PHP_AUTH_USER", "HTTP_X_FORWARDED_PROTO",
        "HTTP_ACCEPT_LANGUAGE")} == {
        "SCRIPT_NAME": "/vars.php",
        "SCRIPT_FILENAME": f"{home}/app/vars.php",
        "DOCUMENT_ROOT": f"{home}/app", "PATH_INFO": "/a b/c/",
        "QUERY_STRING": "x=1&y=%20",
        "REQUEST_URI": "/vars.php/a%20b/c/?x=1&y=%20",
        "REQUEST_METHOD": "GET", "HTTPS": "on",
        "SERVER_NAME": harness.DOMAIN, "SERVER_PORT": "443",
        "REMOTE_HOST": "127.0.0.1", "GATEWAY_INTERFACE": "CGI/1.1",
        "REDIRECT_STATUS": "200", "HTTP_HOST": harness.DOMAIN,
        "HTTP_X_ONE": "1", "HTTP_COOKIE": "a=1; b=2",
        "HTTP_AUTHORIZATION": "Basic eDp5", "PHP_AUTH_USER": "x",
        "HTTP_X_FORWARDED_PROTO": "https", "HTTP_ACCEPT_LANGUAGE": "sv"}
    assert not {"HTTP_PROXY", "HTTP_X_UNDER"} & told.keys()


def test_php_gets_all_that_nginx_gives_it(server):
    with server.connect("http/1.1") as client:
        port = client.getsockname()[1]
        client.sendall(f"POST /vars.php/rest/?q HTTP/1.1\r\nhost: "
                       f"{harness.DOMAIN}:8443\r\ncontent-length: 2\r\n"
                       "content-type: text/x-odd\r\nconnection: close\r\n\r\n"
                       "{}".encode())
        told = json.loads(client.makefile("rb").read().partition(
            b"\r\n\r\n")[2])
    assert {name: told.get(name) for name in FASTCGI_PARAMS} == {
        **FASTCGI_PARAMS, "REMOTE_PORT": str(port),
        "SERVER_NAME": harness.DOMAIN}
    assert told["SERVER_SOFTWARE"].startswith("shimmercat/")


@pytest.mark.parametrize("path", [
    "/vars.php/../x/", "/a//vars.php/", "/%2e%2e/vars.php/", "/.env/",
    "/a%2fb.php/", "/a%00.php/"])
def test_paths_that_lead_elsewhere_are_not_asked_for(server, path):
    with server.connect() as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nhost: {harness.DOMAIN}\r\n"
                       "connection: close\r\n\r\n".encode())
        assert client.makefile("rb").readline().split()[1] in (b"400", b"404")


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_status_and_fields_are_passed_on(server, protocol):
    answer = server.fetch("/head.php", protocol)
    assert (answer.status_code, answer.text) == (418, "short")
    assert answer.headers["x-odd"] == "1"
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "status" not in answer.headers


def test_a_location_without_a_status_redirects(server):
    answer = server.fetch("/go.php")
    assert (answer.status_code, answer.headers["location"]) == (
        302, "/elsewhere/")


def test_head_has_no_body_and_the_connection_goes_on(server):
    with server.client("http/1.1") as client:
        for _ in range(3):
            assert client.head("/big.php").headers["content-length"] == str(
                64 << 20)
            assert client.get("/").text == "home of /"


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_an_upload_arrives_whole(server, protocol):
    body = os.urandom(3 << 20)
    with server.client(protocol) as client:
        answer = client.post("/upload.php", content=body)
    assert answer.text.split() == [
        str(len(body)), hashlib.sha256(body).hexdigest(), str(len(body)), "-"]


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_an_upload_of_unknown_length_gets_its_length(server, protocol):
    pieces = [os.urandom(100_000) for _ in range(11)]
    with server.client(protocol) as client:
        answer = client.post("/upload.php", content=iter(pieces))
    assert answer.text.split()[:3] == [
        "1100000", hashlib.sha256(b"".join(pieces)).hexdigest(), "1100000"]


def test_an_upload_of_nothing_has_a_length(server):
    with server.client() as client:
        answer = client.post("/upload.php", content=b"")
    assert answer.text.split()[0] == "0"


def test_a_form_with_a_file_is_understood(server):
    with server.client() as client:
        answer = client.post("/form.php", data={"a": "b"},
                             files={"f": ("x.bin", b"x" * 300_000)})
    assert answer.text == "b 300000"


def test_an_upload_that_waits_for_100_is_asked_for(server):
    done = subprocess.run(
        ["curl", "-sk", "--http1.1", "--expect100-timeout", "15", "-H",
         "Expect: 100-continue", "--data-binary", "hello", "--resolve",
         f"{harness.DOMAIN}:{server.port}:127.0.0.1",
         f"https://{harness.DOMAIN}:{server.port}/upload.php"],
        capture_output=True, timeout=30)
    assert done.stdout.startswith(b"5 2cf24d"), done


def test_a_big_answer_passes_in_bounded_memory(server):
    before = memory(server)
    with server.client() as client, client.stream("GET", "/big.php") as got:
        total, most = 0, 0
        for n, piece in enumerate(got.iter_raw(1 << 20)):
            total += len(piece)
            if n % 8 == 0:
                most = max(most, memory(server))
    assert total == 64 << 20
    assert most - before < 24 << 20


def test_events_come_as_they_are_sent(server, home):
    for n in (1, 2, 3):
        (home / "app" / f"go{n}").unlink(missing_ok=True)
    with server.client() as client, client.stream(
            "GET", "/events.php") as answer:
        pieces = answer.iter_raw()
        for n in (1, 2, 3):
            assert next(pieces) == f"data: {n}\n\n".encode()
            (home / "app" / f"go{n}").touch()
        assert not b"".join(pieces)


def test_what_php_complains_of_is_in_the_log(server):
    assert server.fetch("/warn.php").text == "warned"
    line = server.await_line("M40028")[-1]
    assert "bad" in line.message
    assert "\x1b" not in line.text
    assert not [x for x in server.lines() if x.text.startswith("forged")]


def test_a_script_that_is_not_there_is_a_404_of_php(server):
    answer = server.fetch("/absent.php")
    assert answer.status_code == 404
    assert "File not found" in answer.text


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
@pytest.mark.parametrize("script", ["die", "lie"])
def test_an_answer_that_breaks_off_is_not_taken_for_whole(
        server, protocol, script):
    with pytest.raises(httpx.HTTPError), server.client(protocol) as client:
        answer = client.get(f"/{script}.php")
        # What had not been passed on yet is an error of its own.
        answer.raise_for_status()
    harness.eventually(lambda: [
        line for line in server.lines() if line.code in ("M40017", "M40023")
        and ("cut off" in line.message or "answer" in line.message)])
    assert server.fetch("/").text == "home of /"


def test_a_script_that_takes_too_long_is_a_504(server):
    assert server.fetch("/slow.php").status_code == 504


def test_a_client_that_leaves_frees_the_process(server):
    for _ in range(3):
        with server.client() as client, client.stream(
                "GET", "/endless.php") as answer:
            next(answer.iter_raw())
    assert server.fetch("/").text == "home of /"


def test_connections_are_used_again(server):
    with server.client("http/1.1") as client:
        count = 40
        pids = [client.get("/pid.php").text for _ in range(count)]
    assert len(set(pids)) < count


def test_workers_do_not_keep_each_other_from_php(tmp_path, home):
    folder = tmp_path / "site"
    shutil.copytree(home / "www", folder / "www")
    port = harness.free_port()
    configure(folder, f"127.0.0.1:{port}")
    text = (folder / "devlove.yaml").read_text()
    (folder / "devlove.yaml").write_text(
        text.replace(f"{folder}/app", f"{home}/app"))
    with running_fpm(tmp_path, f"127.0.0.1:{port}", children=1), \
            harness.Server(folder, "--workers", "2") as server:
        answers = []

        def ask():
            for _ in range(10):
                answers.append(server.fetch("/pid.php").status_code)

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert answers == [200] * 40


def test_php_that_is_not_there_is_a_502_and_the_log_says_why(tmp_path):
    harness.make_site(tmp_path)
    (tmp_path / "www" / "index.html").unlink()
    configure(tmp_path, f"127.0.0.1:{harness.free_port()}")
    with harness.Server(tmp_path, "--workers", "1") as server:
        assert server.fetch("/").status_code == 502
        assert "refused" in server.await_line("M40023")[-1].message


def test_a_backend_that_speaks_http_is_a_502(tmp_path):
    harness.make_site(tmp_path)
    (tmp_path / "www" / "index.html").unlink()
    with zoo.Origin(lambda asked: zoo.answer(b"hello")) as origin:
        configure(tmp_path, f"127.0.0.1:{origin.port}")
        with harness.Server(tmp_path, "--workers", "1") as server:
            assert server.fetch("/").status_code in (502, 504)
