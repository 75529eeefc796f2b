"""Grants and notes that this gateway holds: grants until they expire, used or not, so that a card that comes
back late finds its own; notes until they are on their card. In memory: what is forgotten costs nothing but
asking again, and the ledger frees it by itself.

They are kept as they came; whoever uses one verifies it against the limits of that moment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from pos_gateway.inquiry import NoteToWrite, OnlineAnswer
from pos_gateway.limits.single import SINGLE_BYTES

_TOKENS: Final = 1000
_GRANTS_PER_TOKEN: Final = 4
_VALID_UNTIL: Final = slice(62, 70)


@dataclass(slots=True)
class _Held:
    grants: list[bytes] = field(default_factory=list)
    used: set[bytes] = field(default_factory=set)
    note: NoteToWrite | None = None


class Singles:
    """By token key. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, _Held] = OrderedDict()

    def keep(self, token_key: bytes, answer: OnlineAnswer) -> None:
        """Keep what the ledger has given out for a token, on time or late."""
        if answer.grant is None and answer.note is None:
            return
        with self._lock:
            held = self._held.setdefault(token_key, _Held())
            self._held.move_to_end(token_key)
            grant, note = answer.grant, answer.note
            if grant is not None and len(grant) == SINGLE_BYTES and grant not in held.grants:
                held.grants = [*held.grants, grant][-_GRANTS_PER_TOKEN:]
            if note is not None and (held.note is None or note.sequence > held.note.sequence):
                held.note = note
            while len(self._held) > _TOKENS:
                self._held.popitem(last=False)

    def grants(self, token_key: bytes) -> tuple[bytes, ...]:
        with self._lock:
            held = self._held.get(token_key)
            return tuple(held.grants) if held else ()

    def use(self, token_key: bytes, digest: bytes) -> None:
        """An approval relied on it."""
        with self._lock:
            held = self._held.get(token_key)
            if held is not None:
                held.used.add(digest)

    def note_for(self, token_key: bytes, above_sequence: int, now_unix_s: int) -> NoteToWrite | None:
        """The note that its card does not have yet."""
        with self._lock:
            held = self._held.get(token_key)
            note = held.note if held else None
            if note is None or note.sequence <= above_sequence or note.valid_until_unix_s <= now_unix_s:
                return None
            return note

    def written(self, token_key: bytes, note: NoteToWrite) -> None:
        with self._lock:
            held = self._held.get(token_key)
            if held is not None and held.note == note:
                held.note = None

    def summary(self, now_unix_s: int) -> dict[str, int]:
        """How many grants are in hand, how many of them nobody has used, how many notes wait for their
        cards. What has expired is forgotten."""
        with self._lock:
            for held in self._held.values():
                held.grants = [g for g in held.grants if int.from_bytes(g[_VALID_UNTIL], "big") > now_unix_s]
                if held.note is not None and held.note.valid_until_unix_s <= now_unix_s:
                    held.note = None
            for key in [k for k, held in self._held.items() if not held.grants and held.note is None]:
                del self._held[key]
            grants = sum(len(held.grants) for held in self._held.values())
            used = sum(min(len(held.used), len(held.grants)) for held in self._held.values())
            notes = sum(held.note is not None for held in self._held.values())
        return {"grants_in_hand": grants, "grants_unused": grants - used, "notes_to_write": notes}
