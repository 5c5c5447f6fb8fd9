"""The fear: a run on other machines than the hostfile and the filters say, or a traceback instead of a line number."""

import random
import re
from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.launch.hostfile import Host, excluded, included, parse_hostfile

POOL = parse_hostfile("worker-1 slots=4\nworker-2 slots=4\n", "hosts")


def slots(hosts: tuple[Host, ...]) -> dict[str, list[int]]:
    return {host.name: list(host.slots) for host in hosts}


# --- what the documentation shows -----------------------------------


def test_a_hostfile_has_comments_blank_lines_and_an_order() -> None:
    text = "# the cluster\n\nworker-2   slots=2  # the small one\r\n\tworker-1 slots=4\n  # end"
    assert parse_hostfile(text, "hosts") == (Host("worker-2", (0, 1)), Host("worker-1", (0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker-2:0,2", {"worker-2": [0, 2]}),
        ("worker-2:2,0", {"worker-2": [0, 2]}),
        ("worker-2@worker-1:0,2", {"worker-1": [0, 2], "worker-2": [0, 1, 2, 3]}),
        (" worker-1 @ worker-2 : 3 ", {"worker-1": [0, 1, 2, 3], "worker-2": [3]}),
    ],
)
def test_included_are_only_the_named(text: str, expected: dict[str, list[int]]) -> None:
    assert slots(included(POOL, text, "--deepspeed_inclusion_filter")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker-1:0", {"worker-1": [1, 2, 3], "worker-2": [0, 1, 2, 3]}),
        ("worker-1", {"worker-2": [0, 1, 2, 3]}),
        ("worker-1:0,1,2,3@worker-2:3", {"worker-2": [0, 1, 2]}),
    ],
)
def test_excluded_are_only_the_named(text: str, expected: dict[str, list[int]]) -> None:
    assert slots(excluded(POOL, text, "--deepspeed_exclusion_filter")) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\n\nb\n", "hosts, line 3: b has no slots; expected .*worker-1 slots=4"),
        ("a slots=2\nb slots=two", 'hosts, line 2: found "slots=two" after b'),
        ("a slots=2\na slots=2\n", "hosts, line 2: a stands in line 1 already"),
        ("a slots=0", "hosts, line 1: a has slots=0, expected from 1"),
        ("a slots=999999", "a has slots=999999, expected from 1 to 1024"),
        ("a slots=2 gpus=3", 'found "gpus=3" after the slots of a'),
        ("$(reboot) slots=2", r'hosts, line 1: "\$\(reboot\)" is no machine\'s name.*ssh/config'),
        ("-oProxyCommand=x slots=2", "is no machine's name"),
        ("user@a slots=2", "a user or a port"),
        ("# nothing\n", "hosts names no machine"),
    ],
)
def test_a_wrong_line_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_hostfile(text, "hosts")


def test_all_wrong_lines_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as found:
        parse_hostfile("a\nb slots=1\nc slots=-1\n", "hosts")
    assert re.findall(r"line (\d)", str(found.value)) == ["1", "3"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worker-3", 'has no machine "worker-3". Did you mean worker-'),
        ("elsewhere", 'has no machine "elsewhere". It has worker-1, worker-2'),
        ("worker-1:4", "worker-1 has no slot 4; it has slots=4, from 0"),
        ("worker-1:0,x", 'found "x" for a slot of worker-1'),
        ("worker-1:", 'found "" for a slot'),
        ("worker-1@", "found no machine"),
        ("worker-1:0@worker-1:1", "worker-1 is named twice"),
        ("worker-1:0,0", "slot 0 of worker-1 is named twice"),
    ],
)
def test_a_wrong_filter_is_explained(text: str, words: str) -> None:
    for choose in (included, excluded):
        with pytest.raises(ConfigError, match=f"the filter is .*{re.escape(words)}"):
            choose(POOL, text, "the filter")


def test_a_filter_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no machine"):
        excluded(POOL, "worker-1@worker-2", "the filter")


# --- a reference written from the documentation -----------------------------------
#
# "hostnames and slot counts … worker-1 slots=4"; "NODE_SPEC[@NODE_SPEC ...] where NODE_SPEC=NAME[:SLOT[,SLOT ...]]. If
# :SLOT is omitted, include all slots on that host." It knows nothing of messages: None is "refused".


