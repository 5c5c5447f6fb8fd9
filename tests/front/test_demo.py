"""The main job `examples/train_gpt.py`: its result is what it says, and a mistake is told before it costs time."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardwise.errors import ConfigError

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra 'demo')")
pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra 'demo')")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as for a script that is run from there

demo_model, demo_options, demo_result, demo_text = (
    importlib.import_module(name) for name in ("demo_model", "demo_options", "demo_result", "demo_text")
)

NUM_RANKS = 2
SEQUENCE_LENGTH = 32
LAUNCH = [sys.executable, "-m", "shardwise.commands.main", "launch", "--cpu", "--num_processes", str(NUM_RANKS)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text to train on; the cache and the results go beside it."""
    folder = tmp_path_factory.mktemp("demo")
    source = Path(subprocess.__file__).read_text(encoding="utf-8")
    (folder / "text.py").write_text(source, encoding="utf-8")
    return folder


def command(workplace: Path, *arguments: str) -> list[str]:
    tiny = f"--model tiny --sequence-length {SEQUENCE_LENGTH} --batch-size 2 --learning-rate 5e-3".split()
    folders = ["--train-file", str(workplace / "text.py"), "--cache-dir", str(workplace / "cache")]
    return [*LAUNCH, str(EXAMPLES / "train_gpt.py"), *tiny, *folders, *arguments]


def launch(workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workplace, *arguments), capture_output=True, text=True, cwd=workplace, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def first_run(workplace: Path) -> subprocess.CompletedProcess[str]:
    run = launch(workplace, "--steps", "4", "--output-dir", str(workplace / "result"))
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def first_result(first_run: subprocess.CompletedProcess[str], workplace: Path) -> dict[str, object]:
    return json.loads((workplace / "result" / demo_result.OWN_MARK).read_text())


@pytest.mark.world
def test_one_process_speaks_in_plain_lines(first_run: subprocess.CompletedProcess[str]) -> None:
    assert "\x1b" not in first_run.stdout, "styles and cursor moves belong on a terminal alone"
    for line in (
        "validation loss before training",
        "step 4/4",
        "validation loss after training",
        "model states on each",
    ):
        assert first_run.stdout.count(line) == 1
    assert "ZeRO stage 3" in first_run.stdout


@pytest.mark.world
def test_each_rank_holds_half_of_everything(first_run: subprocess.CompletedProcess[str]) -> None:
    rows = [
        line for line in first_run.stdout.splitlines() if line.startswith(("│ parameters", "│ grad", "│ optimizer"))
    ]
    assert len(rows) == 3
    assert all("50%" in row for row in rows)


