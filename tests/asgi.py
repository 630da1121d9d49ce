"""Asks an ASGI application without a network, so that a request can be as odd as one likes."""

import asyncio
import re
from html.parser import HTMLParser


class Answer:
    """What the application answered."""

    def __init__(self, status, headers, body):
        self.status, self.headers = status, {k.decode(): v.decode() for k, v in headers}
        self.html = body.decode()
        self.text = re.sub(r"\s+", " ", _text(self.html))


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.parts, self.skipped = [], 0

    def handle_starttag(self, tag, attrs):
        self.skipped += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.skipped -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.skipped:
            self.parts.append(data)


def _text(html):
    parser = _Text()
    parser.feed(html)
    return " ".join(parser.parts)


def ask(app, path, *, query="", method="GET", host="127.0.0.1:8350"):
    """Send one request to an ASGI application; ``path`` is taken as it is, dots and all."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", host.encode())],
        "server": ("127.0.0.1", 8350),
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(sent[0]["status"], sent[0]["headers"], body)
