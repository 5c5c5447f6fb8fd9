"""The fear: a machine that cannot train and is told that it can, or a failure that does not say where."""

import json
from pathlib import Path

import pytest

from shardwise.selftest.book import CHECKS, Book, CheckFailed, Entry, NothingMoreToCheck, Pages, Verdict, read_books
from shardwise.selftest.report import all_passed, judge
from tests.front.command import shardwise

# Loaded by Python itself at the start of every process: breaks the sum of ranks on rank 1, or ends that rank in it.
FAULT = """
import os
if os.environ.get("RANK") == "1" and "LOCAL_RANK" in os.environ:
    import torch.distributed as dist
    real = dist.all_reduce
    def all_reduce(tensor, *arguments, **named):
        if os.environ["FAULT"] == "dies" and tensor.numel() == 1000:
            os._exit(7)
        done = real(tensor, *arguments, **named)
        if tensor.numel() == 1000:
            tensor[41] += 1
        return done
    dist.all_reduce = all_reduce
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home and a place for temporary files, where no run may leave a thing of ours."""
    (tmp_path / "temporary").mkdir()
    return tmp_path


def run(home: Path, *words: str, **extra: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the row of each check, and all that was printed."""
    empty = {name: str(home / "none") for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME")}
    done = shardwise(
        *["test", "--use_cpu", "-n", "2", *words],
        temporary=home / "temporary", cwd=home, HOME=str(home), SHARDWISE_RUN="", **empty, **extra,
    )  # fmt: skip
    assert not list((home / "temporary").glob("shardwise*"))
    rows = {check: row for check in CHECKS for row in done.stdout.splitlines() if row.startswith(f"{check} ")}
    return done.returncode, rows, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--zero_stage", "0"), id="stage 0", marks=pytest.mark.slow),
        pytest.param(
            ("--zero_stage", "3", "--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"),
            id="stage 3",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_verdict_is_good_on_two_ranks(home: Path, words: tuple[str, ...]) -> None:
    code, rows, printed = run(home, *words)
    assert code == 0, printed
    assert set(rows) == set(CHECKS) and all(" passed " in row for row in rows.values()), printed
    assert f"ZeRO stage {words[1]}" in rows["training"]


def test_config_that_cannot_work_ends_with_one_clear_error(home: Path) -> None:
    (home / "ds.json").write_text(
        json.dumps({"train_batch_size": 7, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}})
    )
    code, rows, printed = run(home, "--deepspeed_config_file", "ds.json")
    assert code == 1
    assert printed.count("train_batch_size is 7") == 1 and "ranks 0, 1:" in rows["settings"]
    assert "Traceback" not in printed
    assert all(" not reached" in row for check, row in rows.items() if check != "settings")

    (home / "ds.json").write_text('{"zero_optimization": {"stag": 2}}')
    code, rows, printed = run(home, "--deepspeed_config_file", "ds.json")
    assert code == 2 and not rows
    assert printed.count("error:") == 1 and 'Did you mean "stage"' in printed


def test_rank_with_wrong_values_is_named_and_the_others_go_on(home: Path) -> None:
    (home / "sitecustomize.py").write_text(FAULT)
    code, rows, printed = run(home, PYTHONPATH=str(home), FAULT="adds")
    assert code == 1
    assert "failed" in rows["reduce"] and "rank 1: all-reduce on cpu: element 41 is 4, expected 3" in rows["reduce"]
    assert "ranks" not in rows["reduce"]
    assert all(" passed " in row for check, row in rows.items() if check != "reduce"), printed
    assert "reduce: The messages arrive, but with wrong values" in printed  # what to do


@pytest.mark.slow
def test_rank_that_dies_is_named_with_the_check_it_died_in(home: Path) -> None:
    (home / "sitecustomize.py").write_text(FAULT)
    code, rows, printed = run(home, PYTHONPATH=str(home), FAULT="dies")
    assert code == 1
    assert "rank 1 of 2 failed (exit code 7)" in printed
    assert " failed " in rows["reduce"] and " passed " in rows["broadcast"]
    assert " not reached" in rows["training"]


def test_no_script_is_taken(home: Path) -> None:
    code, rows, printed = run(home, "train.py")
    assert code == 2 and not rows
    assert "takes no script" in printed and "'train.py'" in printed


# --- the report, from books written by hand -----------------------------------


def pages(rank: int, *entries: tuple[str, Verdict, str]) -> Pages:
    return Pages(rank, tuple(Entry(check, verdict, detail, "do this") for check, verdict, detail in entries))


def test_failure_is_told_once_for_all_ranks_that_say_the_same() -> None:
    books = [pages(rank, ("a", Verdict.FAILED, "odd" if rank == 2 else "bad")) for rank in range(4)]
    (line,) = judge(("a",), books)
    assert line.verdict == "failed" and line.details == ("ranks 0, 1, 3: bad", "rank 2: odd")
    assert line.advice == ("do this",)


def test_rank_that_never_began_or_died_counts_against_the_check() -> None:
    begun = ("a", Verdict.BEGUN, "")
    lines = judge(("a",), [pages(0, begun, ("a", Verdict.PASSED, "x")), pages(1, begun)])
    assert not all_passed(lines) and lines[0].details[0].startswith("rank 1: ended in the middle")
    lines = judge(("a",), [pages(0, begun, ("a", Verdict.PASSED, "x")), pages(1)])
    assert not all_passed(lines) and lines[0].verdict == "not reached"


def test_book_keeps_what_a_rank_found(tmp_path: Path) -> None:
    def wrong() -> str:
        raise CheckFailed("three is not two", "count again")

    def impossible() -> tuple[None, str]:
        raise ValueError("boom")

    book = Book(tmp_path, 1, range(2))
    assert book.check("settings", lambda: (5, "fine"), str) == 5
    book.compare("reduce", wrong, str)
    with pytest.raises(ValueError, match="boom"):
        book.check("training", impossible, lambda error: f"about {error}")
    absent, present = read_books(tmp_path)
    assert absent == Pages(0, ())
    assert present.last("settings") == Entry("settings", Verdict.PASSED, "fine")
    assert present.last("reduce") == Entry("reduce", Verdict.FAILED, "three is not two", "count again")
    assert present.last("training") == Entry("training", Verdict.FAILED, "ValueError: boom", "about boom")
    assert issubclass(NothingMoreToCheck, Exception)
