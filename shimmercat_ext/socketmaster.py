"""The command `socketmaster`: keeps a socket while a program is restarted.

It opens a socket, starts a program with it as file descriptor 3, and on HUP
starts the program once more before the older process is told to leave.  The
socket is never closed meanwhile, so no connection is refused or lost.
"""

import argparse
import contextlib
import errno
import functools
import os
import pwd
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import syslog
import time
import typing
import urllib.parse

_SOCKET_FD = 3  #: where the program finds the socket
_BACKLOG = 4096  #: connections that wait; net.core.somaxconn may allow less
_LONGEST_LINE = 65_536  #: bytes; longer ones are broken
_MOST_READS = 16  #: of one process' output, before others have their turn
_LONGEST_START = 3_600_000  #: ms

#: s; who lived for so long is started again at once, others after a pause
_STEADY_SECONDS = 10
_LONGEST_PAUSE = 60

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
_URI = "tcp://HOST:PORT, tcp4://, tcp6://, unix:///PATH or fd://NUMBER"


class Uri(typing.NamedTuple):
    """Where to listen."""

    text: str
    scheme: str
    #: (host, port), a path or a file descriptor
    place: tuple[str, int] | str | int

    @classmethod
    def parse(cls, text: str) -> "Uri":
        """Reads a listen URI; raises ArgumentTypeError."""
        try:
            url = urllib.parse.urlsplit(text)
            scheme, rest = url.scheme, text.partition("://")[2]
            if scheme == "unix" and rest.startswith("/"):
                return cls(text, scheme, rest)
            if scheme == "fd" and rest.isdecimal() and len(rest) < 8:
                return cls(text, scheme, int(rest))
            if (scheme in ("tcp", "tcp4", "tcp6") and url.port is not None
                    and rest == url.netloc and "@" not in rest):
                host = url.hostname or ""
                host.encode("idna")
                return cls(text, scheme, (host, url.port))
        except ValueError:
            # A port, an IPv6 address or a name that is none.
            pass
        raise argparse.ArgumentTypeError(f"{text!r}; expected {_URI}")


def listen(uri: Uri) -> socket.socket:
    """The listening socket of a URI; raises OSError."""
    _, scheme, place = uri
    if scheme == "fd":
        handed = socket.socket(fileno=place)
        if not handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(f"file descriptor {place} does not listen")
        return handed
    if scheme == "unix":
        _remove_stale(place)
        door = socket.socket(socket.AF_UNIX)
        door.bind(place)
        door.listen(_BACKLOG)
        return door
    host, port = place
    if scheme == "tcp" and not host and socket.has_dualstack_ipv6():
        return socket.create_server(
            place, family=socket.AF_INET6, backlog=_BACKLOG,
            dualstack_ipv6=True)
    family = {"tcp": socket.AF_UNSPEC, "tcp4": socket.AF_INET,
              "tcp6": socket.AF_INET6}[scheme]
    found = socket.getaddrinfo(host or None, port, family, socket.SOCK_STREAM,
                               flags=socket.AI_PASSIVE)
    # The first of a name's addresses, those of IPv4 before others.
    family, _, _, _, address = min(
        found, key=lambda row: row[0] != socket.AF_INET)
    return socket.create_server(address, family=family, backlog=_BACKLOG)


def _remove_stale(path):
    """Unlinks a socket on which nobody listens any more."""
    with contextlib.suppress(FileNotFoundError):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
            if is_socket and probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)


def _inode(path):
    """What tells a file from another of the same name, or None."""
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        return found.st_dev, found.st_ino


class Journal:
    """Where our lines go and those of the program: stderr or syslog."""

    def __init__(self, uses_syslog: bool):
        self._uses_syslog = uses_syslog
        if uses_syslog:
            syslog.openlog("socketmaster", syslog.LOG_PID, syslog.LOG_DAEMON)

    def say(self, text: str) -> None:
        """Writes a line of our own."""
        if not self._uses_syslog:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            text = f"{now} socketmaster[{os.getpid()}] {text}"
        self.write([text])

    def write(self, lines: list[str]) -> None:
        """Writes lines as they are; never fails."""
        if self._uses_syslog:
            for line in lines:
                # It takes neither names that are no UTF-8 nor zeros.
                syslog.syslog(line.encode(errors="backslashreplace").decode()
                              .replace("\0", r"\0"))
            return
        # That nobody reads the log any more must not cost us the socket.
        with contextlib.suppress(OSError):
            sys.stderr.write("".join(f"{line}\n" for line in lines))
            sys.stderr.flush()


