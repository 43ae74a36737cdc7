"""Room 19, Command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shimmercat import MESSAGES, OPTIONS, CodeSet, __version__, main

PROGRAM = Path(__file__).parent.parent.parent / "shimmercat.py"
USAGE, SOFTWARE, CONFIG = 64, 70, 78


@pytest.fixture
def folder(tmp_path):
    """A working directory with the smallest site."""
    (tmp_path / "www").mkdir()
    (tmp_path / "devlove.yaml").write_text(
        "shimmercat-devlove:\n  domains:\n    a.test: {root-dir: www}\n")
    return tmp_path


@pytest.fixture
def run(folder):
    """The program, run to its end there, as a function."""
    def of(*arguments, command=(PROGRAM,), **settings):
        return subprocess.run(
            [sys.executable, *command, *arguments], cwd=folder, text=True,
            capture_output=True, timeout=60, check=False, **settings)
    return of


def test_the_help_of_internet_mode_says_what_the_seed_shows(run):
    done = run("internet", "-h")
    assert done.returncode == 0
    assert ("A master mode for monitoring workers and running in the Internet"
            in done.stdout.splitlines())


def test_the_help_of_a_mode_has_its_flags_and_no_others(run):
    words = {mode: set(re.findall(r"--[a-z-]+", run(mode, "-h").stdout))
             for mode in ("devlove", "internet")}
    flags = {option.name for option in OPTIONS if "flag" in option.where}
    both = {option.name for option in OPTIONS if option.where == "flag"}
    assert words["internet"] == {f"--{name}" for name in flags} | {"--help"}
    assert words["devlove"] == {f"--{name}" for name in both} | {"--help"}


def test_the_version_is_told(run):
    assert run("--version").stdout == f"shimmercat {__version__}\n"


@pytest.mark.parametrize(("arguments", "complaint"), [
    ([], "required: MODE"),
    (["intrnet"], "invalid choice: 'intrnet'"),
    (["devlove", "--lisen", "80"],
     "unrecognized arguments: --lisen 80; nearest known: --listen"),
    (["devlove", "--lis", "80"], "unrecognized arguments: --lis"),
    (["devlove", "--workers", "2"], "unrecognized arguments: --workers 2"),
    (["devlove", "--listen"], "expected one argument"),
    (["devlove", "--listen", "here"],
     "argument --listen: got 'here', expected an address like 1.2.3.4:80"),
    (["internet", "-t", "0"], "argument -t/--redirect: got '0', expected an"),
    (["internet", "--workers", "0"],
     "argument --workers: got '0', expected a whole number from 1 to 512"),
    (["internet", "--workers", "many"], "got 'many', expected a whole"),
    (["check", "--log-format", "xml"], "got 'xml', expected text or json"),
    (["check", "--scratch-dir-name", "a/b"], "expected a name without /"),
    (["check", "--log-codes", "connektion"],
     "argument --log-codes: got 'connektion', character 1: found"),
    (["internet", "--apoptosis-seconds", "5"], "got '5', expected MIN-MAX"),
    (["internet", "--apoptosis-seconds", "3600-960"],
     "got '3600-960', expected MIN-MAX"),
    (["messages", "--listen", "80"], "unrecognized arguments"),
])
def test_a_wrong_command_line_is_refused(capsys, arguments, complaint):
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr()
    assert status == USAGE
    assert complaint in said.err
    assert said.out == ""


@pytest.mark.parametrize("seconds", ["1-2", "899-9999"])
def test_a_fast_apoptosis_needs_a_flag_that_is_named_unsafe(
        capsys, folder, seconds):
    words = ["check", "--working-dir", str(folder),
             "--apoptosis-seconds", seconds]
    assert main(words) == USAGE
    assert "expected 900 or more" in capsys.readouterr().err
    assert main([*words, "--unsafe-fast-apoptosis"]) == 0


def test_internet_mode_refuses_a_fast_apoptosis_too(run):
    done = run("internet", "--apoptosis-seconds", "1-2")
    assert done.returncode == USAGE
    assert "--unsafe-fast-apoptosis" in done.stderr


def test_check_prints_what_the_configuration_means(run, folder):
    (folder / "devlove.yaml").write_text("""
