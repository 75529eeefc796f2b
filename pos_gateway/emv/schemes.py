"""Whose card it is, by the registered application provider identifier (RID, ISO/IEC 7816-5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_SCHEMES: Final = {
    bytes.fromhex(rid): name
    for rid, name in (
        ("A000000003", "Visa"),
        ("A000000098", "Visa"),
        ("A000000004", "Mastercard"),
        ("A000000005", "Mastercard"),
        ("A000000010", "Mastercard"),
        ("A000000025", "American Express"),
        ("A000000029", "LINK"),
        ("A000000042", "Cartes Bancaires"),
        ("A000000065", "JCB"),
        ("A000000121", "Dankort"),
        ("A000000152", "Discover"),
        ("A000000228", "mada"),
        ("A000000277", "Interac"),
        ("A000000324", "Discover"),
        ("A000000333", "UnionPay"),
        ("A000000359", "girocard"),
        ("A000000384", "eftpos"),
        ("A000000524", "RuPay"),
        ("A000000658", "Mir"),
    )
}


def scheme_of(aids: Iterable[bytes]) -> str | None:
    """The scheme of the first AID whose RID is known."""
    for aid in aids:
        if (name := _SCHEMES.get(aid[:5])) is not None:
            return name
    return None
