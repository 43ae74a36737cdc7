"""What tests share: the program started as a user starts it, and patience.

Nothing here knows the inside of shimmercat: only commands, signals, files,
sockets and /proc.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import time
import uuid

import httpx
import pytest

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / "shimmercat.py"
DEMO = PROGRAM.parent / "conf" / "demo"
DOMAIN = "www.example.test"

#: name of the variable by which a server's processes are known in /proc,
#: whatever becomes of their parents
_MARK = "SHIMMERCAT_TEST_MARK"
#: what all servers get for --engine, where a test does not say it
_ENGINE = os.environ.get("SHIMMERCAT_TEST_ENGINE")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def eventually(predicate, seconds=10.0, what=None):
    """Wait for `predicate` to become true and return its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        assert time.monotonic() < deadline, (
            f"not within {seconds} s: {what or predicate}")
        time.sleep(0.01)


def free_port():
    """Return a port on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_site(folder, files=None, tweaks=None, domain=DOMAIN):
    """Make a site of one domain in `folder` and return the folder."""
    files = files or {"index.html": b"<h1>Hello</h1>\n"}
    for name, content in files.items():
        path = folder / "www" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "devlove.yaml").write_text(
        "shimmercat-devlove:\n  domains:\n"
        f"    {domain}:\n      root-dir: www\n")
    if tweaks:
        scratch = folder / ".shimmercat.loves.devs"
        scratch.mkdir(mode=0o700, exist_ok=True)
        (scratch / "tweaks.yaml").write_text(
            "".join(f"{key}: {value}\n" for key, value in tweaks.items()))
    return folder


def copy_demo(folder):
    """Copy the demo site into an empty folder; return the folder."""
    shutil.copytree(DEMO, folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(".*", "output-*"))
    return folder


def is_alive(pid):
    """Return whether a process runs (a zombie does not)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] not in "ZX"
    return False


def _die_with_parent():
    """Have the server end even when pytest is killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Line:
    """One line of the server's log."""

    def __init__(self, text):
        self.text = text
        found = re.match(r"\S+ \S+ (M\d{5}) (\S+) +(.*)", text, re.DOTALL)
        self.code, self.worker, self.message = (
            found.groups() if found else ("", "", text))

    def __repr__(self):
        return self.text


class Server:
    """The program, run as a user runs it, in the folder of a site.

    A context manager: entered when the program has said that it is ready; on
    leaving it gets TERM, must end with status 0, and must leave no process.
    Tests that end it themselves say how with `wait`.
    """

    def __init__(self, folder, *flags, mode="internet", program=PROGRAM,
                 environment=None, stdout=None, port=None, pass_fds=(),
                 through=()):
        self.folder, self.mode = pathlib.Path(folder), mode
        self.port = port or free_port()
        self.mark = uuid.uuid4().hex
        self.status = None
        self.output = self.folder / f"output-{self.mark[:8]}.txt"
        self._stdout = stdout
        self._pass_fds = pass_fds
        self._environment = {**os.environ, **(environment or {}),
                             _MARK: self.mark}
        self._command = [*through, sys.executable, str(program), mode, *flags]
        if not any(flag.startswith("--listen") for flag in flags):
            self._command += ["--listen", f"127.0.0.1:{self.port}"]
        if _ENGINE and "--engine" not in flags:
            self._command += ["--engine", _ENGINE]

    def __enter__(self):
        self.start()
        try:
            self.await_line("M50003", seconds=30)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind, error, trace):
        try:
            if self.status is None:
                self.signal(signal.SIGTERM)
                self.wait(60)
        finally:
            self.kill()
        if kind is None:
            assert self.status == 0, self.explained("bad end")

    def start(self):
        """Start the program without waiting for anything."""
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=self.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=self._stdout or output,
                stderr=output, pass_fds=self._pass_fds,
                preexec_fn=_die_with_parent)
        self.pid = self.process.pid

    def signal(self, number):
        """Send a signal to the first process."""
        os.kill(self.pid, number)

    def wait(self, seconds=15.0):
        """Wait for the end of all processes; return the first one's status."""
        self.status = self.process.wait(seconds)
        eventually(lambda: not self.processes(), seconds,
                   f"end of {self.processes()}")
        return self.status

    def kill(self):
        """End what is left, hard; the harness's last resort."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(10)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self):
        """Return the ids of all processes of this server that are alive."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if self._owns(entry) and is_alive(entry.name):
                        found.append(int(entry.name))
        return found

    def _owns(self, entry):
        """Return whether a process is ours; Redis overwrites its variables."""
        if (entry / "comm").read_text() == "redis-server\n":
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            return (int(parent) == self.pid
                    or ("redis", int(entry.name)) in self.started())
        return self.mark.encode() in (entry / "environ").read_bytes()

    def lines(self, code=None, about=""):
        """Return the log so far, or its lines with a code, about a name."""
        text = self.output.read_text(errors="replace")
        found = [Line(line) for line in text.split("\n")[:-1]]
        return [line for line in found if code in (None, line.code)
                and line.message.startswith(about)]

    def await_line(self, code, count=1, seconds=10.0, about=""):
        """Wait until `count` such lines were written; return them."""
        def has_come():
            found = self.lines(code, about)
            if len(found) < count:
                assert self.process.poll() is None, self.explained(
                    f"ended before {code}")
            return found if len(found) >= count else None
        try:
            return eventually(has_come, seconds, code)
        except AssertionError as error:
            raise AssertionError(self.explained(error)) from None

    def explained(self, problem):
        """Return a text about a problem that shows what the program said."""
        said = self.output.read_text(errors="replace")[-8000:]
        return f"{problem}; status {self.process.poll()}; it said:\n{said}"

    def workers(self):
        """Return {name: process id} of the workers that are alive."""
        return {name: pid for name, pid in self.started()
                if name[0] == "w" and is_alive(pid)}

    def started(self):
        """Return (name, process id) of all children so far, in order."""
        said = [line.message.split() for line in self.lines("M20001")]
        return [(words[0], int(words[-1])) for words in said]

    def artisan(self):
        """Return the process id of the artisan."""
        return dict(self.started())["artisan"]

    def redis(self):
        """Return the process id of Redis, or None while there is none."""
        pid = dict(self.started()).get("redis")
        return pid if pid and is_alive(pid) else None

    def memory(self):
        """Bytes of the process that serves, or of one of them (PSS)."""
        pid = (self.pid if self.mode == "devlove"
               else next(iter(self.workers().values())))
        rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * int(rollup.partition("\nPss:")[2].split()[0])

    def client(self, protocol="h2", domain=DOMAIN, **options):
        """Return an httpx.Client that trusts the development CA."""
        options.setdefault("timeout", 20)
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}",
            http1=protocol == "http/1.1", http2=protocol == "h2",
            verify=trusting_context(), trust_env=False,
            headers={"host": domain}, **options)

    def fetch(self, path="/", protocol="h2", domain=DOMAIN, **options):
        """Return the response to a GET over a connection of its own.

        A worker that leaves says GOAWAY, which is no error to browsers, but
        is one to httpx: then the request is made once more.
        """
        def once():
            with self.client(protocol, domain) as client:
                return client.get(
                    path, extensions={"sni_hostname": domain}, **options)
        try:
            return once()
        except httpx.RemoteProtocolError as error:
            if "ConnectionTerminated error_code:0" not in str(error):
                raise
        return once()

    def connect(self, protocol="http/1.1", domain=DOMAIN):
        """Return a raw TLS socket; the caller closes it."""
        context = trusting_context()
        context.set_alpn_protocols([protocol])
        plain = socket.create_connection(("127.0.0.1", self.port), 20)
        return context.wrap_socket(plain, server_hostname=domain)


