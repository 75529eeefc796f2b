"""Every sentence of pages, papers and scripts is told in Chinese too."""

from __future__ import annotations

import ast
import re
import string
from pathlib import Path

import jinja2
import pytest

import pos_gateway.gateway
from pos_gateway.gateway.dashboard.pages import TOLD_BY_THE_API, spoken_by_scripts
from pos_gateway.gateway.language import chosen, language
from pos_gateway.gateway.staff import STAFF_ROLES

GATEWAY = Path(pos_gateway.gateway.__file__).parent
CALLS = {"_", "tell"}


def sentences() -> dict[str, str]:
    """Each with where it stands."""
    found = dict.fromkeys(spoken_by_scripts(), "scripts")
    found |= dict.fromkeys(TOLD_BY_THE_API, "the API")
    found |= {role.word: "roles" for role in STAFF_ROLES}
    environment = jinja2.Environment(autoescape=True)
    for path in (GATEWAY / "dashboard" / "templates").glob("*.html"):
        for call in environment.parse(path.read_text()).find_all(jinja2.nodes.Call):
            said = call.args[0] if call.args and getattr(call.node, "name", "") == "_" else None
            if isinstance(said, jinja2.nodes.Const):
                found[said.value] = path.name
    for path in GATEWAY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in CALLS and isinstance(node.args[0].value, str):
                    found[node.args[0].value] = path.name
    return found


def places(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


def test_every_sentence_has_its_chinese_with_the_same_places() -> None:
    words = language("zh").words
    found = sentences()
    assert len(found) > 250
    assert {s: where for s, where in found.items() if s not in words} == {}
    assert {s: words[s] for s in found if places(s) != places(words[s])} == {}
    assert [s for s in words if s not in found] == [], "nobody says these any more"


def test_english_is_not_left_in_the_chinese() -> None:
    allowed = re.compile(
        r"\{\w+\}|PIN|API|APR|TLS|Wi-Fi|MB|Esc|pos-gateway|staff|code",
        re.ASCII,
    )
    left = {s: t for s, t in language("zh").words.items() if re.search(r"[A-Za-z]{2,}", allowed.sub("", t))}
    assert left == {}


@pytest.mark.parametrize(
    ("cookie", "accepted", "code"),
    [
        (None, "", "en"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "fr, en;q=0.8", "en"),
        ("zh", "en", "zh"),
        ("xx", "zh", "zh"),
        (None, "de", "en"),
    ],
)
def test_the_browsers_language_is_taken_unless_another_was_chosen(
    cookie: str | None, accepted: str, code: str
) -> None:
    assert chosen(cookie, accepted).code == code
