"""A second, separately written issuer and card for the tests: plain integers, nothing of ours imported.

It follows EMV 4.3 Book 2 §5, §6 by itself, so that a misreading in `pos_gateway.emv` cannot hide behind
the same misreading here. Keys come from a fixed seed.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from functools import cache

RID = bytes.fromhex("F0504F5347")
AID = RID + bytes.fromhex("5701")
PDOL = bytes.fromhex("9F02069F03069F1A0295055F2A029A039C019F3704")
CDOL1 = bytes.fromhex(
    "9F02069F03065F2A029F1A029A039F21039C019F37049F41049F1C089F160F9F1502DF1006DF1110DF1210DF1310"
)
CDOL2 = bytes.fromhex("DF1006DF11109F3704")
CDOL1_LENGTH = 6 + 6 + 2 + 2 + 3 + 3 + 1 + 4 + 4 + 8 + 15 + 2 + 6 + 16 + 16 + 16
UN_IN_CDOL1 = slice(23, 27)


def sha1(*parts: bytes) -> bytes:
    return hashlib.sha1(b"".join(parts), usedforsecurity=False).digest()


@dataclass(frozen=True)
class RsaKey:
    n: int
    e: int
    d: int
    size: int

    def sign(self, block: bytes) -> bytes:
        if len(block) != self.size:
            raise ValueError(f"block of {len(block)} bytes under a key of {self.size}")
        return pow(int.from_bytes(block, "big"), self.d, self.n).to_bytes(self.size, "big")

    def modulus(self) -> bytes:
        return self.n.to_bytes(self.size, "big")

    def exponent(self) -> bytes:
        return self.e.to_bytes(1 if self.e < 256 else 3, "big")


def _is_prime(n: int, rng: random.Random) -> bool:
    if any(n % p == 0 for p in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)):
        return False
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(12):
        x = pow(rng.randrange(2, n - 1), odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


@cache
def rsa_key(name: str, size: int, e: int = 3) -> RsaKey:
    rng = random.Random(f"{name} {size} {e}")
    bits = 8 * size

    def prime(length: int) -> int:
        while True:
            candidate = rng.getrandbits(length) | 3 << (length - 2) | 1
            if candidate % e != 1 and _is_prime(candidate, rng):
                return candidate

    p, q = prime(bits - bits // 2), prime(bits // 2)
    return RsaKey(p * q, e, pow(e, -1, (p - 1) * (q - 1)), size)


def pack(tag: str, value: bytes) -> bytes:
    if len(value) < 128:
        length = bytes([len(value)])
    elif len(value) < 256:
        length = bytes([0x81, len(value)])
    else:
        length = bytes([0x82]) + len(value).to_bytes(2, "big")
    return bytes.fromhex(tag) + length + value


def _certificate(
    signer: RsaKey, head: bytes, subject: RsaKey, room: int, appended: bytes = b""
) -> tuple[bytes, bytes]:
    """Certificate and remainder: `head` runs from the format byte to the exponent's length."""
    modulus = subject.modulus()
    inside, remainder = modulus[:room].ljust(room, b"\xbb"), modulus[room:]
    digest = sha1(head, inside, remainder, subject.exponent(), appended)
    return signer.sign(b"\x6a" + head + inside + digest + b"\xbc"), remainder


