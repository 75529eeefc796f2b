"""`python -m pos_gateway.lab.pos_client HOST PORT`: as little of a POS as can be, in a process of its own, so
that what it costs is not counted as the gateway's.

On stdin and stdout, with lengths of 4 bytes before each: a whole HTTP request in; the nanoseconds from its
first byte out to its answer's last byte in (8), and the answer, out. One TLS connection for all.
"""

from __future__ import annotations

import socket
import ssl
import sys
import time
from typing import Final

_CHUNK: Final = 1 << 16


def run(host: str, port: int) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it measures, it does not pay
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    with context.wrap_socket(socket.create_connection((host, port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while length := stdin.read(4):
            request = stdin.read(int.from_bytes(length, "big"))
            begun = time.perf_counter_ns()
            connection.sendall(request)
            answer = _answer(connection)
            elapsed_ns = time.perf_counter_ns() - begun
            stdout.write(elapsed_ns.to_bytes(8, "big") + len(answer).to_bytes(4, "big") + answer)
            stdout.flush()


def _answer(connection: ssl.SSLSocket) -> bytes:
    """Status line and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    length = next(int(f.split(b":")[1]) for f in fields if f.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += _received(connection)
    return status + b"\r\n" + body


def _received(connection: ssl.SSLSocket) -> bytes:
    chunk = connection.recv(_CHUNK)
    if not chunk:
        raise EOFError("the gateway hung up")
    return chunk


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
