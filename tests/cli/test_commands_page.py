"""Every command is documented, and the pages name no command that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pos_gateway.cli.commands_page import commands, page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_commands_say() -> None:
    assert (DOCS / "commands.md").read_text() == page(), (
        "run: .venv/bin/python -m pos_gateway.cli.commands_page > docs/commands.md"
    )


def test_every_command_says_what_it_does() -> None:
    found = commands()
    assert len(found) > 80
    silent = [path for path, text in found if len(text.split()) < 2]
    assert not silent


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_a_page_names_only_commands_that_there_are(name: str) -> None:
    """As `pos-gateway noun verb …`, wherever that is written."""
    known = {path for path, _ in commands()}
    groups = {" ".join(path.split()[:length]) for path in known for length in (1, 2)}
    for written in re.findall(r"(?<![\"“])pos-gateway ((?:[a-z][a-z-]*[ |]*)+)", (DOCS / name).read_text()):
        words = written.replace("|", " ").split()
        if words[0] not in {path.split()[0] for path in known}:
            continue  # "pos-gateway" as a name, not a command
        fits = any(" ".join(words[:length]) in known for length in (1, 2, 3))
        assert fits or " ".join(words[:2]) in groups or len(words) == 1, f"{name}: pos-gateway {written}"