def authority_file():
    """Return the certificate of the development CA that tests use."""
    folder = pathlib.Path(os.environ["XDG_CONFIG_HOME"], "shimmercat")
    return next(folder.glob("ca_root_*.pem"))


def trusting_context():
    """Return a client's TLS context that trusts the development CA only."""
    return ssl.create_default_context(cafile=str(authority_file()))


def json_lines(text):
    """Return the objects of a log in JSON."""
    return [json.loads(line) for line in text.splitlines()]


#: makes `module` of the compiled file, and `letters` to choose at random
SANITIZED = """
import importlib.util, random, sys
spec = importlib.util.spec_from_file_location(
    "shimmercat_ext.native." + sys.argv[1].split("/")[-1][:-3], sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
letters = random.Random(int(sys.argv[2]))
"""


def run_sanitized(folder, name, driver, *words):
    """Run Python code on a native module built with the sanitizers.

    The code knows `module`, `letters`, a random.Random, and sys.argv[3:].
    """
    if not shutil.which("gcc"):
        pytest.skip("no compiler")
    source = PROGRAM.parent / "shimmercat_ext" / "native" / f"{name}.c"
    module = folder / f"{name}.so"
    subprocess.run(
        ["gcc", "-std=c11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
         "-fno-strict-aliasing", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined", "-fPIC", "-shared",
         f"-I{sysconfig.get_paths()['include']}", str(source),
         "-o", str(module)],
        check=True, timeout=120)
    libraries = [subprocess.check_output(
        ["gcc", f"-print-file-name={library}"], text=True).strip()
        for library in ("libasan.so", "libubsan.so")]
    run = subprocess.run(
        [sys.executable, "-c", SANITIZED + driver, str(module),
         str(random.randrange(1 << 30)), *words],
        env={**os.environ, "LD_PRELOAD": " ".join(libraries),
             "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]


@contextlib.contextmanager
def running_redis(folder):
    """Run a Redis on a Unix socket in `folder`; give the socket's path."""
    path = folder / "redis.sock"
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(path),
         "--save", "", "--appendonly", "no", "--dir", str(folder)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        preexec_fn=_die_with_parent)
    try:
        eventually(lambda: process.poll() is None and _answers(path))
        yield path
    finally:
        process.terminate()
        process.wait(10)


def _answers(path):
    """Return whether somebody accepts connections at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
