"""The keys that sign grants and notes: on the server, and only as far as the limit keys let them.

    keys/online/NUMBER-ID.pem    Ed25519, mode 0600; the lowest number that the limits in force name signs

They count once a released snapshot's header names them, signed by a threshold of limit keys, with the bounds
of the policy. So a new key is made, published, and only when the shops have the limits that name it is the
old one retired and the next limits published.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import Conflict, NotFound
from pos_gateway.ledger.keys import read_private_key, write_private_key
from pos_gateway.limits.header import MAX_ONLINE_KEYS
from pos_gateway.limits.single import online_key_id

FOLDER: Final = "online"


@dataclass(frozen=True, slots=True)
class OnlineKey:
    number: int
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> bytes:
        return self.private.public_key().public_bytes_raw()

    @property
    def id(self) -> str:
        return online_key_id(self.public).hex()


class OnlineKeys:
    """Those in one folder, which is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> tuple[OnlineKey, ...]:
        """The oldest first.

        Raises:
            InvalidConfiguration: a file is open to others, or no key.
        """
        paths = sorted(self._folder.glob("[0-9]*-*.pem"))
        return tuple(
            OnlineKey(int(path.name.partition("-")[0]), read_private_key(path, Ed25519PrivateKey))
            for path in paths
        )

    def create(self) -> OnlineKey:
        """One more. It signs nothing before limits that name it are released.

        Raises:
            Conflict: as many as a header can name are here already.
        """
        known = self.all()
        if len(known) >= MAX_ONLINE_KEYS:
            raise Conflict(f"there are {len(known)} online keys", advice="retire one first")
        self._folder.mkdir(mode=0o700, exist_ok=True)
        key = OnlineKey(known[-1].number + 1 if known else 1, Ed25519PrivateKey.generate())
        write_private_key(self._path(key), key.private)
        return key

    def retire(self, key_id: str) -> None:
        """Take a key away: it signs no more, and the next limits do not name it.

        Raises:
            NotFound: no such key here.
        """
        key = next((key for key in self.all() if key.id == key_id), None)
        if key is None:
            raise NotFound(f"there is no online key {key_id}", advice="`pos-gateway ledger keys online`")
        self._path(key).unlink()

    def signer(self, named: Collection[bytes]) -> OnlineKey | None:
        """The oldest key that the limits in force name; None if they name none that is here."""
        return next((key for key in self.all() if key.public in named), None)

    def _path(self, key: OnlineKey) -> Path:
        return self._folder / f"{key.number:04d}-{key.id}.pem"