def reference_hostfile(text: str) -> dict[str, list[int]] | None:
    found: dict[str, list[int]] = {}
    for line in text.split("\n"):
        line = re.sub("#.*", "", line, flags=re.DOTALL).strip()
        if line == "":
            continue
        match = re.fullmatch(r"([a-zA-Z_0-9][a-zA-Z_0-9.\-]*)\s+slots=([0-9]{1,6})", line)
        if match is None or match.group(1) in found or not 0 < int(match.group(2)) < 1025:
            return None
        found[match.group(1)] = list(range(int(match.group(2))))
    return found or None


def reference_filter(pool: dict[str, list[int]], text: str, keep: bool) -> dict[str, list[int]] | None:
    named: dict[str, list[int]] = {}
    for spec in text.split("@"):
        match = re.fullmatch(r"\s*([^\s:]+)\s*(?::((?:\s*[0-9]{1,6}\s*,)*\s*[0-9]{1,6}\s*))?", spec)
        if match is None or match.group(1) not in pool or match.group(1) in named:
            return None
        numbers = pool[match.group(1)] if match.group(2) is None else [int(n) for n in match.group(2).split(",")]
        if len(set(numbers)) < len(numbers) or not set(numbers) <= set(pool[match.group(1)]):
            return None
        named[match.group(1)] = numbers
    result = {}
    for host, all_slots in pool.items():
        wanted = [slot for slot in all_slots if (slot in named.get(host, [])) == keep]
        if wanted:
            result[host] = wanted
    return result or None


PIECES = [
    *("a", "b", "worker-1", "node_2.x", "0", "1", "2", "7", "slots=", "slots=1", "slots=3", "slots=8", "slots=0"),
    *(
        " ",
        " ",
        "\t",
        "\n",
        "\n",
        "\r\n",
        "#",
        "@",
        ":",
        ",",
        "=",
        "-",
        "$(x)",
        '"',
        "'",
        "\\",
        "\x00",
        "é",
        "٣",
        "\u2028",
    ),
]
LINES = ["a slots=2\n", "b slots=8\n", "worker-1 slots=3 # x\n", "# a\n", "\n", "node_2.x\tslots=1\n"]
SPECS = [
    "a",
    "b",
    "worker-1",
    "node_2.x",
    "a:0",
    "b:1,0",
    "b:7",
    "worker-1:0,2",
    " a : 1 ",
    "a:0,1",
    "b:1,1",
    "a:2",
    "c",
]


def any_text(chance: random.Random, words: list[str], longest: int) -> str:
    return "".join(chance.choices(words, k=chance.randrange(longest)))


def test_10_000_random_hostfiles_are_read_as_the_reference_reads_them() -> None:
    chance = random.Random(20240229)
    accepted = 0
    for _ in range(10_000):
        text = any_text(chance, LINES if chance.random() < 0.5 else [*LINES, *PIECES], 6)
        expected = reference_hostfile(text)
        try:
            found = slots(parse_hostfile(text, "hosts"))
        except ConfigError:
            assert expected is None, repr(text)
        else:
            assert found == expected, repr(text)
            accepted += 1
    assert 1_000 < accepted < 9_000, "the inputs are too wild or too tame to say much"


@pytest.mark.parametrize("choose", [included, excluded])
def test_10_000_random_filters_choose_what_the_reference_chooses(choose: Any) -> None:
    chance = random.Random(20240301)
    hosts = parse_hostfile("a slots=2\nb slots=8\nworker-1 slots=3\nnode_2.x slots=1", "hosts")
    accepted = 0
    for _ in range(10_000):
        text = "@".join(chance.sample(SPECS, k=chance.randrange(5)))
        if chance.random() < 0.3:
            cut = chance.randrange(len(text) + 1)
            text = text[:cut] + any_text(chance, PIECES, 3) + text[cut:]
        expected = reference_filter(slots(hosts), text, keep=choose is included)
        try:
            found = slots(choose(hosts, text, "the filter"))
        except ConfigError:
            assert expected is None, repr(text)
        else:
            assert found == expected, repr(text)
            accepted += 1
    assert 1_000 < accepted < 9_000, "the inputs are too wild or too tame to say much"
