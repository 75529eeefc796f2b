"""The page for store staff: server-rendered, live by server-sent events, no build step."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import jinja2
from aiohttp import web

_HERE: Final = Path(__file__).parent
_SECURITY_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_pages(app: web.Application) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )

    async def till(request: web.Request) -> web.Response:
        html = environment.get_template("till.html").render()
        return web.Response(text=html, content_type="text/html", headers={"Cache-Control": "no-store"})

    async def add_security_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_SECURITY_HEADERS)

    app.router.add_get("/", till)
    app.router.add_static("/static/", _HERE / "static")
    app.on_response_prepare.append(add_security_headers)
