"""The files in docs/ that are made of the schema are what the schema makes now, and leave no key out."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from shardwise.config import EngineConfig, load_config
from shardwise.config.catalog import keys_of, sections_of
from shardwise.config.document import configuration_page, json_text, tables, type_in_words
from shardwise.config.effects import Acts, Alias, DeepSpeedDefault, NoEffect, Unsupported
from shardwise.config.json_schema import FILLED_ABOVE, config_schema
from shardwise.config.run.schema import PluginConfig
from shardwise.config.values import Block, Count, Names
from shardwise.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("configuration.md", configuration_page),
        ("deepspeed-config.schema.json", lambda: json.dumps(config_schema(also_auto=FILLED_ABOVE), indent=2) + "\n"),
    ],
    ids=["page", "schema"],
)
def test_the_file_in_docs_is_what_the_schema_makes(name, made):
    assert (DOCS / name).read_text(encoding="utf-8") == made(), f"docs/{name} is old: run `make docs`"


def test_every_key_stands_on_the_page_under_its_block_with_its_words():
    page = configuration_page()
    parts = {heading: text for heading, text in re.findall(r"^### (.*)\n((?:(?!^##).*\n)*)", page, re.MULTILINE)}
    by_block = {}
    for heading, text in parts.items():
        by_block.update(dict.fromkeys(heading.replace("`", "").split(", "), text))
    for key in (*keys_of(EngineConfig), *keys_of(PluginConfig, ("deepspeed_config",))):
        text = by_block[".".join(key.path[:-1]) or "Top level"]
        words = key.effect.meaning if isinstance(key.effect, Acts) else key.effect.reason
        assert any(f"`{key.path[-1]}`" in row and words in row for row in text.split("\n")), key.dotted


def test_the_error_on_the_page_is_one_that_the_loader_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        "{",
        "  // batch",
        '  "train_batch_size": "8",',
        "",
        '  "zero_optimizaton": {"stage": 2},',
        "",
        '  "fp16": {',
        '    "enabled": true,',
        '    "enabled": true',
        "  }",
        "}",
    ]
    Path("config.json").write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        load_config("config.json")
    (shown,) = re.findall(r"```text\n(.*?)\n```", configuration_page(), re.DOTALL)
    assert shown == str(caught.value)


def test_tables_have_as_many_cells_in_every_row():
    found = re.split(r"\n(?!\|)", configuration_page())
    assert len(found) > 100
    for table in found:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.split("\n") if line.startswith("|")}
        assert len(widths) <= 1, table


class _Inner(Block):
    """What is inside."""

    flag: Annotated[bool, NoEffect("nobody asks")] = False
    other: Annotated[bool, NoEffect("nobody asks")] = True


class _Root(Block):
    """Any block."""

    first: Annotated[Count, Acts("a count | of things", auto="7", cost="4 P"), Alias("erste")] = 30_000
    second: Annotated[Names, Unsupported("no names"), DeepSpeedDefault(("a",), "say it")] = ()
    third: Annotated[Literal["x"], Acts("must be said")]
    inner: Annotated[_Inner, Alias("innen")] = Field(default_factory=_Inner)


def test_a_small_block_reads_so():
    assert (
        tables(_Root, "Things")
        == """\
## Things

### Top level

| key | type | default | what it does | memory, traffic, speed |
| --- | --- | --- | --- | --- |
| `first` (also `erste`) | whole number ≥ 0 | `3e4` | a count \\| of things; `"auto"`: 7 | 4 P |
| `third` | x | required | must be said |  |

DeepSpeed differs where the key is not given:

- `second`: `["a"]`; say it

| not supported (default) | because |
| --- | --- |
| `second` (`[]`) | no names |

### `inner`

What is inside. Also written `innen`.

| accepted without effect (default) | because |
| --- | --- |
| `flag` (`false`), `other` (`true`) | nobody asks |
"""
    )


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 2**63 - 1}, "whole number ≥ 1"),
        ({"type": "integer", "minimum": 0, "maximum": 127}, "whole number ≥ 0, ≤ 127"),
        ({"type": "number", "exclusiveMinimum": 0}, "number > 0"),
        ({"anyOf": [{"enum": ["fp32", "bf16"], "type": "string"}, {"type": "null"}]}, "fp32, bf16 or null"),
        ({"enum": [0, 1, 2, 3], "type": "integer"}, "0, 1, 2 or 3"),
        ({"const": "fp32"}, "fp32"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "true, false or null"),
        ({"type": "array", "items": {"type": "string"}}, "list of names"),
        ({"type": "object"}, "block"),
        ({}, "anything"),
    ],
    ids=str,
)
def test_types_read_for_people(schema, words):
    assert type_in_words(schema) == words


def test_values_stand_as_one_writes_them():
    assert [json_text(v) for v in (500_000_000, 1_048_576, 1000, 0, 1.0, None, (), "none", True)] == [
        "5e8", "1048576", "1000", "0", "1.0", "null", "[]", '"none"', "true",
    ]  # fmt: skip


def test_a_stated_difference_from_deepspeed_is_one():
    stated = [key for key in keys_of(EngineConfig) if key.deepspeed is not None]
    assert "gradient_clipping" in {key.dotted for key in stated}
    for key in stated:
        assert key.deepspeed.value != key.default or key.deepspeed.note, key.dotted


def test_the_catalog_gives_the_same_keys_by_sections():
    by_sections = [key.dotted for section in sections_of(EngineConfig) for key in section.keys]
    assert sorted(by_sections) == sorted(key.dotted for key in keys_of(EngineConfig))


def test_words_of_cost_are_one_line_without_an_end():
    costs = [key.effect.cost for key in keys_of(EngineConfig) if isinstance(key.effect, Acts) and key.effect.cost]
    assert len(costs) > 20
    assert not [cost for cost in costs if cost.endswith(".") or "\n" in cost]
