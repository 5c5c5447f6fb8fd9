"""Reading YAML: plain data, every key with its line, faults instead of surprises.

Words are read as YAML 1.2 reads them (``no`` stays a word, ``1e8`` is a number), except that only the values which
Accelerate's own files hold matter: true, false, null, numbers and strings.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from shardwise.config.messages import Fault, Path, shown
from shardwise.config.source import Source
from shardwise.errors import ConfigError

_DEEPEST = 64  # blocks inside each other
_MOST = 10_000  # values


class _Loader(yaml.SafeLoader):
    """The safe loader, with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base class's form)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), None)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    None,
)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 010 is ten, and 1:30 is no number


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def parse_yaml(text: str, name: str) -> Source:
    """Parse a YAML text; ConfigError with line and column where the syntax is broken."""
    try:
        return _Reader(name).read(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        found = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{name} is not YAML: {where}{found}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name} is not YAML: line {line}: found the character #x{error.character:04x}.") from None
    except RecursionError:
        raise ConfigError(f"{name} is not YAML: it holds more than {_DEEPEST} blocks inside each other.") from None


def read_scalar(text: str) -> Any:
    """The value of one word as it would be read in a file: ``3`` a number, ``true`` a truth value, ``no`` a word."""
    try:
        with _loader(text) as loader:
            node = loader.get_single_node()
            return _scalar(loader, node) if isinstance(node, yaml.ScalarNode) else text
    except (yaml.YAMLError, RecursionError):
        return text


@contextmanager
def _loader(text: str) -> Iterator[_Loader]:
    loader = _Loader(text)
    try:
        yield loader
    finally:
        loader.dispose()


class _Reader:
    """From the nodes of one text to plain data. An alias is read as if what it names stood there."""

    def __init__(self, name: str) -> None:
        self.source = Source(name, None)
        self.values = 0  # read so far

    def read(self, text: str) -> Source:
        with _loader(text) as loader:
            node = loader.get_single_node()
            if node is not None:
                self.source.data = self._value(loader, node, ())
        return self.source

    def _value(self, loader: _Loader, node: yaml.Node, path: Path) -> Any:
        self.values += 1
        if self.values > _MOST:  # a few aliases inside each other are worth billions
            raise _broken(f"found more than {_MOST} values, counting each alias as what it names", node)
        if len(path) > _DEEPEST:
            raise _broken(f"expected at most {_DEEPEST} blocks inside each other", node)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(loader, node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise _broken(f"found the tag {node.tag}, expected plain data", node)
        if isinstance(node, yaml.MappingNode):
            return self._block(loader, node, path)
        return [self._value(loader, item, (*path, place)) for place, item in enumerate(node.value)]

    def _block(self, loader: _Loader, node: yaml.MappingNode, path: Path) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _broken("found a block or a list as a key, expected a word", key_node)
            key = _scalar(loader, key_node)
            name, line = str(key), key_node.start_mark.line + 1
            here = (*path, name)
            if name in lines:
                places = f"on line {line}" if line == lines[name] else f"on lines {lines[name]} and {line}"
                text = f"found twice, {places}; expected once. Remove one of the two."
                self.source.faults.append(Fault(here, text))
            lines[name] = self.source.lines[here] = line
            found[key] = self._value(loader, value_node, here)
        return found


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> str | int | float | bool | None:
    try:
        value = loader.construct_object(node)
    except (ValueError, LookupError, AttributeError):  # a tag that promises something else; a number of 5000 digits
        raise _broken(f"found {shown(node.value)}, which is no {node.tag.rpartition(':')[2]}", node) from None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    raise _broken(f"found the tag {node.tag}, expected true, false, null, a number or text", node)


def _broken(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
