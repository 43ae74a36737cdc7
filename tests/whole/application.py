"""A small shop in Flask, served by gunicorn in the tests of backends."""

import hashlib

from flask import (
    Flask,
    Response,
    jsonify,
    make_response,
    redirect,
    request,
)

app = Flask(__name__)


@app.get("/")
def page():
    """Say hello to whom the fields name."""
    return (f"<h1>Shop</h1><p>{request.host} {request.scheme}"
            f" {request.headers['X-Forwarded-For']}")


@app.post("/basket/")
def basket():
    """Answer a form with a cookie and a redirect."""
    answer = make_response(redirect("/basket/done/", 303))
    answer.set_cookie("thing", request.form["thing"], httponly=True)
    answer.set_cookie("count", "1")
    return answer


@app.get("/basket/done/")
def done():
    """Tell the cookies."""
    return jsonify(dict(request.cookies))


@app.route("/upload/", methods=["POST", "PUT"])
def upload():
    """Answer with length and hash of what was sent."""
    digest, count = hashlib.sha256(), 0
    while piece := request.stream.read(65_536):
        digest.update(piece)
        count += len(piece)
    return jsonify(count=count, sha=digest.hexdigest(), fields=[
        name for name, _ in request.headers])


@app.get("/download/<int:size>/")
def download(size):
    """Send so many octets, in pieces of odd sizes."""
    def pieces():
        left = size
        while left:
            piece = b"x" * min(left, 50_021)
            left -= len(piece)
            yield piece
    return Response(pieces(), mimetype="application/octet-stream")


@app.get("/fault/")
def fault():
    """Fail, as applications do."""
    raise RuntimeError("what only the application's log is to know")