shimmercat-devlove:
  domains:
    elec www.a.test:
      root-dir: {use-consultant: shop}
      views-dir: www
      change-url: [/a -> /b]
      consultants:
        shop: {connect-to: ["8080", "[::1]:81"], application-protocol: https}
    API.a.test: {port: 9000}
""")
    done = run("check", "-t", "0.0.0.0:80", "--workers", "7")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["working-dir"] == str(folder)
    assert found["listen"] == "0.0.0.0:4043"
    assert found["redirect"] == "0.0.0.0:80"
    assert found["workers"] == 7
    assert found["log-codes"].split()[0] == "M10001"
    assert "log-file" not in found
    web, api = found["domains"].values()
    assert web["remote-root"] == {"use-consultant": "shop"}
    assert web["views-dir"] == f"{folder}/www"
    assert web["change-url"] == ["/a -> /b"]
    assert web["consultants"]["shop"] == {
        "name": "shop", "application-protocol": "https", "verify": True,
        "connect-to": ["127.0.0.1:8080", "[::1]:81"],
        "max-connections": 256, "first-byte-timeout": 300}
    assert api == {
        "name": "api.a.test", "kind": "api", "consultants": {"api.a.test": {
            "name": "api.a.test", "connect-to": ["127.0.0.1:9000"],
            "application-protocol": "http", "verify": True,
            "max-connections": 256, "first-byte-timeout": 300}},
        "place": f"{folder}/devlove.yaml:10", "prob-accelerator-kicks-in": 1,
        "bot-protection-enabled": False}


def test_check_prints_all_tweaks_with_their_effective_values(run, folder):
    scratch = folder / ".shimmercat.loves.devs"
    scratch.mkdir()
    (scratch / "tweaks.yaml").write_text(
        "max-body-bytes: 2 MiB\ntrusted-proxies: [10.0.0.0/8, unix]\n")
    tweaks = json.loads(run("check").stdout)["tweaks"]
    assert tweaks == {option.name: option.default for option in OPTIONS
                      if option.where == "tweak"} | {
                          "max-body-bytes": 2 << 20,
                          "trusted-proxies": ["10.0.0.0/8", "unix"]}


def test_check_makes_nothing(run, folder):
    before = sorted(folder.rglob("*"))
    assert run("check").returncode == 0
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("mode", ["check", "devlove", "internet"])
def test_all_mistakes_are_told_in_short_lines(run, folder, mode):
    (folder / "devlove.yaml").write_text("""
shimmercat-devlove:
  domains:
    a.test: {root-dri: www}
    b.test: {port: much}
""")
    done = run(mode)
    assert done.returncode == CONFIG
    assert done.stdout == ""
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        f"{folder}/devlove.yaml:{line}" for line in (4, 4, 5)]


def test_the_mistakes_of_views_are_among_them(run, folder):
    (folder / "devlove.yaml").write_text("""
shimmercat-devlove:
  domains:
    a.test: {root-dir: www, images: loud}
""")
    (folder / "www" / "__index.html").write_text(
        "<!-- shimmercat:\n  change-url: [/a, / -> b] -->")
    done = run("check")
    assert done.returncode == CONFIG
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        f"{folder}/devlove.yaml:4", f"{folder}/www/__index.html:2",
        f"{folder}/www/__index.html:2"]


def test_explain_shows_the_rules_and_asks_nobody(capsys, folder):
    (folder / "devlove.yaml").write_text("""
