"""English and Chinese for pages and papers: catalogues in gettext's .po format, read once at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from babel.messages.pofile import read_po

CATALOGUES: Final = Path(__file__).parent / "dashboard" / "locale"
CODES: Final = ("en", "zh")
DEFAULT: Final = "en"
_TAGS: Final = {"en": "en", "zh": "zh-Hans"}


@dataclass(frozen=True, slots=True)
class Language:
    """`tag`: BCP 47, for the `lang` attribute. `words`: English to this language."""

    code: str
    tag: str
    words: Mapping[str, str]

    def tell(self, english: str, **values: object) -> str:
        """The sentence in this language, its `{name}` places filled."""
        text = self.words.get(english) or english
        return text.format(**values) if values else text


@lru_cache
def language(code: str) -> Language:
    """The language of this code, the default one for any other."""
    if code not in CODES or code == DEFAULT:
        return Language(DEFAULT, _TAGS[DEFAULT], {})
    with (CATALOGUES / f"{code}.po").open("rb") as file:
        catalogue = read_po(file, locale=code)
    words = {
        message.id: message.string
        for message in catalogue
        if isinstance(message.id, str) and isinstance(message.string, str) and message.id and message.string
    }
    return Language(code, _TAGS[code], words)


def chosen(cookie: str | None, accepted: str, default: str = DEFAULT) -> Language:
    """What this browser is to be shown: its own choice, else the first of ours that it accepts."""
    if cookie in CODES:
        return language(cookie)
    for part in accepted.split(","):
        code = part.partition(";")[0].strip().lower()[:2]
        if code in CODES:
            return language(code)
    return language(default)
