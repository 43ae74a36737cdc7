"""Under load: a killed worker costs its own connections, TERM costs none.

The proof for kills.  Every run of h2load here has one connection only.  A
victim is stopped first, so that its set of connections cannot change; the
kernel's table tells their other ends, and /proc whose they are.  Then the
victim is killed.  A run whose connection was in such a set may fail; any
failure of another run is a request that the program has lost.  Connections
that wait in the queue of the victim's listener are in no such set: they must
be served by its successor.
"""

import concurrent.futures
import contextlib
import os
import random
import re
import selectors
import shutil
import signal
import subprocess
import threading

import pytest
from h2_client import H2Client
from harness import DOMAIN, Server, eventually, is_alive, make_site

KILLS = 100
RUNS_PER_KILL = 3
REQUESTS_PER_RUN = 60
#: more runs than this mean that the kills do not come forward
MOST_RUNS_PER_SLOT = 2000
SMALL = b"<h1>Hello</h1>\n" * 60
BIG = os.urandom(20 << 20)


def h2load(server, *flags):
    """Start h2load for the site's first page."""
    return subprocess.Popen(
        ["h2load", f"--connect-to=127.0.0.1:{server.port}", *flags,
         f"https://{DOMAIN}:{server.port}/"], text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)


def counts(said):
    """Return how many requests h2load says it started, finished, and so on."""
    line = re.search(r"^requests: .*$", said, re.MULTILINE)[0]
    return {word: int(count)
            for count, word in re.findall(r"(\d+) (\w+)", line)}


class Load:
    """Runs of h2load, each with one connection, some of them at any time."""

    def __init__(self, server, slots):
        self._server = server
        self._slots = slots
        self._stop = threading.Event()
        #: running h2load by its process id
        self.running = {}
        #: pairs of process and output
        self.finished = []
        #: processes whose connection was a killed worker's
        self.cut = set()

    def __enter__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(self._slots)
        self._threads = [
            self._pool.submit(self._run) for _ in range(self._slots)]
        return self

    def __exit__(self, *failure):
        self._stop.set()
        self._pool.shutdown()
        for thread in self._threads:
            thread.result()

    def _run(self):
        for _ in range(MOST_RUNS_PER_SLOT):
            if self._stop.is_set():
                return
            process = h2load(self._server, "-c1", "-m4",
                             f"-n{REQUESTS_PER_RUN}",
                             "--connection-inactivity-timeout=10")
            self.running[process.pid] = process
            try:
                said, _ = process.communicate(timeout=60)
            finally:
                process.kill()
                del self.running[process.pid]
            self.finished.append((process, said))

    def mark_cut(self, worker):
        """Remember the runs whose connection a stopped worker has."""
        port = self._server.port
        ends = {remote for local, remote, inode in connections()
                if local == port and inode in sockets_of(worker)}
        theirs = {inode for local, remote, inode in connections()
                  if remote == port and local in ends}
        for pid, process in tuple(self.running.items()):
            if theirs & sockets_of(pid):
                self.cut.add(process)


def connections():
    """Return (local port, remote port, inode) of the host's connections."""
    found = set()
    # Twice: rows may slip through while others leave the table.
    for _ in range(2):
        with open("/proc/net/tcp") as table:
            for row in table.read().splitlines()[1:]:
                words = row.split()
                local, remote = (int(place.partition(":")[2], 16)
                                 for place in words[1:3])
                found.add((local, remote, words[9]))
    return found


def sockets_of(pid):
    """Return the inodes of a process's sockets."""
    found = set()
    # It may end at any moment.
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                found.update(re.findall(r"^socket:\[(\d+)\]$", name))
    return found


def is_stopped(pid):
    """Return whether no thread of a process runs."""
    states = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/stat") as stat:
            states.add(stat.read().rpartition(")")[2].split()[0])
    return states == {"T"}


def ready_workers(server):
    """Return the process ids of the workers that serve."""
    ready = {line.message.split()[0] for line in server.lines("M20002")}
    return [pid for name, pid in server.workers().items() if name in ready]


def kill_one(server, load, rng):
    """Kill a worker, having taken down whose connections it has."""
    victim = rng.choice(eventually(lambda: ready_workers(server)))
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: is_stopped(victim))
    load.mark_cut(victim)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: not is_alive(victim))


@pytest.mark.skipif(
    not shutil.which("h2load"), reason="h2load is not installed")
