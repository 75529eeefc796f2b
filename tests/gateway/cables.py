"""A cable between the gateway and nfcpy's device, to be pulled, shorted and jammed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pos_gateway.gateway.readers.frontend import open_frontend


class Cable:
    """nfcpy's real udp device on a cable that can be pulled, shorted and jammed."""

    def __init__(self) -> None:
        self.opened = 0
        self.fail: Exception | None = None
        self.jam = threading.Event()
        self.jam.set()

    def open(self, path: str) -> Any:
        if self.fail is not None:
            raise self.fail
        self.opened += 1
        frontend = open_frontend(path)
        exchange, sense = frontend.exchange, frontend.sense
        frontend.exchange = lambda *a: self._through(exchange, *a)
        frontend.sense = lambda *a: self._through(sense, *a)
        return frontend

    def _through(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self.jam.wait()
        if self.fail is not None:
            raise self.fail
        return work(*arguments)
