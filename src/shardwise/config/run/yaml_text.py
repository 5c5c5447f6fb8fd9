"""Reading YAML: plain data, every key with its line, faults instead of surprises.

Words are read as YAML 1.2 reads them (``no`` stays a word, ``1e8`` is a number), except that only the values which
Accelerate's own files hold matter: true, false, null, numbers and strings.
"""

import re
from typing import Any

import yaml

from shardwise.config.messages import Fault, Path
from shardwise.config.source import Source
from shardwise.errors import ConfigError


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
    source = Source(name, {})
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            source.data = _plain(loader, node, (), source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{name} is not YAML: {where}{error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not YAML: {error}.") from None
    finally:
        loader.dispose()
    return source


def read_scalar(text: str) -> Any:
    """The value of one word as it would be read in a file: ``3`` a number, ``true`` a truth value, ``no`` a word."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else text
    except yaml.YAMLError:
        return text
    finally:
        loader.dispose()


def _plain(loader: _Loader, node: yaml.Node, path: Path, source: Source) -> Any:
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key: Any = loader.construct_object(key_node, deep=True)
            key = key if isinstance(key, str | int | float | bool) or key is None else str(key)
            here = (*path, str(key))
            line = key_node.start_mark.line + 1
            if key in found:
                places = f"lines {source.lines[here]} and {line}"
                source.faults.append(Fault(here, f"found twice, on {places}; expected once. Remove one of the two."))
            source.lines[here] = line
            found[key] = _plain(loader, value_node, here, source)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, place), source) for place, item in enumerate(node.value)]
    return loader.construct_object(node)
