"""The reader agrees with json on JSON, goes beyond it where it says so, and points at the place of a mistake."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.source import parse
from shardwise.errors import ConfigError

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_json, st.sampled_from([None, 1]), st.booleans())
def test_plain_json_reads_as_json_reads_it(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parse(text, "text").data == value


def test_comments_inside_strings_stay():
    assert parse('{"a": "# no // comment /* here */"}', "text").data == {"a": "# no // comment /* here */"}


def test_keys_know_their_lines():
    lines = parse('{\n"a": 1,\n\n"b": {"c": [\n{"d": 1}]}}', "text").lines
    assert lines == {("a",): 2, ("b",): 4, ("b", "c"): 4, ("b", "c", 0, "d"): 5}


def test_a_key_that_stands_twice_is_a_fault():
    (fault,) = parse('{"a": {"b": 1,\n"b": 2}}', "text").faults
    assert fault.path == ("a", "b")
    assert "on lines 1 and 2" in fault.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 1: found the end of the text, expected a value"),
        ('{"a": 1\n "b": 2}', 'line 2, column 2: found \'"b": 2}\', expected "," or "}"'),
        ("{a: 1}", "column 2: found 'a: 1}', expected a key in double quotes"),
        ('{"a" 1}', 'expected ":" after the key "a"'),
        ("[1, 2", 'found the end of the text, expected "," or "]"'),
        ('{"a": 1} x', "found 'x', expected the end of the text"),
        ("{,}", "expected a key in double quotes"),
        ('{"a": "\\q"}', "expected a value"),
        ("[01]", "found '01]', expected a value"),
        ("/* never closed", "expected a value"),
        ("[" * 100 + "]" * 100, "expected at most 64 blocks inside each other"),
    ],
    ids=range(11),
)
def test_broken_syntax_is_pointed_at(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text, "text")
    assert words in str(caught.value)


@given(st.text(alphabet='{}[]":,/*#\\n \n01eatrufls-+.'))
def test_any_text_parses_or_raises_exactly_config_error(text):
    try:
        parse(text, "text")
    except ConfigError as error:
        assert type(error) is ConfigError
