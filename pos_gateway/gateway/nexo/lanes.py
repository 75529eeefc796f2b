"""Which lane a POIID stands for. A POIID is `model-serial`; every lane has one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

MODEL: Final = "PosGateway"

_NUMBERED: Final = re.compile(r"lane-(\d{1,3})", re.ASCII)


class PoiNames:
    """`configured`: POIID → lane, and then no others; otherwise each lane is named after the terminal:
    `lane-1` of terminal 00000017 is `PosGateway-0000001701`."""

    def __init__(self, terminal_id: str, configured: Mapping[str, str]) -> None:
        self._prefix = f"{MODEL}-{re.sub(r'[^A-Za-z0-9]', '', terminal_id)}"
        self._configured = dict(configured)

    def lane(self, poi_id: str) -> str | None:
        """The lane's name, whether its reader is plugged in or not; None if the POIID is not of here."""
        if self._configured:
            return self._configured.get(poi_id)
        number = poi_id.removeprefix(self._prefix)
        if number == poi_id or not (number.isascii() and number.isdigit()) or int(number) == 0:
            return None
        return f"lane-{int(number)}" if number == f"{int(number):02d}" else None

    def poi_id(self, lane: str) -> str | None:
        """The POIID of a lane; None if it has none."""
        if self._configured:
            return next((poi for poi, name in self._configured.items() if name == lane), None)
        numbered = _NUMBERED.fullmatch(lane)
        return f"{self._prefix}{int(numbered[1]):02d}" if numbered else None
