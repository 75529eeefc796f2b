"""TOML files that people write, held to a pydantic model. Every error names file, key and line; an unknown
key is one, with the nearest known key as a suggestion."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from pos_gateway.errors import InvalidConfiguration

_MAX_FILE_BYTES: Final = 256 * 1024

Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A table of a TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def load(model: type[Model], paths: Sequence[Path]) -> Model:
    """The files laid over each other, single values of later ones winning.

    Raises:
        InvalidConfiguration: names file, key and line, and the nearest known key.
    """
    return _validate(model, [_read(path) for path in paths])


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    text: str
    content: dict[str, Any]

    def holds(self, keys: Sequence[str | int]) -> bool:
        node: Any = self.content
        for key in keys:
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    def where(self, keys: Sequence[str | int]) -> str:
        """Where the key stands, or the nearest thing above it that stands anywhere."""
        for length in range(len(keys), 0, -1):
            line = _line_of(self.text, keys[:length])
            if line is not None:
                return f"{self.path} line {line}"
        return str(self.path)


def _read(path: Path) -> _File:
    try:
        data = path.read_bytes()
        if len(data) > _MAX_FILE_BYTES:
            raise InvalidConfiguration(f"over {_MAX_FILE_BYTES} bytes", where=str(path))
        text = data.decode()
        return _File(path, text, tomllib.loads(text))
    except OSError as error:
        raise InvalidConfiguration(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidConfiguration("not UTF-8", where=f"{path} line {line}") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfiguration(f"not TOML: {error}", where=str(path)) from None


def _validate(model: type[Model], files: Sequence[_File]) -> Model:
    merged: dict[str, Any] = {}
    for file in files:
        merged = _overlay(merged, file.content)
    try:
        return model.model_validate(merged)
    except ValidationError as caught:
        errors = caught.errors(include_url=False, include_context=False)
    # A misspelt key is both unknown and missing; the first is the better news.
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    keys = error["loc"]
    name = ".".join(str(key) for key in keys)
    file = next((f for f in reversed(files) if f.holds(keys)), files[0])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(keys[-1]), _known_keys(model, keys[:-1]), n=1, cutoff=0.6)
        advice = f"did you mean {near[0]!r}?" if near else "remove it"
        raise InvalidConfiguration(f"unknown key {name!r}", where=file.where(keys), advice=advice)
    if error["type"] == "missing":
        raise InvalidConfiguration(f"key {name!r} is missing", where=file.where(keys[:-1]))
    reason = error["msg"].removeprefix("Value error, ")
    raise InvalidConfiguration(f"key {name!r}: {reason}", where=file.where(keys))


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _overlay(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _known_keys(model: type[BaseModel], keys: Sequence[str | int]) -> list[str]:
    for key in keys:
        if isinstance(key, str):
            inner = next(_models_in(model.model_fields[key].annotation), None)
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (tuple, Annotated, Union, UnionType):
        for argument in get_args(annotation):
            yield from _models_in(argument)


_HEADER: Final = re.compile(r"\s*\[(\[?)\s*([^\[\]#]+?)\s*\]")
_KEY: Final = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")


def _line_of(text: str, keys: Sequence[str | int]) -> int | None:
    """The line on which a key or table begins; plain layouts only, which is what people write."""
    wanted = tuple(keys)
    table: tuple[str | int, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            name = header[2]
            table = tuple(name.split("."))
            if header[1]:
                table += (counts.setdefault(name, 0),)
                counts[name] += 1
            if table == wanted or table[:-1] == wanted:
                return number
        elif (key := _KEY.match(line)) and (*table, key[1]) == wanted:
            return number
    return None
