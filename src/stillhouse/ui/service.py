"""The service: addresses to pages, for this machine alone, with nothing that could write."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from markupsafe import Markup

from stillhouse.errors import UserError
from stillhouse.report.page import filled, render, script_hash
from stillhouse.ui import side_by_side
from stillhouse.ui.library import Library, Summary

HOST = "127.0.0.1"
"""The only address that is listened on."""

NAMES = ["127.0.0.1", "localhost"]
"""Hosts that a request may name: a page of somebody else's, whose name was led to this machine, is sent away."""

COLUMNS = ("name", "state", "number", "method", "data", "seed", "started", "time")
"""What the list can be sorted by."""

DAMAGED = (UserError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What reading a run raises whose files are missing, half written, or not as a run writes them."""

STATES = ("finished", "running", "stopped", "broken")


def serve(directory: Path, port: int, say: Any = print) -> None:
    """Serve the runs below ``directory`` on 127.0.0.1 until interrupted.

    Args:
        directory: where the runs are.
        port: 0 takes a free one.
        say: told the address.

    Raises:
        UserError: there is no such directory, the port is taken, or the extra is not installed.
    """
    app = application(directory)
    import uvicorn

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        # From here on a browser may ask: it waits until it is answered.
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"Port {port} cannot be used ({error.strerror}); choose another with --port.") from None
    say(f"http://{HOST}:{listener.getsockname()[1]}/")
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


def application(directory: Path) -> Any:
    """The ASGI application over the runs below ``directory``.

    Raises:
        UserError: there is no such directory, or the extra is not installed.
    """
    try:
        import starlette.applications as applications
        import uvicorn  # noqa: F401
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route
    except ImportError:
        raise UserError(
            "The page over runs needs starlette and uvicorn; install them with: pip install 'stillhouse[ui]'."
        ) from None
    pages = Pages(Library(directory))
    return applications.Starlette(
        routes=[
            Route("/", pages.list, methods=["GET"]),
            Route("/compare", pages.compare, methods=["GET"]),
            Route("/run/{name:path}", pages.report, methods=["GET"]),
        ],
        middleware=[Middleware(Guarded), Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False)],
        exception_handlers={404: pages.missing, 500: pages.failed},
    )


class Guarded:
    """Puts on every answer what a browser may do with it: run our script, show inlined pictures, ask us, nothing else."""

    def __init__(self, app: Any) -> None:
        self.app = app
        policy = (
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'; form-action 'self'; "
            f"base-uri 'none'; frame-ancestors 'none'; script-src 'sha256-{script_hash()}' "
            f"'sha256-{script_hash(own_script())}'"
        )
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-store",
        }
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on, with the headers."""

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self.headers]}
            await send(message)

        await self.app(scope, receive, guarded)


def own_script() -> str:
    """The script of the pages of this room; they can be used without it."""
    return (Path(__file__).parent / "ui.js").read_text(encoding="ascii")


@dataclass(frozen=True)
class Asked:
    """What the list is to show.

    Attributes:
        text: words that a run's text must hold.
        method: only this method; all where empty.
        state: only this state; all where empty.
        sort: one of :data:`COLUMNS`.
        up: the smallest first.
    """

    text: str = ""
    method: str = ""
    state: str = ""
    sort: str = "started"
    up: bool = False

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Asked:
        """Read off a query; what it says that is not known is left out."""
        sort = query.get("sort", "started")
        state = query.get("state", "")
        return cls(
            text=query.get("q", "")[:200],
            method=query.get("method", "")[:100],
            state=state if state in STATES else "",
            sort=sort if sort in COLUMNS else "started",
            up=query.get("order") == "up",
        )

    def chosen(self, runs: list[Summary]) -> list[Summary]:
        """The runs that are asked for, sorted."""
        words = self.text.lower().split()
        found = [
            run
            for run in runs
            if all(word in run.text for word in words)
            and self.method in ("", run.method)
            and self.state in ("", run.state)
        ]
        # What a run lacks comes last in either order.
        having = [run for run in found if _key(run, self.sort) is not None]
        lacking = [run for run in found if _key(run, self.sort) is None]
        return sorted(having, key=lambda run: _key(run, self.sort), reverse=not self.up) + lacking

    def address(self, **changes: Any) -> str:
        """The list with some of this changed."""
        other = replace(self, **changes)
        query = {"q": other.text, "method": other.method, "state": other.state, "sort": other.sort}
        query["order"] = "up" if other.up else "down"
        return "/?" + urlencode({name: value for name, value in query.items() if value})


