"""The servers that are compared, each started as its users start it."""

import contextlib
import http.client
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx

HERE = Path(__file__).parent
START_SECONDS = 20
STOP_SECONDS = 15
#: every server may keep an idle connection for so long
IDLE_SECONDS = 900


class Server:
    """One server over one folder; a context manager that ends what it
    started, by process id."""

    name = ""

    def __init__(self, bench, port, workers=1, cores=None):
        """Serves the files of `bench` on a port of 127.0.0.1, with so many
        workers, on some cores ("0,1") or on the one of `bench`."""
        self.bench = bench
        self.port = port
        self.workers = workers
        self.cores = str(bench.server_core if cores is None else cores)
        self.folder = bench.folder / f"{self.name}-{workers}"
        self.log = self.folder / "access.log"
        self.process = None
        #: {process id: processor seconds} when it began to serve
        self.start_cost = {}

    @classmethod
    def program(cls):
        """Path of the program, or None where it is not installed."""
        return shutil.which(cls.name) or shutil.which(
            cls.name, path="/usr/sbin:/usr/local/sbin")

    @classmethod
    def version(cls):
        """What the program says of its version, in one line."""
        return first_line(cls.program(), "--version")

    def prepare(self):
        """Write what the server reads at its start."""

    def command(self):
        """Return the command line, a list of words."""
        raise NotImplementedError

    def __enter__(self):
        self.folder.mkdir()
        self.prepare()
        words = ["taskset", "-c", self.cores, *map(str, self.command())]
        with open(self.folder / "output", "wb") as output:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, cwd=self.folder,
                env=os.environ | {"HOME": str(self.folder)})
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.stop()
            raise
        self.start_cost = self.cpu_by_process()
        return self

    def __exit__(self, *_):
        self.stop()
        shutil.rmtree(self.folder)

    def stop(self):
        """End the server and whatever it started."""
        family = self.processes()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        for pid in family:
            # A pid that ended is free; nothing else takes it this soon.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def processes(self):
        """Return the ids of the server's processes, those of its children
        among them."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(FileNotFoundError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def memory_bytes(self):
        """Return the proportional set size of all processes together."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError):
                total += memory_of(pid, "Pss:")
        return total

    def worker_bytes(self):
        """Return the proportional set size of the process that was busiest
        with serving, a worker, and what it shares with no other process."""
        spent = self.cpu_by_process()
        worker = max(spent, key=lambda pid:
                     spent[pid] - self.start_cost.get(pid, 0))
        return memory_of(worker, "Pss:"), memory_of(worker, "Private_")

    def cpu_seconds(self):
        """Return the processor time of all processes until now."""
        return sum(self.cpu_by_process().values())

    def cpu_by_process(self):
        """Return {process id: processor seconds until now}."""
        spent = {}
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError):
                spent[pid] = cpu_seconds(pid)
        return spent

    def forget_log(self):
        """Make the access log empty, so that no disk fills."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.log, 0)

    def get(self, path):
        """Return the body of an asset, asked for over HTTP/1.1."""
        context = ssl.create_default_context(cafile=self.bench.certificate)
        connection = http.client.HTTPSConnection(
            "localhost", self.port, timeout=5, context=context)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise ConnectionError(f"{self.name}: status {answer.status}")
            return body

    def _wait_until_it_serves(self):
        end = time.monotonic() + START_SECONDS
        while self.process.poll() is None:
            try:
                self.get("/1k.js")
                return
            except OSError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} ended:\n" + (
            self.folder / "output").read_text(errors="replace"))


class Shimmercat(Server):
    """Arbiter, Redis, artisan and workers; the native engine if built."""

    name = "shimmercat"
    engine = "auto"

    @classmethod
    def program(cls):
        """Path of shimmercat.py in this checkout."""
        path = HERE.parent.parent / "shimmercat.py"
        return path if path.exists() else None

    @classmethod
    def version(cls):
        """Version of the checkout and of its Python."""
        text = cls.program().read_text(encoding="utf-8")
        version = text.partition('__version__ = "')[2].partition('"')[0]
        return f"{version}, Python {sys.version.split()[0]}"

    def prepare(self):
        """Write devlove.yaml, and the certificate to where it is looked
        for."""
        (self.folder / "devlove.yaml").write_text(
            "shimmercat-devlove:\n"
            "  domains:\n"
            "    elec localhost:\n"
            f"      root-dir: {self.bench.www}\n")
        scratch = self.folder / ".shimmercat.loves.devs"
        scratch.mkdir(0o700)
        shutil.copy(self.bench.certificate, scratch / "cert.pem")
        for key in ("privkey.pem", "privkey.unencrypted-pkcs8.pem"):
            shutil.copy(self.bench.key, scratch / key)
        # All of the load comes from one address.
        (scratch / "tweaks.yaml").write_text("connections-per-peer: 20000\n")

    def command(self):
        """Internet mode with a log line per request."""
        return [sys.executable, self.program(), "internet",
                "--working-dir", self.folder,
                "--listen", f"127.0.0.1:{self.port}",
                "--workers", self.workers, "--log-file", self.log,
                "--engine", self.engine]


class ShimmercatPython(Shimmercat):
    """The same with the engine in Python."""

    name = "shimmercat-python"
    engine = "python"


class Nginx(Server):
    """Master and workers; the log is buffered."""

    name = "nginx"

    @classmethod
    def version(cls):
        """The line of `nginx -v`."""
        return first_line(cls.program(), "-v").rpartition("/")[2]

    def prepare(self):
        """Write nginx.conf; a thousand requests per connection, the default,
        would end the load's connections."""
        (self.folder / "nginx.conf").write_text(f"""
daemon off;
user root;
worker_processes {self.workers};
worker_rlimit_nofile 20000;
pid {self.folder}/pid;
error_log {self.folder}/error.log;
events {{ worker_connections 19000; }}
http {{
    types {{ text/javascript js; }}
    sendfile on;
    tcp_nopush on;
    access_log {self.log} combined buffer=64k flush=1s;
    keepalive_timeout {IDLE_SECONDS};
    keepalive_requests 1000000000;
    server {{
        listen 127.0.0.1:{self.port} ssl http2 backlog=4096;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_certificate {self.bench.certificate};
        ssl_certificate_key {self.bench.key};
        root {self.bench.www};
    }}
}}
""")

    def command(self):
        """In the foreground, with no file of /etc/nginx."""
        return [self.program(), "-p", self.folder, "-e", "error.log",
                "-c", self.folder / "nginx.conf"]