shimmercat-devlove:
  domains:
    a.test:
      root-dir: www
      consultant: {connect-to: "127.0.0.1:1"}
      change-url: [/x -> /y, /*.php -> dynamic /php/$1/]
""")
    (folder / "www" / "php").mkdir()
    view = folder / "www" / "php" / "__index.html"
    view.write_text("<!--\nshimmercat:\n  change-url:"
                    " [/php/*/ -> /$1.php]\n-->")
    assert main(["explain", "a.test/shop.php?id=5", "--working-dir",
                 str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        f"rule 2 of {folder}/devlove.yaml:4 (/*.php -> dynamic /php/$1/)"
        " makes /php/shop/?id=5 of /shop.php?id=5",
        f"view {view}, replace",
        f"rule 1 of {view} (/php/*/ -> /$1.php) makes /shop.php?id=5 of"
        " /php/shop/?id=5",
        "consultant default at 127.0.0.1:1 is asked: GET /shop.php?id=5",
        "the answer is up to the consultant, which was not asked"]


def test_a_folder_without_a_configuration_is_told_where_it_belongs(
        run, folder):
    done = run("devlove", "--working-dir", "www")
    assert done.returncode == CONFIG
    assert done.stderr == (f"{folder}/www/devlove.yaml: cannot be read:"
                           " No such file or directory\n")


def test_check_names_a_certificate_that_is_none(run, folder):
    scratch = folder / ".shimmercat.loves.devs"
    scratch.mkdir()
    (scratch / "cert.pem").write_text("nonsense")
    done = run("check")
    assert done.returncode == CONFIG
    assert f"{scratch}/cert.pem" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", [
    "a.test", "a.test/", "a.test:4043/a b.css#part", "https://a.test/?q=\u00e4",
    "HTTPS://A.test/a%20b.css"])
def test_explain_takes_what_people_type(capsys, folder, url):
    for name in ("index.html", "a b.css"):
        (folder / "www" / name).write_text("hello")
    words = ["--working-dir", str(folder)]
    assert main(["explain", url, *words]) == 0
    assert "\n200 OK: static, identity\n" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "complaint"), [
    (["http://a.test/"], "expected one like https://a.test/ or a.test/"),
    (["/style.css"], "expected one like https://a.test/ or a.test/"),
    ([""], "expected one like https://a.test/ or a.test/"),
    (["https://a..b/"], "URL or --header: "),
    (["https://[::1/"], "URL: got 'https://[::1/': "),
    (["a.test", "--header", "accept"], "expected NAME:VALUE")])
def test_explain_tells_what_is_no_url_and_no_field(
        capsys, folder, words, complaint):
    assert main(["explain", *words, "--working-dir", str(folder)]) == USAGE
    said = capsys.readouterr()
    assert complaint in said.err and len(said.err.splitlines()) == 1
    assert not said.out


def test_the_file_runs_alone(run, folder):
    shutil.copy(PROGRAM, folder)
    done = run("check", command=("-I", "shimmercat.py"))
    assert done.returncode == 0, done.stderr


def test_messages_lists_every_code_and_every_set(run):
    text = run("messages").stdout
    for code, message in MESSAGES.items():
        assert f"M{code:05}  " in text
        assert message.meaning in text
    for name in CodeSet.NAMED:
        assert f"\n{name}:" in text


def test_messages_may_be_cut_short_by_its_reader(folder):
    command = f"{sys.executable} {PROGRAM} messages | head -n 1"
    done = subprocess.run(["sh", "-c", command], text=True, timeout=60,
                          capture_output=True, check=True)
    assert done.stderr == ""


def test_a_process_without_patches_is_refused(run, folder):
    code = "import sys, shimmercat; sys.exit(shimmercat.main(['devlove']))"
    done = run(command=("-c", code), env=with_program_in_path())
    assert done.returncode == SOFTWARE
    assert "gevent has not patched this process" in done.stderr


def test_who_imported_ssl_before_the_patches_is_named(run, folder):
    (folder / "early.py").write_text("from ssl import SSLContext\n")
    code = ("import sys, early; from gevent import monkey;"
            " monkey.patch_all(); import shimmercat;"
            " sys.exit(shimmercat.main(['internet']))")
    done = run(command=("-c", code), env=with_program_in_path())
    assert done.returncode == SOFTWARE
    assert ("ssl was imported before gevent patched it, by early"
            in done.stderr)


def with_program_in_path():
    """An environment where `import shimmercat` finds the program."""
    return {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