@dataclass
class SecondIssuer:
    ca_size: int = 248
    issuer_size: int = 176
    icc_size: int = 144
    e: int = 3
    pan: str = "9156000112345672"
    identifier: str = "91560001"
    issuer_expires: str = "1230"  # MMYY
    icc_expires: str = "1229"
    card_expires: str = "291130"  # YYMMDD
    card_effective: str = "260101"
    serial: bytes = b"\x00\x00\x07"
    aip: bytes = b"\x01\x00"
    cdol1: bytes = CDOL1
    ca_index: int = 0x01

    def __post_init__(self) -> None:
        self.ca = rsa_key("ca", self.ca_size, self.e)
        self.issuer = rsa_key("issuer", self.issuer_size, self.e)
        self.icc = rsa_key("icc", self.icc_size, self.e)

    def static_record(self) -> bytes:
        digits = self.pan + "F" * (len(self.pan) % 2)
        return b"".join(
            [
                pack("5A", bytes.fromhex(digits)),
                pack("5F34", b"\x01"),
                pack("5F24", bytes.fromhex(self.card_expires)),
                pack("5F25", bytes.fromhex(self.card_effective)),
                pack("9F07", b"\xff\x00"),
                pack("9F42", b"\x01\x56"),
                pack("8C", self.cdol1),
                pack("8D", CDOL2),
                pack("9F4A", b"\x82"),
            ]
        )

    def card(self) -> SecondCard:
        issuer_head = (
            b"\x02"
            + bytes.fromhex(self.identifier.ljust(8, "F"))
            + bytes.fromhex(self.issuer_expires)
            + self.serial
            + bytes([1, 1, self.issuer_size, len(self.issuer.exponent())])
        )
        issuer_certificate, issuer_remainder = _certificate(
            self.ca, issuer_head, self.issuer, self.ca_size - 36
        )
        icc_head = (
            b"\x04"
            + bytes.fromhex(self.pan.ljust(20, "F"))
            + bytes.fromhex(self.icc_expires)
            + b"\x00\x12\x34"
            + bytes([1, 1, self.icc_size, len(self.icc.exponent())])
        )
        icc_certificate, icc_remainder = _certificate(
            self.issuer, icc_head, self.icc, self.issuer_size - 42, self.static_record() + self.aip
        )
        keys = [
            pack("8F", bytes([self.ca_index])),
            pack("9F32", self.issuer.exponent()),
            pack("92", issuer_remainder) if issuer_remainder else b"",
            pack("9F47", self.icc.exponent()),
            pack("9F48", icc_remainder) if icc_remainder else b"",
        ]
        return SecondCard(
            icc=self.icc,
            aip=self.aip,
            cdol1=self.cdol1,
            records={
                (1, 1): pack("70", pack("90", issuer_certificate)),
                (1, 2): pack("70", b"".join(keys)),
                (1, 3): pack("70", pack("9F46", icc_certificate)),
                (2, 1): pack("70", self.static_record()),
            },
        )


@dataclass
class SecondCard:
    """Answers APDUs. Replace what it answers by `scripted`: command prefix → answer with status word."""

    icc: RsaKey
    aip: bytes
    cdol1: bytes
    records: dict[tuple[int, int], bytes]
    afl: bytes = bytes.fromhex("08010300 10010101")
    aid: bytes = AID
    atc: int = 1
    kind: int | None = None  # what to answer; None: what was asked for
    counter_after: int = 1930
    scripted: dict[bytes, bytes] = field(default_factory=dict)
    seen: list[bytes] = field(default_factory=list)
    pdol_values: bytes = b""

    def transceive(self, command: bytes) -> bytes:
        self.seen.append(command)
        for prefix, answer in self.scripted.items():
            if command.startswith(prefix):
                return answer
        ins, data = command[1], command[5:-1]
        if ins == 0xA4:
            if not self.aid.startswith(data):
                return b"\x6a\x82"
            fci = pack("50", b"POS GATEWAY") + pack("9F38", PDOL)
            return pack("6F", pack("84", self.aid) + pack("A5", fci)) + b"\x90\x00"
        if ins == 0xA8:
            self.pdol_values = data[2:]
            return pack("77", pack("82", self.aip) + pack("94", self.afl)) + b"\x90\x00"
        if ins == 0xB2:
            record = self.records.get((command[3] >> 3, command[2]))
            return b"\x6a\x83" if record is None else record + b"\x90\x00"
        if ins == 0xAE:
            return self.generate_ac(command[2], data) + b"\x90\x00"
        return b"\x6d\x00"

    def iad(self) -> bytes:
        clear = self.counter_after.to_bytes(6, "big") + b"\0\0"
        return b"\x01\x01\x01" + bytes(5) + clear + bytes(8) + bytes(8)

    def generate_ac(self, p1: int, cdol1_values: bytes) -> bytes:
        cid = bytes([p1 & 0xC0 if self.kind is None else self.kind])
        ac = sha1(b"not a real MAC", cdol1_values)[:8]
        before = pack("9F27", cid) + pack("9F36", self.atc.to_bytes(2, "big"))
        after = pack("9F10", self.iad())
        if cid == b"\x00":
            return pack("77", before + pack("9F26", ac) + after)
        return pack("77", before + pack("9F4B", self.sdad(cid, ac, cdol1_values, before + after)) + after)

    def sdad(self, cid: bytes, ac: bytes, cdol1_values: bytes, answered: bytes) -> bytes:
        number = bytes(range(8))
        dynamic = bytes([8]) + number + cid + ac + sha1(self.pdol_values, cdol1_values, answered)
        padding = b"\xbb" * (self.icc.size - len(dynamic) - 25)
        block = b"\x05\x01" + bytes([len(dynamic)]) + dynamic + padding
        digest = sha1(block, cdol1_values[UN_IN_CDOL1])
        return self.icc.sign(b"\x6a" + block + digest + b"\xbc")
