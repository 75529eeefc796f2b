"""All readers of this machine, whatever drives them, by name: what the gateway looks at every second to
find those that were plugged in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pos_gateway.errors import ReaderUnavailable
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.models import ReaderModel, model_of
from pos_gateway.gateway.readers.pcsc import PcscReader, list_readers
from pos_gateway.gateway.readers.port import Reader
from pos_gateway.gateway.readers.system import ROOT, frontends


@dataclass(frozen=True, slots=True)
class ReaderSource:
    """Where the gateway finds its readers.

    `names` raises ReaderUnavailable while nobody can say; `open` is given a name and how long a card may
    take for one answer, in seconds.
    """

    names: Callable[[], Sequence[str]]
    open: Callable[[str, float], Reader]


@dataclass(frozen=True, slots=True)
class Found:
    """A reader that is there now."""

    name: str
    driver: str
    model: ReaderModel | None


class Readers:
    """PC/SC readers that pcscd knows, USB frontends that nfcpy drives (named by model and the port they are
    plugged into, so that a lane stays with its counter), and `paths`: nfcpy's paths of devices that USB
    does not show."""

    def __init__(
        self, models: Sequence[ReaderModel], *, paths: Sequence[str] = (), root: Path = ROOT
    ) -> None:
        self._models = models
        self._paths = paths
        self._root = root

    @property
    def source(self) -> ReaderSource:
        return ReaderSource(self.names, self.open)

    def names(self) -> list[str]:
        return [found.name for found in self.found()]

    def found(self) -> list[Found]:
        """
        Raises:
            ReaderUnavailable: pcscd does not answer, and there is no frontend either.
        """
        others = [
            Found(_frontend_name(model, device.port), "nfcpy", model)
            for device, model in frontends(self._models, self._root)
        ]
        others += [Found(path, "nfcpy", model_of(path, self._models)) for path in self._paths]
        try:
            names = list_readers()
        except ReaderUnavailable:
            if not others:
                raise
            names = []
        return [Found(name, "pcsc", model_of(name, self._models)) for name in names] + others

    def open(self, name: str, response_timeout_s: float) -> PcscReader | FrontendReader:
        """The reader of this name, whether it is there now or not."""
        if name in self._paths:
            return FrontendReader(name, lambda: name, response_timeout_s=response_timeout_s)
        if any(name.startswith(_frontend_name(model, "")) for model in self._models if model.usb):
            return FrontendReader(name, lambda: self._locate(name), response_timeout_s=response_timeout_s)
        return PcscReader(name, response_timeout_s=response_timeout_s, model=model_of(name, self._models))

    def _locate(self, name: str) -> str | None:
        for device, model in frontends(self._models, self._root):
            if _frontend_name(model, device.port) == name:
                return device.nfcpy_path
        return None


def _frontend_name(model: ReaderModel, port: str) -> str:
    return f"{model.name} at USB {port}"