@pytest.mark.world
def test_the_saved_model_is_the_trained_one(first_result: dict[str, float], workplace: Path) -> None:
    assert first_result["loss_after"] < first_result["loss_before"] - 0.05

    folder = workplace / "result"
    model, loading = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    corpus = demo_text.read_corpus(workplace / "text.py")
    text = demo_text.load_tokenised(corpus, workplace / "cache", model.config.vocab_size, None)
    assert (
        text.tokenizer.to_str()
        == transformers.tokenization_utils_fast.TokenizerFast.from_file(str(folder / "tokenizer.json")).to_str()
    )
    held_out = demo_text.Windows(text.validation_ids, SEQUENCE_LENGTH, seed=0)
    num_sequences = min(16, len(held_out) // NUM_RANKS // 2 * 2) * NUM_RANKS  # whole batches of 2, at most 8 a rank
    with torch.no_grad():
        losses = [
            model(**{name: ids[None] for name, ids in held_out[index].items()}).loss for index in range(num_sequences)
        ]
    # The same sums in batches of another shape: equal but for rounding.
    assert torch.stack(losses).mean().item() == pytest.approx(first_result["loss_after"], abs=1e-4)


@pytest.mark.world
@pytest.mark.slow
def test_a_stage_of_the_users_json_replaces_the_result_with_the_same_bits(
    first_result: dict[str, float], workplace: Path
) -> None:
    before = load_file(workplace / "result" / "model.safetensors")
    (workplace / "stage1.json").write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": "auto"} // joined')

    run = launch(workplace, "--steps", "4", "--output-dir", "result", "--config", "stage1.json")

    assert run.returncode == 0, run.stdout + run.stderr
    assert "ZeRO stage 1" in run.stdout
    second_result = json.loads((workplace / "result" / demo_result.OWN_MARK).read_text())
    assert second_result["config"]["zero_optimization"] == {"stage": 1}
    assert second_result["loss_after"] == first_result["loss_after"]
    after = load_file(workplace / "result" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in workplace.glob(".result*")] == [], "a draft or the former result was left behind"


@pytest.mark.world
def test_a_mistake_is_told_once_and_before_anything_starts(workplace: Path) -> None:
    foreign = workplace / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")

    run = launch(workplace, "--output-dir", str(foreign))

    assert run.returncode == 2
    assert run.stderr.count("error: ") == 1
    assert "Traceback" not in run.stderr
    assert str(foreign) in run.stderr
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


@pytest.mark.world
def test_ctrl_c_ends_the_run_and_leaves_no_result(workplace: Path) -> None:
    process = subprocess.Popen(
        command(workplace, "--steps", "1000000", "--output-dir", "stopped"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=workplace,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "validation loss before" in line:
            os.killpg(process.pid, signal.SIGINT)
            said.append(process.stdout.read())
    assert process.wait() == 130, "".join(said)
    assert "Traceback" not in "".join(said)
    assert "nothing was saved" in "".join(said)
    assert not (workplace / "stopped").exists()


def test_standard_library_is_split_by_file() -> None:
    corpus = demo_text.read_corpus(None)
    assert not set(corpus.train) & set(corpus.validation) - {""}
    assert len(corpus.train) > 15 * len(corpus.validation)
    assert corpus == demo_text.read_corpus(None)


def test_own_text_holds_out_its_end(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {number}\n" for number in range(100)))
    corpus = demo_text.read_corpus(file)
    assert corpus.train + corpus.validation == [
        "".join(f"line {number}\n" for number in range(95)),
        "".join(f"line {number}\n" for number in range(95, 100)),
    ]
    for text, fault in (("one line", "1 lines"), ("\xff", "UTF-8")):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=fault):
            demo_text.read_corpus(file)


def test_tokens_spell_the_text_and_come_from_the_cache_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = demo_text.Corpus("a text", ["def f():\n    return 'ä€'\n", "x = 1\n"], ["y = 2\n"], "d")
    first = demo_text.load_tokenised(corpus, tmp_path, 300, None)
    end = demo_text.END_OF_TEXT
    assert first.tokenizer.decode(first.train_ids.tolist(), skip_special_tokens=False) == (
        corpus.train[0] + end + corpus.train[1] + end
    )
    monkeypatch.delattr(demo_text, "_train_tokenizer")
    monkeypatch.delattr(demo_text, "_encode")
    second = demo_text.load_tokenised(corpus, tmp_path, 300, None)
    assert second.train_ids.tolist() == first.train_ids.tolist()
    assert second.validation_ids.tolist() == first.validation_ids.tolist()


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    corpus = demo_text.Corpus("a text", ["some words, some more words"], ["and words"], "a")
    demo_text.load_tokenised(corpus, tmp_path, 270, None).tokenizer.save(str(tmp_path / "own.json"))
    with pytest.raises(ConfigError, match="room for 260"):
        demo_text.load_tokenised(corpus, tmp_path, 260, tmp_path / "own.json")


def test_windows_hold_every_token_once() -> None:
    ids = torch.arange(103).numpy().astype("uint32")
    windows = demo_text.Windows(ids, 10, seed=3)
    seen = torch.cat([windows[index]["input_ids"] for index in range(len(windows))])
    assert sorted(seen.tolist()) == list(range(100))
    assert seen.tolist() != list(range(100)), "the order is drawn"


def options(*arguments: str) -> demo_options.Options:
    return demo_options.read_options(list(arguments))


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--zero-stage", "4"], "--zero-stage is 4"),
        (["--steps", "0"], "--steps is 0"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--steps", "many"], "--steps: invalid int"),
        (["--no-such-option"], "--no-such-option"),
        (["--bf16", "--fp16"], "Choose one"),
        (["--train-file", "nowhere.txt"], "nowhere.txt"),
        (["--output-dir", "a-file"], "not a folder"),
        (["--output-dir", "a-file/below"], "cannot be made"),
        (["--output-dir", "."], "holds files"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], fault: str, in_empty_folder: Path) -> None:
    (in_empty_folder / "a-file").write_text("")
    with pytest.raises(ConfigError, match=fault):
        options(*arguments)


DEFAULTS = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 200}},
}


