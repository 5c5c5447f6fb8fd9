"""What a set of answers comes to: the text of the file, and the settings of a run that it leads to."""

from dataclasses import dataclass
from pathlib import Path

from shardwise.config.run.file import checked_run, file_mentions
from shardwise.config.run.gather import read_json
from shardwise.config.run.precedence import resolve
from shardwise.config.run.resolved import Resolved
from shardwise.config.run.said import Asked
from shardwise.config.run.yaml_text import parse_yaml
from shardwise.config.source import parse
from shardwise.questionnaire.question import Answers
from shardwise.questionnaire.run_file import as_run, as_text


@dataclass(frozen=True)
class Outcome:
    """The file to write, and what a run makes of it."""

    text: str
    resolved: Resolved
    notes: tuple[str, ...]


def outcome_of(answers: Answers, path: Path) -> Outcome:
    """Write the answers down and read them back by the launcher's own rules; ConfigError where it would refuse them."""
    text = as_text(as_run(answers), path)
    source = parse(text, path.name) if path.suffix == ".json" else parse_yaml(text, path.name)
    mentions = file_mentions(checked_run(source))
    asked = Asked({name: (said,) for name, said in mentions.items()}, file=str(path))
    named = asked.said("deepspeed_config_file")
    if named is None:
        return Outcome(text, resolve(asked), ())
    asked = Asked(asked.mentions, read_json(named, str(path)), str(path))
    return Outcome(text, resolve(asked), _notes(Path(named.value), path))


def _notes(json: Path, path: Path) -> tuple[str, ...]:
    if json.expanduser().is_absolute() or json.resolve() == (path.resolve().parent / json):
        return ()
    return (
        f"deepspeed_config_file {json} is found from {Path.cwd()} alone. Launch from there, or give its absolute path.",
    )