class H2o(Server):
    """One process with a thread for each worker."""

    name = "h2o"

    @classmethod
    def version(cls):
        """The first line of `h2o --version`."""
        return first_line(cls.program(), "--version").split()[-1]

    def prepare(self):
        """Write h2o.conf."""
        (self.folder / "h2o.conf").write_text(f"""
user: root
num-threads: {self.workers}
max-connections: 19000
http1-request-timeout: {IDLE_SECONDS}
http2-idle-timeout: {IDLE_SECONDS}
access-log: {self.log}
error-log: {self.folder}/error.log
listen:
  host: 127.0.0.1
  port: {self.port}
  ssl:
    certificate-file: {self.bench.certificate}
    key-file: {self.bench.key}
hosts:
  "localhost:{self.port}":
    paths:
      /:
        file.dir: {self.bench.www}
""")

    def command(self):
        """In the foreground."""
        return [self.program(), "-m", "worker", "-c",
                self.folder / "h2o.conf"]


class Nghttpd(Server):
    """One process with a thread for each worker; it has no access log, nor
    HTTP/1.1."""

    name = "nghttpd"

    @classmethod
    def version(cls):
        """The number in the line of `nghttpd --version`."""
        return super().version().rpartition("/")[2]

    def command(self):
        """In the foreground; the log of errors is its output."""
        return [self.program(), "--address", "127.0.0.1",
                "--workers", self.workers, "--htdocs", self.bench.www,
                self.port, self.bench.key, self.bench.certificate]

    def get(self, path):
        """Return the body of an asset, asked for over HTTP/2."""
        context = ssl.create_default_context(cafile=self.bench.certificate)
        with httpx.Client(http2=True, timeout=5, verify=context) as client:
            try:
                answer = client.get(f"https://localhost:{self.port}{path}")
            except httpx.TransportError as error:
                raise ConnectionError(f"{self.name}: {error}") from error
        if answer.status_code != 200:
            raise ConnectionError(
                f"{self.name}: status {answer.status_code}")
        return answer.content


class Caddy(Server):
    """One process; Go's scheduler sees the cores that it is given."""

    name = "caddy"

    @classmethod
    def version(cls):
        """The first word of `caddy version`."""
        return first_line(cls.program(), "version").split()[0]

    def prepare(self):
        """Write the Caddyfile."""
        (self.folder / "Caddyfile").write_text(f"""{{
    admin off
    auto_https off
    servers {{
        protocols h1 h2
        timeouts {{
            idle {IDLE_SECONDS}s
        }}
    }}
}}
https://localhost:{self.port} {{
    bind 127.0.0.1
    tls {self.bench.certificate} {self.bench.key}
    root * {self.bench.www}
    file_server
    log {{
        output file {self.log} {{
            roll_disabled
        }}
    }}
}}
""")

    def command(self):
        """In the foreground."""
        return [self.program(), "run", "--adapter", "caddyfile",
                "--config", self.folder / "Caddyfile"]


class Hypercorn(Server):
    """Parent and workers; the application holds the files in memory."""

    name = "hypercorn"

    @classmethod
    def program(cls):
        """The program of this virtual environment."""
        beside = Path(sys.executable).parent / "hypercorn"
        return beside if beside.exists() else super().program()

    @classmethod
    def version(cls):
        """Version of the installed distribution."""
        text = first_line(
            sys.executable, "-c", "import importlib.metadata as m; "
            "print(m.version('hypercorn'), 'h2', m.version('h2'))")
        return f"{text}, Python {sys.version.split()[0]}"

    def prepare(self):
        """Write the configuration; connections are ended after 5 s by
        default."""
        (self.folder / "hypercorn.toml").write_text(f"""
bind = "127.0.0.1:{self.port}"
certfile = "{self.bench.certificate}"
keyfile = "{self.bench.key}"
workers = {self.workers}
accesslog = "{self.log}"
keep_alive_timeout = {IDLE_SECONDS}
keep_alive_max_requests = 1000000000
""")
        shutil.copy(HERE / "application.py", self.folder)
        (self.folder / "www").symlink_to(self.bench.www)

    def command(self):
        """With asyncio, its default."""
        return [self.program(), "--config", "hypercorn.toml",
                "application:application"]


def memory_of(pid, label):
    """Return the bytes that /proc/PID/smaps_rollup gives under labels that
    begin so."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in rollup.splitlines()
                      if line.startswith(label))


def cpu_seconds(pid):
    """Return utime and stime of a process, all threads together."""
    # The name, in parentheses, may hold blanks.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_line(*words):
    """Return the first line that a program prints, wherever it prints."""
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=20, check=False)
    return done.stdout.decode(errors="replace").partition("\n")[0].strip()


#: in the order of the tables' columns
SERVERS = (Shimmercat, ShimmercatPython, Nginx, H2o, Nghttpd, Caddy,
           Hypercorn)
