"""What is shown when a config file has been made or mended."""

import sys
from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardwise.config.catalog import effect_of
from shardwise.config.effects import Acts
from shardwise.config.messages import shown
from shardwise.config.run.resolved import Resolved
from shardwise.config.run.said import Origin
from shardwise.config.run.schema import PluginConfig, RunConfig
from shardwise.questionnaire.update import Change

_ALWAYS = ("num_processes", "mixed_precision")
_WIDE = 10_000  # columns: where no terminal wraps lines, neither do we
_ALWAYS_WITH_ZERO = ("zero_stage", "gradient_accumulation_steps", "gradient_clipping")


def screen() -> Console:
    """Where tables and sentences are shown."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, soft_wrap=True, markup=False, highlight=False)


def settings_table(resolved: Resolved) -> Table:
    """The settings that anybody chose, and the most important of the others, each with its source."""
    table = _table("setting", "value", "source")
    for name in _telling(resolved):
        said = resolved.values[name]
        table.add_row(Text(name), Text(shown(said.value)), Text(said.place))
    return table


def changes_table(changes: Iterable[Change]) -> Table:
    """The keys that an update changes."""
    table = _table("setting", "before", "after", "because")
    for change in changes:
        cells = (change.key, change.before or "not there", change.after or "taken out", change.reason)
        table.add_row(*map(Text, cells))
    return table


def _telling(resolved: Resolved) -> Iterator[str]:
    always = _ALWAYS if resolved.ds_config is None else (*_ALWAYS, *_ALWAYS_WITH_ZERO)
    for name, said in resolved.values.items():
        block = PluginConfig if name in PluginConfig.model_fields else RunConfig
        acts = isinstance(effect_of(block.model_fields[name]), Acts)
        if name in always or (acts and said.origin is not Origin.DEFAULT):
            yield name


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, overflow="fold")
    return table
