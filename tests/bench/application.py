"""An ASGI application that serves the files of ./www from memory."""

import email.utils
import hashlib
from pathlib import Path


def _prepared(path):
    body = path.read_bytes()
    modified = email.utils.formatdate(path.stat().st_mtime, usegmt=True)
    tag = hashlib.sha256(body).hexdigest()[:32]
    return body, [
        (b"content-type", b"text/javascript; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"etag", f'"{tag}"'.encode()),
        (b"last-modified", modified.encode()),
        (b"cache-control", b"public, max-age=0, must-revalidate"),
        (b"vary", b"accept-encoding"),
    ]


FILES = {f"/{path.name}": _prepared(path) for path in Path("www").iterdir()}


async def application(scope, receive, send):
    """Answer 200 with a known file, or 404."""
    if scope["type"] != "http":
        return
    status, (body, fields) = 200, FILES.get(scope["path"], (b"", None))
    if fields is None:
        status, fields = 404, [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status,
                "headers": fields})
    await send({"type": "http.response.body", "body": body})
