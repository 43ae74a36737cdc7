"""A client for many requests at once over one HTTP/2 connection."""

import collections
import io

import h2.config
import h2.connection
import h2.events
import h2.settings
from harness import DOMAIN

_GOAWAY = 7
_CANCEL = 8


class H2Client:
    """The h2 library over a TLS socket, driven by whoever calls `turn`.

    What streams receive goes to `bodies`, where a stream has a file of its
    own; windows open again when its `write` has returned.  GOAWAY is kept
    from the library, which takes no DATA after it.
    """

    def __init__(self, server, domain=DOMAIN):
        self._authority = f"{domain}:{server.port}"
        self.socket = server.connect("h2", domain)
        self._connection = h2.connection.H2Connection(
            h2.config.H2Configuration(header_encoding="utf-8"))
        self._connection.initiate_connection()
        self._connection.update_settings({
            h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 18})
        self.heads = {}
        self.bodies = collections.defaultdict(io.BytesIO)
        #: error codes of the streams that ended in a reset
        self.resets = {}
        self.open = set()
        #: payloads of GOAWAY frames
        self.goaways = []
        self._unread = b""

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.socket.close()

    def get(self, path, **fields):
        """Ask for a path; return the number of the stream."""
        stream = self._connection.get_next_available_stream_id()
        self._connection.send_headers(stream, [
            (":method", "GET"), (":scheme", "https"), (":path", path),
            (":authority", self._authority), *fields.items()],
            end_stream=True)
        self.open.add(stream)
        self._send()
        return stream

    def get_and_reset(self, path):
        """Ask for a path and withdraw that, in the same octets."""
        stream = self._connection.get_next_available_stream_id()
        self._connection.send_headers(stream, [
            (":method", "GET"), (":scheme", "https"), (":path", path),
            (":authority", self._authority)], end_stream=True)
        self.reset(stream)

    def reset(self, stream):
        """Want no more of a stream."""
        self._connection.reset_stream(stream, _CANCEL)
        self.open.discard(stream)
        self._send()

    def turn(self):
        """Take what has come; return whether the connection still stands."""
        data = self.socket.recv(1 << 16)
        for frame in self._frames(data):
            for event in self._connection.receive_data(frame):
                self._take(event)
        self._send()
        return bool(data)

    def finish(self):
        """Take until every stream has ended, or the server goes away."""
        while self.open and self.turn():
            continue

    def _frames(self, data):
        """Return the whole frames that have come, but for GOAWAY."""
        self._unread += data
        frames, start = [], 0
        while len(self._unread) - start >= 9:
            stop = start + 9 + int.from_bytes(self._unread[start:start + 3])
            if stop > len(self._unread):
                break
            frame, start = self._unread[start:stop], stop
            if frame[3] == _GOAWAY:
                self.goaways.append(frame[9:])
            else:
                frames.append(frame)
        self._unread = self._unread[start:]
        return frames

    def _take(self, event):
        if isinstance(event, h2.events.ResponseReceived):
            self.heads[event.stream_id] = dict(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            self.bodies[event.stream_id].write(event.data)
            self._connection.acknowledge_received_data(
                event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.open.discard(event.stream_id)
        elif isinstance(event, h2.events.StreamReset):
            self.open.discard(event.stream_id)
            self.resets[event.stream_id] = event.error_code

    def _send(self):
        if data := self._connection.data_to_send():
            self.socket.sendall(data)
