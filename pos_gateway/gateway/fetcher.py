"""Where the issuer's repository is read from: the ledger's server, or a folder that somebody carried in.

Both give the same files, and both are trusted with nothing: what they give is verified by `trust` and
`feed`. Everything here blocks; it runs in a thread, beside the event loop and the tills.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from pos_gateway.errors import (
    InvalidConfiguration,
    InvalidMessage,
    LedgerUnreachable,
    NotFound,
    Unavailable,
)

_PREFIX: Final = "/v1/tuf/"
_CHUNK_BYTES: Final = 256 * 1024
_GOES_ON: Final = "payments go on; it is tried again"


class Repository(Protocol):
    """A repository's files by their paths in it, as `distribution` names them."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """A small file whole.

        Raises:
            NotFound: there is none.
            InvalidMessage: it is longer than `max_bytes`.
            LedgerUnreachable, Unavailable: the line, or the folder, is not to be had.
        """
        ...

    def stream(self, path: str, offset: int) -> Generator[bytes, None, None]:
        """The file from `offset` on, piece by piece; the caller closes the iterator. Raises as `read`, at
        any step; it may go on for ever, so the caller counts."""
        ...


class FolderRepository:
    """A folder with `metadata/` and `targets/` in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, path: str, max_bytes: int) -> bytes:
        with self._opened(path) as file:
            return _bounded(iter(lambda: file.read(_CHUNK_BYTES), b""), path, max_bytes)

    def stream(self, path: str, offset: int) -> Generator[bytes, None, None]:
        with self._opened(path) as file:
            file.seek(offset)
            while piece := file.read(_CHUNK_BYTES):
                yield piece

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[_Readable]:
        try:
            with (self._folder / path).open("rb") as file:
                yield _Guarded(file, self._folder)
        except FileNotFoundError:
            raise NotFound(f"{self._folder} has no {path}", advice="is it the issuer's folder?") from None
        except OSError as error:
            raise _folder_trouble(self._folder, error) from None


class _Readable(Protocol):
    def read(self, length: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


class _Guarded:
    """A file whose failures to be read are told from failures of whoever takes its pieces."""

    def __init__(self, file: _Readable, folder: Path) -> None:
        self._file = file
        self._folder = folder

    def read(self, length: int, /) -> bytes:
        try:
            return self._file.read(length)
        except OSError as error:
            raise _folder_trouble(self._folder, error) from None

    def seek(self, offset: int, /) -> int:
        return self._file.seek(offset)


def _folder_trouble(folder: Path, error: OSError) -> Unavailable:
    return Unavailable(f"{folder} cannot be read: {error.strerror}", advice="plug the stick in again")


class HttpsRepository:
    """The repository on the ledger's server, under the authority this gateway enrolled with. It is open to
    anybody: no certificate of ours is shown.

    `silence_s` without a byte is a dead line. A small file must have come within `patience_s`; of a large
    one, `least_bytes` must have come in every `patience_s`.
    """

    def __init__(
        self,
        url: str,
        authority: bytes,
        *,
        silence_s: float = 30.0,
        patience_s: float = 60.0,
        least_bytes: int = 64 * 1024,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Raises:
            InvalidConfiguration: not an https address, or no certificate.
        """
        parts = urlsplit(url)
        try:
            port = parts.port or 443
        except ValueError:
            port = 0
        if parts.scheme != "https" or not parts.hostname or not port:
            raise InvalidConfiguration("must begin with https:// and name a host", where="ledger address")
        self._host, self._port = parts.hostname, port
        self._path = parts.path.rstrip("/")
        self._url = url
        self._context = authority_context(authority)
        self._silence_s = silence_s
        self._patience_s = patience_s
        self._least_bytes = least_bytes
        self._monotonic = monotonic
        self._line: http.client.HTTPSConnection | None = None
        self._cut = False

    def cut(self) -> None:
        """Let whoever reads from it fail at once, now and later. May be called from any thread."""
        self._cut = True
        if (line := self._line) is not None:
            _cut(line)

    def read(self, path: str, max_bytes: int) -> bytes:
        with contextlib.closing(self._pieces(path, 0)) as pieces:
            return _bounded(self._within(pieces), path, max_bytes)

    def stream(self, path: str, offset: int) -> Generator[bytes, None, None]:
        with contextlib.closing(self._pieces(path, offset)) as pieces:
            yield from self._fast_enough(pieces)

    def _within(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        deadline = self._monotonic() + self._patience_s
        for piece in pieces:
            if self._monotonic() > deadline:
                raise LedgerUnreachable("the ledger answers too slowly", advice=_GOES_ON)
            yield piece

    def _fast_enough(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        since, count = self._monotonic(), 0
        for piece in pieces:
            yield piece
            count += len(piece)
            if (now := self._monotonic()) - since > self._patience_s:
                if count < self._least_bytes:
                    raise LedgerUnreachable("the ledger sends too slowly", advice=_GOES_ON)
                since, count = now, 0

    def _pieces(self, path: str, offset: int) -> Generator[bytes, None, None]:
        line = http.client.HTTPSConnection(
            self._host, self._port, timeout=self._silence_s, context=self._context
        )
        # A line that is slow byte by byte never falls silent: until the answer has begun, a clock runs too.
        late = threading.Timer(self._patience_s, _cut, [line])
        late.daemon = True
        late.start()
        self._line = line
        try:
            if self._cut:
                raise LedgerUnreachable("the gateway stops", advice=_GOES_ON)
            line.connect()
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            line.request("GET", f"{self._path}{_PREFIX}{path}", headers=headers)
            answer = line.getresponse()
            late.cancel()
            skip = 0
            match answer.status:
                case 200:
                    skip = offset  # it does not know ranges, and sends the whole file again
                case 206 if offset:
                    _check_range(answer, offset)
                case 404:
                    raise NotFound(f"the ledger has no {path}")
                case 416:
                    return  # nothing from there on; the caller finds the file too short
                case status:
                    raise LedgerUnreachable(f"the ledger answered {status}", advice=_GOES_ON)
            while piece := answer.read1(_CHUNK_BYTES):
                if skip:
                    skip, piece = max(0, skip - len(piece)), piece[skip:]
                if piece:
                    yield piece
        except TimeoutError:
            raise LedgerUnreachable("the ledger did not answer in time", advice=_GOES_ON) from None
        except ssl.SSLCertVerificationError:
            raise LedgerUnreachable(
                f"what answers at {self._url} is not the ledger this gateway enrolled with",
                advice="check the address, and this machine's clock",
            ) from None
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise LedgerUnreachable(
                f"no line to the ledger at {self._url} ({type(error).__name__})", advice=_GOES_ON
            ) from None
        finally:
            late.cancel()
            self._line = None
            line.close()


def authority_context(authority: bytes) -> ssl.SSLContext:
    """Connections made with this only reach a server certified by this authority (DER) to be one. Its names
    do not matter: the authority certifies no other server than the ledger's, and it may move.

    Raises:
        InvalidConfiguration: no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError):
        raise InvalidConfiguration("not a certificate", where="ledger authority") from None
    return context


def _cut(line: http.client.HTTPSConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):
        line.sock.shutdown(socket.SHUT_RDWR)


def _check_range(answer: http.client.HTTPResponse, offset: int) -> None:
    if not (answer.getheader("Content-Range") or "").startswith(f"bytes {offset}-"):
        raise InvalidMessage("another part of the file than was asked for", where="ledger's answer")


def _bounded(pieces: Iterator[bytes], path: str, max_bytes: int) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > max_bytes:
            raise InvalidMessage(f"over {max_bytes} bytes, refused", where=path)
    return bytes(data)
