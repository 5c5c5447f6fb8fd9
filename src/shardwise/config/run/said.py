"""One mention of a setting: its value, who said it, and where it can be read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from shardwise.config.messages import shown
from shardwise.config.source import Source


class Origin(StrEnum):
    """Who says a value, the strongest first."""

    CODE = "code"  # an argument of DeepSpeedPlugin or Accelerator in the script
    FLAG = "flag"  # an option of `shardwise launch`
    FILE = "file"  # the YAML
    JSON = "json"  # the DeepSpeed JSON, which has the only word on its own concrete values
    AUTO = "auto"  # computed where the JSON says "auto"
    DEFAULT = "default"  # nobody


@dataclass(frozen=True)
class Said:
    """A value with its place: ``--zero_stage``, ``default_config.yaml, line 9``, ``ds_config.json, line 4``."""

    value: Any
    origin: Origin
    place: str

    def __str__(self) -> str:
        return f"{shown(self.value)} ({self.place})"


@dataclass(frozen=True)
class Asked:
    """Everything that was asked for before the script runs, or by the script itself.

    `mentions` holds for each setting of the run's schema what was said about it, the strongest first.
    """

    mentions: Mapping[str, tuple[Said, ...]] = field(default_factory=dict)
    json: Source | None = None  # the DeepSpeed JSON
    file: str | None = None  # the YAML that was read

    def said(self, name: str) -> Said | None:
        """What holds for a setting, as far as anybody said something."""
        mentions = self.mentions.get(name, ())
        return mentions[0] if mentions else None

    def stronger(self, mentions: Mapping[str, Said]) -> "Asked":
        """These mentions put before all others."""
        merged = dict(self.mentions)
        for name, said in mentions.items():
            merged[name] = (said, *merged.get(name, ()))
        return replace(self, mentions=merged)