class Child:
    """One process of the program."""

    def __init__(self, command: str, user: pwd.struct_passwd | None,
                 journal: Journal):
        """Starts it; raises OSError."""
        identity = user and {
            "user": user.pw_uid, "group": user.pw_gid,
            "extra_groups": os.getgrouplist(user.pw_name, user.pw_gid)}
        # Of a group of its own, it gets each signal of a terminal once: from
        # us.
        self._process = subprocess.Popen(
            [command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, pass_fds=[_SOCKET_FD], process_group=0,
            env={**os.environ, "EINHORN_FDS": str(_SOCKET_FD)},
            **identity or {})
        self.pid, self.output = self._process.pid, self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.born = time.monotonic()
        #: the signal that last told it to leave
        self.told = None
        self._journal, self._rest = journal, b""

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, each of which tells it to leave."""
        # Only we reap, so the pid still means this process.
        os.kill(self.pid, number)
        self.told = number

    def bury(self, status: int) -> int:
        """Takes the wait status of its end; an exit status for us."""
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        if code < 0 and -code == self.told:
            return 0
        return code if code >= 0 else 128 - code

    def pass_on(self) -> bool:
        """Hands on what it has written; False when nothing more can come."""
        try:
            for _ in range(_MOST_READS):
                chunk = os.read(self.output.fileno(), _LONGEST_LINE)
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                if self._rest and (
                        not chunk or len(self._rest) >= _LONGEST_LINE):
                    lines.append(self._rest)
                    self._rest = b""
                self._write(lines)
                if not chunk:
                    return False
        except BlockingIOError:
            # That was all for this time.
            pass
        return True

    def _write(self, lines):
        self._journal.write([
            f"[{self.pid}] {line.decode(errors='backslashreplace')}"
            for line in lines])


class Master:
    """The processes of a program, from its first start to its last end."""

    def __init__(self, options: argparse.Namespace, journal: Journal):
        self._options, self._journal = options, journal
        #: the oldest first
        self._children = []
        #: started by HUP, and on trial until then
        self._trial, self._trial_end = None, 0.0
        self._is_asked_again = self._is_ending = False
        #: when the program is started again, and how often it died early
        self._respawn_due, self._early_deaths = None, 0
        self._selector = selectors.DefaultSelector()
        #: exit status of the last process that ended
        self._status = 0

    def run(self) -> int:
        """Lives as long as the program does; the exit status."""
        self._take_signals()
        if not self._start():
            return os.EX_OSERR
        while self._children or self._respawn_due is not None:
            for key, _ in self._selector.select(self._seconds_left()):
                key.data()
            self._reap()
            self._look_at_clock()
        return self._status

    def _take_signals(self):
        ears, mouth = socket.socketpair()
        for end in (ears, mouth):
            end.setblocking(False)
        # Both must stay open as long as signals may come.
        self._ears, self._mouth = ears, mouth
        signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        for number in (*_FORWARDED, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(ears, selectors.EVENT_READ, self._hear)

    def _hear(self):
        """Takes the signals that came since the last time, in order."""
        for number in self._ears.recv(4096):
            if number == signal.SIGHUP:
                self._restart()
            elif number in _FORWARDED:
                self._forward(signal.Signals(number))

    def _restart(self):
        """Begins to replace the processes that there are."""
        if self._is_ending:
            self._journal.say("HUP is ignored: the program was told to end")
            return
        if self._trial:
            # Its program may be older than this HUP.  More HUPs are one.
            self._is_asked_again = True
            return
        if child := self._start():
            self._respawn_due, self._trial = None, child
            self._trial_end = child.born + self._options.start / 1000

    def _forward(self, number):
        # QUIT ends most programs, and has others print their stacks.
        self._is_ending |= number != signal.SIGQUIT
        self._respawn_due, self._is_asked_again = None, False
        self._send(number, self._children)

    def _send(self, number, children):
        if children:
            self._journal.say(f"{number.name} is sent to {_pids(children)}")
        for child in children:
            child.send(number)

    def _start(self):
        """A further process, or None if the program cannot be started."""
        options = self._options
        try:
            child = Child(options.command, options.user, self._journal)
        except OSError as error:
            self._journal.say(
                f"{options.command} cannot be started: {error.strerror}")
            return None
        self._journal.say(f"{child.pid} is started: {options.command}")
        self._children.append(child)
        self._selector.register(
            child.output, selectors.EVENT_READ,
            functools.partial(self._listen_to, child))
        return child

    def _listen_to(self, child):
        """Passes on what a process has written, or one of its own."""
        if not child.output.closed and not child.pass_on():
            self._selector.unregister(child.output)
            child.output.close()

    def _seconds_left(self):
        """Until the clock matters; None when it does not."""
        due = [self._trial_end] if self._trial else []
        if self._respawn_due is not None:
            due.append(self._respawn_due)
        return max(0, min(due) - time.monotonic()) if due else None

    def _look_at_clock(self):
        now = time.monotonic()
        if self._trial and now >= self._trial_end:
            self._conclude()
        if self._respawn_due is not None and now >= self._respawn_due:
            self._respawn_due = None
            if not self._start():
                self._respawn_later(0)

    def _conclude(self):
        """Ends a trial: the older processes are told to leave."""
        trial, self._trial = self._trial, None
        older = self._children[:self._children.index(trial)]
        self._send(signal.SIGHUP, [
            child for child in older if child.told is None])
        self._go_on()

    def _go_on(self):
        """Does what was asked for during a trial."""
        if self._is_asked_again:
            self._is_asked_again = False
            self._restart()

    def _reap(self):
        """Buries the dead; as process 1 of a container, those of others."""
        children = {child.pid: child for child in self._children}
        with contextlib.suppress(ChildProcessError):
            # There may be no process at all.
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                if pid in children:
                    self._bury(children[pid], status)

    def _bury(self, child, status):
        """Draws the conclusions from an end."""
        self._listen_to(child)
        self._children.remove(child)
        self._status = child.bury(status)
        text = f"{child.pid} has ended ({_end(status)})"
        # Who was not told to leave serves, or will.
        others = [one for one in self._children if one.told is None]
        if child is self._trial and others:
            text += f" before -start was over; {_pids(others)} goes on"
        self._journal.say(text)
        if self._options.respawn and child.told is None and not others:
            self._respawn_later(time.monotonic() - child.born)
        if child is self._trial:
            self._trial = None
            self._go_on()

    def _respawn_later(self, lived):
        """Plans to start the program again, which has `lived` for seconds."""
        pause = 0
        if lived < _STEADY_SECONDS:
            pause = min(2 ** self._early_deaths, _LONGEST_PAUSE)
            self._early_deaths = min(self._early_deaths + 1, 10)
            self._journal.say(f"it is started again in {pause} s")
        else:
            self._early_deaths = 0
        self._respawn_due = time.monotonic() + pause


def _pids(children):
    return ", ".join(str(child.pid) for child in children)


def _end(status):
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"status {code}"
    names = {number.value: number.name for number in signal.Signals}
    return names.get(-code, f"signal {-code}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="socketmaster", add_help=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Opens a socket, and starts a program with it as file "
        "descriptor 3.\nHUP starts the program once more, waits for -start, "
        "and sends HUP to the\nolder processes. INT, TERM and QUIT go to all "
        "of them.")
    for name, kind, metavar, text in (
            ("command", _command, "PATH", "program to start, without"
             " arguments"),
            ("listen", Uri.parse, "URI", f"{_URI} (tcp://:8080)"),
            ("start", _millis, "MILLIS", "time that a new process has to start"
             " before older ones are told to leave; 0 is none (3000)"),
            ("user", _user, "LOGIN", "who runs the program; for root only")):
        parser.add_argument(
            f"-{name}", f"--{name}", type=kind, metavar=metavar, help=text,
            required=name == "command")
    parser.set_defaults(listen=Uri.parse("tcp://:8080"), start=3000)
    for name, text in (
            ("syslog", "write to syslog instead of stderr"),
            ("respawn", "start the program again when it has died")):
        parser.add_argument(
            f"-{name}", f"--{name}", action="store_true", help=text)
    parser.add_argument("-h", "-help", "--help", action="help",
                        help="show this and leave")
    return parser


def _command(text):
    found = shutil.which(text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected a program that can be executed")
    return os.path.abspath(found)


def _millis(text):
    if not text.isdecimal() or int(text) > _LONGEST_START:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected milliseconds from 0 to {_LONGEST_START}")
    return int(text)


def _user(text):
    try:
        found = pwd.getpwnam(text)
    except KeyError:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected a login of this machine") from None
    if os.geteuid():
        raise argparse.ArgumentTypeError(
            f"{text!r}; only root may start programs as others")
    return found


def _check_syslog(parser):
    """Syslog would lose lines without a word."""
    try:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            with socket.socket(socket.AF_UNIX, kind) as probe:
                if not probe.connect_ex("/dev/log"):
                    return
        parser.error("-syslog: nobody listens at /dev/log")
    except OSError as error:
        parser.error(f"-syslog: {error}")


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args()
    if options.syslog:
        _check_syslog(parser)
    uri = options.listen
    try:
        door = listen(uri)
    except OSError as error:
        print(f"socketmaster: -listen={uri.text}: {error.strerror or error}",
              file=sys.stderr)
        return os.EX_OSERR
    # Before anything else is opened, which might get its number.
    if door.fileno() != _SOCKET_FD:
        os.dup2(door.fileno(), _SOCKET_FD, inheritable=False)
        door.close()
    else:
        door.detach()
    ours = uri.scheme == "unix" and _inode(uri.place)
    journal = Journal(options.syslog)
    journal.say(f"listening at {_name(uri.scheme)}")
    try:
        return Master(options, journal).run()
    finally:
        if ours and _inode(uri.place) == ours:
            os.unlink(uri.place)


def _name(scheme):
    """The address of the socket, with the port that it really has."""
    with socket.socket(fileno=os.dup(_SOCKET_FD)) as door:
        name = door.getsockname()
    if isinstance(name, str):
        return f"unix://{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{scheme.replace('fd', 'tcp')}://{host}:{name[1]}"


if __name__ == "__main__":
    sys.exit(main())