@pytest.mark.parametrize(
    ("written", "arguments", "expected"),
    [
        ({}, [], {}),
        ({"zero_optimization": {"stage": 1}}, [], {"zero_optimization": {"stage": 1}}),
        ({"zero_optimization": {"stage": 0}}, ["--zero-stage", "0"], {"zero_optimization": {"stage": 0}}),
        ({"fp16": {"enabled": True}}, [], {"fp16": {"enabled": True}, "bf16": None}),
        ({"bf16": {"enabled": "auto"}}, [], {"fp16": None}),
        ({"train_batch_size": 32}, [], {"train_batch_size": 32, "train_micro_batch_size_per_gpu": None}),
        ({"train_batch_size": "auto"}, [], {"train_batch_size": "auto"}),
        (
            {"train_batch_size": 32},
            ["--batch-size", "4"],
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": "auto", "eps": 1e-6}}},
            [],
            {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "eps": 1e-6}}, "scheduler": None},
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto"}}},
            [],
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 200, "warmup_max_lr": 1e-3}}},
        ),
    ],
)
def test_the_users_json_comes_before_the_defaults(
    written: dict[str, object], arguments: list[str], expected: dict[str, object], in_empty_folder: Path
) -> None:
    Path("own.json").write_text(json.dumps(written))
    joined = demo_options.join_config(DEFAULTS, options("--config", "own.json", *arguments))
    assert joined == {key: value for key, value in (DEFAULTS | expected).items() if value is not None}


@pytest.mark.parametrize(
    ("written", "arguments", "fault"),
    [
        ('{"zero_optimization": {"stage": 2}}', ["--zero-stage", "0"], "zero_optimization.stage is 2"),
        ('{"zero_optimization": true}', ["--zero-stage", "2"], "zero_optimization is True"),
        ('{"bf16": {"enabled": false}}', ["--bf16"], "bf16.enabled is False"),
        (
            '{"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}',
            ["--learning-rate", "1"],
            "optimizer.params.lr is 0.1",
        ),
        ('{"steps_per_print": 1, "steps_per_print": 2}', [], "found twice"),
        ("[1]", [], "expected a block"),
        ("{", [], "not JSON"),
    ],
)
def test_contradictions_with_the_users_json_are_named(
    written: str, arguments: list[str], fault: str, in_empty_folder: Path
) -> None:
    Path("own.json").write_text(written)
    with pytest.raises(ConfigError, match=fault):
        demo_options.join_config(DEFAULTS, options("--config", "own.json", *arguments))


def test_a_folders_architecture_is_read_and_its_bounds_are_kept(tmp_path: Path) -> None:
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 1}
    transformers.GPT2Config(**shape, n_positions=24, vocab_size=300).save_pretrained(tmp_path)
    config, sequence_length = demo_model.read_model_config(str(tmp_path), None)
    assert (config.vocab_size, sequence_length) == (300, 24)
    with pytest.raises(ConfigError, match="reads 24 at most"):
        demo_model.read_model_config(str(tmp_path), 25)
    transformers.GPT2Config(**shape, vocab_size=200).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocab_size of 200"):
        demo_model.read_model_config(str(tmp_path), None)
    transformers.CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tiny, small, gpt2"):
        demo_model.read_model_config(str(tmp_path / "nowhere"), None)
    with pytest.raises(ConfigError, match="vocab_size of 0"):
        demo_model.read_model_config(str(tmp_path), None)


def test_writing_asks_the_model_once_a_token_and_draws_by_seed(tmp_path: Path) -> None:
    corpus = demo_text.Corpus("a text", ["some words"], ["words"], "some")
    tokenizer = demo_text.load_tokenised(corpus, tmp_path, 260, None).tokenizer
    lengths: list[int] = []

    def next_logits(ids: torch.Tensor) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return torch.zeros(1000)  # more entries than the tokenizer's

    def write(seed: int) -> str:
        lengths.clear()
        return demo_model.write_on(next_logits, tokenizer, "some", num_tokens=9, context=8, temperature=1.0, seed=seed)

    assert write(0) == write(0) != write(1)
    assert len(lengths) == 9
    assert max(lengths) == 8


def test_a_failed_swap_keeps_the_former_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = demo_text.Corpus("a text", ["some words"], ["words"], "some")
    tokenizer = demo_text.load_tokenised(corpus, tmp_path / "cache", 260, None).tokenizer
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=8, vocab_size=260)
    model = demo_model.build_model(config, seed=0)
    folder = tmp_path / "result"
    demo_result.save_result(folder, model, model.state_dict(), tokenizer, {"run": 1})

    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no space"):
        demo_result.save_result(folder, model, model.state_dict(), tokenizer, {"run": 2})
    assert json.loads((folder / demo_result.OWN_MARK).read_text()) == {"run": 1}