def _key(run: Summary, column: str) -> Any:
    return {
        "name": run.id.lower(),
        "method": run.method.lower(),
        "data": run.data.lower(),
        "seed": run.seed,
        "started": run.started,
        "state": run.state,
        "number": run.numbers[0][1] if run.numbers else None,
        "time": run.seconds,
    }[column]


class Pages:
    """Answers requests from a library. They are plain functions, which Starlette runs in threads of their own."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def list(self, request: Any) -> Any:
        """Every run, filtered and sorted as asked."""
        runs, asked = self.library.summaries(), Asked.of(request.query_params)
        shown = asked.chosen(runs)
        view = {
            "title": "Runs",
            "root": self.library.root,
            "asked": asked,
            "runs": shown,
            "total": len(runs),
            "methods": sorted({run.method for run in runs if run.method}),
            "states": STATES,
            "columns": COLUMNS,
            "address": run_address,
            "live": any(run.state == "running" for run in runs),
            "at_once": side_by_side.AT_ONCE,
        }
        return _answer(_filled("list.html.j2", view))

    def compare(self, request: Any) -> Any:
        """The chosen runs side by side."""
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if not names:
            return self._sentence("Choose the runs to compare in the list.", 400)
        if len(names) > side_by_side.AT_ONCE:
            return self._sentence(f"Choose at most {side_by_side.AT_ONCE} runs, not {len(names)}.", 400)
        try:
            places = {name: self.library.place(name) for name in names}
        except KeyError as error:
            return self._sentence(f"There is no run {error.args[0]}.", 404)
        except UserError as error:
            return self._sentence(str(error), 422)
        try:
            return _answer(_filled("compare.html.j2", self._compared(places)))
        except DAMAGED as error:
            return self._sentence(f"These runs cannot be compared: {_what(error)}", 422)

    def _compared(self, places: Mapping[str, Path]) -> dict[str, Any]:
        names = list(places)
        read = {name: self.library.run(name) for name in names}
        short = side_by_side.labels(names)
        runs = {short[name]: run for name, run in read.items()}
        pictures, more = side_by_side.pictures({short[name]: place for name, place in places.items()})
        differ, partly = side_by_side.differences(runs)
        return {
            "title": f"{len(runs)} runs side by side" if len(runs) > 1 else f"The run {names[0]}",
            "runs": list(zip(names, short.values(), read.values(), strict=True)),
            "numbers": side_by_side.numbers(runs),
            "panels": side_by_side.charts(runs),
            "pictures": pictures,
            "more_pictures": more,
            "differ": differ,
            "partly": partly,
            "address": run_address,
            "live": not all(run.finished for run in read.values()),
        }

    def report(self, request: Any) -> Any:
        """The report of a run as it is now."""
        name = request.path_params["name"]
        try:
            place = self.library.place(name)
        except KeyError:
            return self._sentence(f"There is no run {name}.", 404)
        except UserError as error:
            return self._sentence(str(error), 422)
        try:
            return _answer(render(place, home="/"))
        except DAMAGED as error:
            return self._sentence(f"The run {name} cannot be shown: {_what(error)}", 422)

    def missing(self, request: Any, error: Exception) -> Any:
        """There is no such page."""
        return self._sentence("There is no such page.", 404)

    def failed(self, request: Any, error: Exception) -> Any:
        """Something that should not have happened."""
        return self._sentence(f"This page could not be made: {type(error).__name__}.", 500)

    def _sentence(self, sentence: str, status: int) -> Any:
        return _answer(_filled("sentence.html.j2", {"title": sentence, "live": False}), status)


def _what(error: Exception) -> str:
    """What is wrong with a run, in a sentence."""
    if isinstance(error, UserError):
        return str(error)
    return f"its files are not as a run writes them ({type(error).__name__}: {error})."


def run_address(name: str) -> str:
    """The address of a run's report."""
    return "/run/" + quote(name, safe="/")


def _filled(template: str, view: Mapping[str, Any]) -> str:
    style = Markup((Path(__file__).parent / "ui.css").read_text(encoding="ascii"))
    return filled(template, {"more_style": style, **view}, package="stillhouse.ui", script=own_script())


def _answer(text: str, status: int = 200) -> Any:
    from starlette.responses import HTMLResponse

    return HTMLResponse(text, status)
