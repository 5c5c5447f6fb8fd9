"""A labelled set of sentence pairs that is on every machine: does this sentence describe this function?

The pairs are made from Python's standard library. Half of them are a function and the first sentence of its own
docstring (label 1). In the other half the sentence is of something else (label 0): by turns of a class, which is easy
to tell, and of another function, which takes a reader of both texts.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import ConfigError

# Installed packages differ by machine, the docstring of a test is about something else, and tables have none.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "lib2to3"}
)
LEAST_WORDS = 4
LEAST_SENTENCES = 100  # of functions, and of classes
VALIDATION_SHARE = 8  # one function of so many is held out
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # in names, too: read_text and readText are two words each


@dataclass(frozen=True)
class Pair:
    """Two texts, and whether the first describes the second."""

    sentence: str
    function: str
    label: int


@dataclass
class _Found:
    functions: list[tuple[str, str]]  # each with its sentence
    classes: list[str]  # sentences alone


def docstring_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs held out; the same for one seed on every rank and in every run."""
    found = _read_standard_library()
    if min(len(found.functions), len(found.classes)) < LEAST_SENTENCES:
        raise ConfigError(
            f"Found {len(found.functions)} functions and {len(found.classes)} classes with docstrings in Python's "
            f"standard library, expected {LEAST_SENTENCES} or more of each: its sources are not installed. Use "
            "--dataset_name."
        )
    order = random.Random(seed)
    order.shuffle(found.functions)
    order.shuffle(found.classes)
    functions, classes = (len(sentences) // VALIDATION_SHARE for sentences in (found.functions, found.classes))
    # Cut first, then paired: no sentence and no function stands on both sides.
    training = _labelled(_Found(found.functions[functions:], found.classes[classes:]), order)
    return training, _labelled(_Found(found.functions[:functions], found.classes[:classes]), order)


def _labelled(found: _Found, order: random.Random) -> list[Pair]:
    """Each function once with its own sentence and once with one that is not its own."""
    pairs = []
    for number, (own, function) in enumerate(found.functions):
        # The next one's, the last takes the first's: in a random order, so it is anybody's but its own.
        following, _ = found.functions[(number + 1) % len(found.functions)]
        other = order.choice(found.classes) if number % 2 else following
        pairs += [Pair(own, function, 1), Pair(other, function, int(other == own))]
    order.shuffle(pairs)
    return pairs


def _read_standard_library() -> _Found:
    root = Path(sysconfig.get_path("stdlib"))
    functions: dict[tuple[str, str], None] = {}  # dicts for their order, without the same text twice
    classes: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in strings: not ours to mend
                tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:  # a template, or a source for another Python
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            sentence = _first_sentence(ast.get_docstring(node) or "")
            if len(sentence.split()) < LEAST_WORDS:
                continue
            if isinstance(node, ast.ClassDef):
                classes[sentence] = None
            else:
                functions[sentence, _function_words(node)] = None
    return _Found(list(functions), list(classes))


def _first_sentence(docstring: str) -> str:
    paragraph = docstring.strip().split("\n\n")[0]
    return _words(re.split(r"(?<=[.!?])\s", paragraph)[0])


def _function_words(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The words of a function's code, in order, without its docstring."""
    return _words(" ".join([node.name, ast.unparse(node.args), *map(ast.unparse, node.body[1:])]))


def _words(text: str) -> str:
    return " ".join(_WORDS.findall(text)).lower()
