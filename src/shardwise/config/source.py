"""Reading a config's text: JSON with comments and trailing commas, every key with its line.

Beyond JSON the text may hold comments (``//`` and ``#`` to the end of the line, ``/* */``) and a comma after the last
item. A key that stands twice in one block is a fault, because only one of the two could act.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NoReturn

from shardwise.config.messages import Fault, Path, shown
from shardwise.errors import ConfigError

_SPACE = re.compile(r"(?:\s+|//[^\n]*|\#[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_SCALAR = re.compile(r"-?Infinity|NaN|true|false|null|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_DEEPEST = 64


@dataclass
class Source:
    """A config before it is checked: its plain data, and where each key of it stands."""

    name: str  # how messages call it
    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def read_source(source: str | FilePath) -> Source:
    """Read a file, or a base64 string of JSON; ConfigError if it is neither or its syntax is broken."""
    path = FilePath(source)
    try:
        if path.is_file():
            return parse(path.read_bytes().decode("utf-8-sig"), str(path))
        exists = path.exists()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        # A long base64 string is not a legal file name on every system, and a name may hold a null byte.
        text = _decoded(str(source))
        if text is None:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"The config file {shown(str(source))} cannot be read: {reason}.") from None
        return parse(text, "The base64 config")
    text = None if exists else _decoded(str(source))
    if text is not None:
        return parse(text, "The base64 config")
    found = "is a directory" if exists else "does not exist"
    raise ConfigError(f"The config file {shown(str(source))} {found}. Give the path of a JSON file, or a dict.")


def parse(text: str, name: str) -> Source:
    """Parse a config's text; ConfigError with line and column where the syntax is broken."""
    return _Parser(text, name).read()


def _decoded(text: str) -> str | None:
    """Return the JSON text that a base64 string holds, or None where it holds none."""
    try:
        decoded = base64.b64decode(text.translate(str.maketrans("-_", "+/")), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


class _Parser:
    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.at = 0
        self.source = Source(name, None)

    def read(self) -> Source:
        self._skip_space()
        self.source.data = self._value(())
        if self._skip_space() != "":
            self._fail("the end of the text")
        return self.source

    def _value(self, path: Path) -> Any:
        if len(path) > _DEEPEST:
            self._fail(f"at most {_DEEPEST} blocks inside each other")
        start = self.text[self.at : self.at + 1]
        if start == "{":
            return self._object(path)
        if start == "[":
            return self._array(path)
        return self._scalar(_STRING if start == '"' else _SCALAR, "a value")

    def _object(self, path: Path) -> dict[str, Any]:
        self.at += 1
        found: dict[str, Any] = {}
        while self._skip_space() != "}":
            line = self._line()
            if self.text[self.at : self.at + 1] != '"':
                self._fail('a key in double quotes, or "}"')
            key = self._scalar(_STRING, "a key in double quotes")
            if self._skip_space() != ":":
                self._fail(f'":" after the key "{key}"')
            self.at += 1
            self._skip_space()
            here = (*path, key)
            if key in found:
                earlier = self.source.lines[here]
                places = f"on line {line}" if line == earlier else f"on lines {earlier} and {line}"
                self.source.faults.append(Fault(here, f"found twice, {places}; expected once. Remove one of the two."))
            found[key] = self._value(here)
            self.source.lines[here] = line
            self._separator("}")
        self.at += 1
        return found

    def _array(self, path: Path) -> list[Any]:
        self.at += 1
        found: list[Any] = []
        while self._skip_space() != "]":
            found.append(self._value((*path, len(found))))
            self._separator("]")
        self.at += 1
        return found

    def _separator(self, end: str) -> None:
        following = self._skip_space()
        if following == ",":
            self.at += 1
        elif following != end:
            self._fail(f'"," or "{end}"')

    def _scalar(self, pattern: re.Pattern[str], expected: str) -> Any:
        match = pattern.match(self.text, self.at)
        if match is None:
            self._fail(expected)
        try:
            value = json.loads(match.group())
        except ValueError:
            self._fail(expected)
        self.at = match.end()
        return value

    def _skip_space(self) -> str:
        """Go to the next sign that counts, and return it; empty at the end."""
        match = _SPACE.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
        return self.text[self.at : self.at + 1]

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _fail(self, expected: str) -> NoReturn:
        column = self.at - self.text.rfind("\n", 0, self.at)
        rest = self.text[self.at : self.at + 20].split("\n")[0]
        found = repr(rest) if rest else "the end of the line" if self.at < len(self.text) else "the end of the text"
        raise ConfigError(
            f"{self.source.name} is not JSON: line {self._line()}, column {column}: found {found}, expected {expected}."
        )
