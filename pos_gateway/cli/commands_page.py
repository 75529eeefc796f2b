"""`python -m pos_gateway.cli.commands_page > docs/commands.md`: every command, as its own help says it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Final

import typer
from typer.core import TyperGroup

from pos_gateway.cli.main import NOUNS, build

_HEAD: Final = """# Commands

Made by `python -m pos_gateway.cli.commands_page` from the commands' own help; a test holds this page to it.
What they answer and their exit codes: [operating.md](operating.md#exit-codes).
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [_HEAD]
    for noun, command in _nouns():
        parts.append(f"\n## {noun}\n")
        if isinstance(command, TyperGroup):
            parts.append(f"\n{_text(command)}\n")
        parts += [_section(path, leaf) for path, leaf in _leaves(noun, command)]
    return "".join(parts)


def commands() -> list[tuple[str, str]]:
    """Every command's words, and what its help says."""
    return [(path, _text(leaf)) for noun, command in _nouns() for path, leaf in _leaves(noun, command)]


def _nouns() -> list[tuple[str, Any]]:
    top: Any = typer.main.get_command(build([]))
    return [(noun, top.commands[noun]) for noun in NOUNS]


# Typer brings its own copy of click: its objects are looked at here by their attributes alone.
def _leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from _leaves(f"{path} {name}", below)
    elif not command.hidden:
        yield path, command


def _section(path: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join([path, *(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments)])
    lines = [f"\n### `pos-gateway {usage}`\n", f"\n{_text(command)}\n"]
    described = [(f"`{p.name.upper()}`", p) for p in arguments if p.help] + [(_flags(p), p) for p in options]
    if described:
        lines.append("\n")
        lines += [f"- {shown} {' '.join((p.help or '').split())}".rstrip() + "\n" for shown, p in described]
    return "".join(lines)


def _flags(option: Any) -> str:
    flags = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return f"`{flags}`"
    return f"`{flags} …`" + (", again for more:" if option.multiple else "")


def _text(command: Any) -> str:
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


if __name__ == "__main__":
    print(page(), end="")