def test_a_hundred_kills_cost_only_the_connections_of_the_killed(tmp_path):
    make_site(tmp_path, {"index.html": SMALL})
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    with Server(tmp_path, "--workers", "3",
                "--log-codes", "default\\M50001") as server:
        with Load(server, 4) as load:
            for n in range(KILLS):
                kill_one(server, load, rng)
                runs = (n + 1) * RUNS_PER_KILL
                eventually(lambda: len(load.finished) >= runs, 30)
        lost = [said for process, said in load.finished
                if process not in load.cut
                and counts(said)["succeeded"] != REQUESTS_PER_RUN]
        assert not lost, f"{len(lost)} runs, such as\n{lost[0]}"
        hit = [said for process, said in load.finished
               if counts(said)["succeeded"] != REQUESTS_PER_RUN]
        # Enough of both, or it would prove little.
        assert len(hit) >= KILLS / 5
        assert len(load.finished) - len(load.cut) >= KILLS
        deaths = server.await_line("M60002", KILLS)
        assert all("SIGKILL" in line.message for line in deaths)
        assert len(deaths) == KILLS
        assert not server.lines("M60003")
        eventually(lambda: len(ready_workers(server)) == 3)
        assert server.fetch().content == SMALL


class Expected:
    """Compares what is written to it with the large file."""

    def __init__(self):
        self.received = 0
        self.is_same = True

    def write(self, piece):
        """Take the next octets."""
        end = self.received + len(piece)
        self.is_same &= BIG[self.received:end] == piece
        self.received = end

    def is_whole(self):
        """Return whether all of the file has come, and nothing else."""
        return self.is_same and self.received == len(BIG)


class Downloads:
    """GETs of the large file that have begun, over one connection."""

    def __init__(self, server, protocol, count):
        self.bodies = [Expected() for _ in range(count)]
        if protocol == "h2":
            self._begin_h2(server)
        else:
            assert count == 1
            self._begin_http1(server)

    def _begin_h2(self, server):
        client = H2Client(server)
        self.socket, self.turn = client.socket, client.turn
        for body in self.bodies:
            client.bodies[client.get("/big.bin")] = body
        while len(client.heads) < len(self.bodies):
            assert client.turn()
        assert {head[":status"] for head in client.heads.values()} == {"200"}

    def _begin_http1(self, server):
        self.socket = server.connect()
        self.socket.sendall(
            f"GET /big.bin HTTP/1.1\r\nHost: {DOMAIN}\r\n\r\n".encode())
        head, _, begun = self.socket.recv(1 << 16).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert f"content-length: {len(BIG)}".encode() in head
        self.bodies[0].write(begun)

    def turn(self):
        """Take what has come; return whether the connection still stands."""
        piece = self.socket.recv(1 << 16)
        self.bodies[0].write(piece)
        return bool(piece)


class SmallRequests:
    """GETs of the page, four at any time, until the server says GOAWAY."""

    def __init__(self, server):
        self._client = H2Client(server)
        self.socket = self._client.socket
        self.asked = []

    def turn(self):
        """Take what has come; ask again where something is answered."""
        while len(self._client.open) < 4 and not self._client.goaways:
            self.asked.append(self._client.get("/"))
        return self._client.turn()

    def answered(self):
        """Return how many requests have their whole, right answer."""
        return sum(stream not in self._client.open
                   and stream not in self._client.resets
                   and self._client.heads[stream][":status"] == "200"
                   and self._client.bodies[stream].getvalue() == SMALL
                   for stream in self.asked)


def finish(clients):
    """Read all connections by turns until the server has closed each.

    One thread for all keeps the downloads slow, and all at about one place.
    """
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        while selector.get_map():
            ready = selector.select(20)
            assert ready, "the server is silent for 20 s"
            for key, _ in ready:
                if not key.data.turn():
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


def test_term_lets_a_hundred_downloads_and_a_load_of_requests_finish(
        tmp_path):
    make_site(tmp_path, {"index.html": SMALL, "big.bin": BIG},
              {"graceful-seconds": 60})
    with Server(tmp_path, "--workers", "2") as server:
        load = [SmallRequests(server) for _ in range(4)]
        downloads = [Downloads(server, "http/1.1", 1) for _ in range(85)]
        downloads += [Downloads(server, "h2", 5) for _ in range(3)]
        bodies = [body for each in downloads for body in each.bodies]
        assert len(bodies) == 100
        while sum(client.answered() for client in load) < 100:
            assert all(client.turn() for client in load)
        server.signal(signal.SIGTERM)
        server.await_line("M40004")
        assert not any(body.received == len(BIG) for body in bodies)
        assert not [line for line in server.lines("M50001")
                    if "/big.bin" in line.message]
        finish([*downloads, *load])
        assert server.wait(30) == 0
        assert [body.is_whole() for body in bodies] == [True] * 100
        asked = sum(len(client.asked) for client in load)
        assert sum(client.answered() for client in load) == asked
        assert not server.lines("M40019") + server.lines("M40017")
        answers = [line.message for line in server.lines("M50001")]
        assert len(answers) == 100 + asked
        assert all(" 200 " in answer and " cut " not in answer
                   for answer in answers)
