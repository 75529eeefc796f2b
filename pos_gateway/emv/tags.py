"""The tag table: what each data element is called, how it is coded, and whether people may see it.

Sources: "B3" is EMV 4.3 Book 3, Annex A (data elements); "B1" is EMV 4.3 Book 1, Annex B;
"data sheet" is `application`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from pos_gateway.emv import application


class Format(Enum):
    """How a value is coded (EMV 4.3 Book 3 §4.3); decides how it is padded and truncated."""

    NUMERIC = "n"
    COMPRESSED_NUMERIC = "cn"
    TEXT = "ans"
    BINARY = "b"


@dataclass(frozen=True, slots=True)
class Tag:
    """One row of the table. `sensitive`: identifies the holder or the card, or tells what was spent."""

    tag: int
    name: str
    format: Format
    sensitive: bool
    source: str


_N, _CN, _T, _B = Format.NUMERIC, Format.COMPRESSED_NUMERIC, Format.TEXT, Format.BINARY

TABLE: Final = {
    row.tag: row
    for row in (
        Tag(0x42, "Issuer Identification Number", _N, False, "B3"),
        Tag(0x4F, "Application Identifier (AID) – card", _B, False, "B3"),
        Tag(0x50, "Application Label", _T, False, "B3"),
        Tag(0x56, "Track 1 Data", _T, True, "EMV Contactless Book C-2, Annex A"),
        Tag(0x57, "Track 2 Equivalent Data", _B, True, "B3"),
        Tag(0x5A, "Application Primary Account Number (PAN)", _CN, True, "B3"),
        Tag(0x5F20, "Cardholder Name", _T, True, "B3"),
        Tag(0x5F24, "Application Expiration Date", _N, True, "B3"),
        Tag(0x5F25, "Application Effective Date", _N, False, "B3"),
        Tag(0x5F28, "Issuer Country Code", _N, False, "B3"),
        Tag(0x5F2A, "Transaction Currency Code", _N, False, "B3"),
        Tag(0x5F2D, "Language Preference", _T, False, "B3"),
        Tag(0x5F30, "Service Code", _N, True, "B3"),
        Tag(0x5F34, "PAN Sequence Number", _N, False, "B3"),
        Tag(0x61, "Application Template", _B, False, "B3"),
        Tag(0x6F, "File Control Information (FCI) Template", _B, False, "B3"),
        Tag(0x70, "Record Template", _B, False, "B3"),
        Tag(0x77, "Response Message Template Format 2", _B, False, "B3"),
        Tag(0x80, "Response Message Template Format 1", _B, True, "B3"),
        Tag(0x82, "Application Interchange Profile (AIP)", _B, False, "B3"),
        Tag(0x84, "Dedicated File (DF) Name", _B, False, "B3"),
        Tag(0x87, "Application Priority Indicator", _B, False, "B3"),
        Tag(0x8A, "Authorisation Response Code", _T, False, "B3"),
        Tag(0x8C, "Card Risk Management Data Object List 1 (CDOL1)", _B, False, "B3"),
        Tag(0x8D, "Card Risk Management Data Object List 2 (CDOL2)", _B, False, "B3"),
        Tag(0x8E, "Cardholder Verification Method (CVM) List", _B, False, "B3"),
        Tag(0x8F, "Certification Authority Public Key Index", _B, False, "B3"),
        Tag(0x90, "Issuer Public Key Certificate", _B, False, "B3"),
        Tag(0x91, "Issuer Authentication Data", _B, True, "B3"),
        Tag(0x92, "Issuer Public Key Remainder", _B, False, "B3"),
        Tag(0x93, "Signed Static Application Data", _B, True, "B3"),
        Tag(0x94, "Application File Locator (AFL)", _B, False, "B3"),
        Tag(0x95, "Terminal Verification Results", _B, False, "B3"),
        Tag(0x97, "Transaction Certificate Data Object List (TDOL)", _B, False, "B3"),
        Tag(0x99, "Transaction PIN Data", _B, True, "B3"),
        Tag(0x9A, "Transaction Date", _N, False, "B3"),
        Tag(0x9B, "Transaction Status Information", _B, False, "B3"),
        Tag(0x9C, "Transaction Type", _N, False, "B3"),
        Tag(0x9F02, "Amount, Authorised (Numeric)", _N, True, "B3"),
        Tag(0x9F03, "Amount, Other (Numeric)", _N, True, "B3"),
        Tag(0x9F07, "Application Usage Control", _B, False, "B3"),
        Tag(0x9F08, "Application Version Number – card", _B, False, "B3"),
        Tag(0x9F09, "Application Version Number – terminal", _B, False, "B3"),
        Tag(0x9F0D, "Issuer Action Code – Default", _B, False, "B3"),
        Tag(0x9F0E, "Issuer Action Code – Denial", _B, False, "B3"),
        Tag(0x9F0F, "Issuer Action Code – Online", _B, False, "B3"),
        Tag(0x9F10, "Issuer Application Data (IAD)", _B, True, "B3"),
        Tag(0x9F12, "Application Preferred Name", _T, False, "B3"),
        Tag(0x9F15, "Merchant Category Code", _N, False, "B3"),
        Tag(0x9F16, "Merchant Identifier", _T, False, "B3"),
        Tag(0x9F1A, "Terminal Country Code", _N, False, "B3"),
        Tag(0x9F1C, "Terminal Identification", _T, False, "B3"),
        Tag(0x9F1F, "Track 1 Discretionary Data", _T, True, "B3"),
        Tag(0x9F20, "Track 2 Discretionary Data", _CN, True, "B3"),
        Tag(0x9F21, "Transaction Time", _N, False, "B3"),
        Tag(0x9F26, "Application Cryptogram", _B, False, "B3"),
        Tag(0x9F27, "Cryptogram Information Data (CID)", _B, False, "B3"),
        Tag(0x9F32, "Issuer Public Key Exponent", _B, False, "B3"),
        Tag(0x9F33, "Terminal Capabilities", _B, False, "B3"),
        Tag(0x9F34, "CVM Results", _B, False, "B3"),
        Tag(0x9F35, "Terminal Type", _N, False, "B3"),
        Tag(0x9F36, "Application Transaction Counter (ATC)", _B, False, "B3"),
        Tag(0x9F37, "Unpredictable Number", _B, False, "B3"),
        Tag(0x9F38, "Processing Options Data Object List (PDOL)", _B, False, "B3"),
        Tag(0x9F41, "Transaction Sequence Counter", _N, False, "B3"),
        Tag(0x9F42, "Application Currency Code", _N, False, "B3"),
        Tag(0x9F44, "Application Currency Exponent", _N, False, "B3"),
        Tag(0x9F45, "Data Authentication Code", _B, False, "B3"),
        # The certificate carries the PAN, and whoever has the public keys can take it out.
        Tag(0x9F46, "ICC Public Key Certificate", _B, True, "B3"),
        Tag(0x9F47, "ICC Public Key Exponent", _B, False, "B3"),
        Tag(0x9F48, "ICC Public Key Remainder", _B, True, "B3"),
        Tag(0x9F49, "Dynamic Data Authentication Data Object List (DDOL)", _B, False, "B3"),
        Tag(0x9F4A, "Static Data Authentication Tag List", _B, False, "B3"),
        Tag(0x9F4B, "Signed Dynamic Application Data (SDAD)", _B, True, "B3"),
        Tag(0x9F4C, "ICC Dynamic Number", _B, False, "B3"),
        Tag(0x9F4D, "Log Entry", _B, False, "B3"),
        Tag(0x9F66, "Terminal Transaction Qualifiers", _B, False, "EMV Contactless Book C-3, Annex A"),
        Tag(0x9F6B, "Track 2 Data", _B, True, "EMV Contactless Book C-2, Annex A"),
        Tag(0x9F6C, "Card Transaction Qualifiers", _B, False, "EMV Contactless Book C-3, Annex A"),
        Tag(0xA5, "FCI Proprietary Template", _B, False, "B1"),
        Tag(0xBF0C, "FCI Issuer Discretionary Data", _B, False, "B3"),
        Tag(application.TAG_NOTE, "Note (encrypted limit record)", _B, True, "data sheet"),
        Tag(application.TAG_CEILING, "Ceiling on the counter", _B, True, "data sheet"),
        Tag(application.TAG_LIMIT_DIGEST, "Digest of the limit record relied on", _B, False, "data sheet"),
        Tag(application.TAG_SALE_ID, "Sale id", _B, False, "data sheet"),
        Tag(application.TAG_PLAN_DIGEST, "Digest of the instalment plan", _B, False, "data sheet"),
        Tag(application.TAG_LOG, "Log of the latest TCs", _B, True, "data sheet"),
    )
}


def label(tag: int) -> str:
    """`5A` → `"5A Application Primary Account Number (PAN)"`; an unknown tag is only its number."""
    row = TABLE.get(tag)
    return f"{tag:X} {row.name}" if row else f"{tag:X}"


def format_of(tag: int) -> Format:
    """How a tag's value is coded; unknown tags count as binary."""
    row = TABLE.get(tag)
    return row.format if row else Format.BINARY


def redact(tag: int, value: bytes) -> str:
    """A value as people may see it: hex, or only its length if it is sensitive or unknown.

    Of a PAN the last four digits remain.
    """
    row = TABLE.get(tag)
    if row is not None and not row.sensitive:
        return value.hex().upper()
    if tag == 0x5A:
        return f"…{value.hex().upper().rstrip('F')[-4:]}"
    return f"({len(value)} bytes)"
