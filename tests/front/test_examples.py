"""The fear: an example that a newcomer copies does not run as its first lines say, or trains what it does not say.

Every run is `shardwise launch` of the script as it stands, without a network; what it measured is its tracker's.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwise.config import load_config
from shardwise.errors import ConfigError
from shardwise.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.accelerators import fresh_state
from tests.front.command import shardwise

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra 'demo')")
pytest.importorskip("tokenizers", reason="tokenizers is not installed (the extra 'demo')")

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATES = EXAMPLES / "deepspeed_config_templates"
CLM = EXAMPLES / "by_feature" / "deepspeed_with_config_support.py"
NUM_STEPS = 6
SAVED_AT = 3  # where runs of stage 3 leave a checkpoint

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    output_dir: Path
    rows: Rows  # of the tracker, in order
    out: str

    def measured(self, after: int = 0) -> Rows:
        """The rows of later steps, without the time of day."""
        return [
            {name: value for name, value in row.items() if name != "_time"} for row in self.rows if row["_step"] > after
        ]


@dataclass(frozen=True)
class Place:
    """A folder where examples run; the text and the cache are there for all of them."""

    folder: Path

    def launch(self, name: str, *arguments: str, fails: bool = False) -> Run:
        """Run `shardwise launch ARGUMENTS`, with `--output_dir` and a tracker in the folder `name`."""
        tracked = ("--with_tracking", "--output_dir", name)
        ended = shardwise(
            "launch", "--cpu", *arguments, *tracked, temporary=self.folder, cwd=self.folder, HF_HUB_OFFLINE="1"
        )
        assert (ended.returncode != 0) == fails, ended.stdout + ended.stderr
        tables = sorted((self.folder / name).glob("*/jsonl_*/metrics.jsonl"))
        rows = [json.loads(line) for line in tables[-1].read_text().splitlines()] if tables else []
        return Run(self.folder / name, rows, ended.stdout + ended.stderr)

    def clm(self, name: str, config: str, *arguments: str, num_processes: int = 2, batch_size: int = 4) -> Run:
        """Train the tiny causal language model under a JSON of this folder."""
        started = ("--num_processes", str(num_processes), "--deepspeed_config_file", config)
        model = ("--config_name", "tiny", "--train_file", "text.py", "--cache_dir", "cache", "--block_size", "32")
        steps = ("--max_train_steps", str(NUM_STEPS), "--logging_steps", "1")
        batch = ("--per_device_train_batch_size", str(batch_size), "--learning_rate", "5e-3")
        return self.launch(name, *started, str(CLM), *model, *steps, *batch, *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.py").write_text(Path(subprocess.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    for stage in range(4):
        # One template for all: stage 3's own keeps small parameters whole, so its norm, which clips, rounds otherwise.
        config = json.loads((TEMPLATES / "zero_stage2_config.json").read_text())
        config["zero_optimization"]["stage"] = stage
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
        del config["fp16"]
        (folder / f"stage{stage}.json").write_text(json.dumps(config))
    return Place(folder)


@pytest.fixture(scope="module")
def stages(place: Place) -> Callable[[int], Run]:
    """The run of each stage in fp32, made when it is first asked for."""
    made: dict[int, Run] = {}

    def of(stage: int) -> Run:
        if stage not in made:
            saving = ("--checkpointing_steps", str(SAVED_AT)) if stage == 3 else ()
            made[stage] = place.clm(f"stage{stage}", f"stage{stage}.json", *saving)
        return made[stage]

    return of


@pytest.fixture(scope="module")
def modules() -> Callable[[str], ModuleType]:
    """Modules of examples/, imported as their scripts import them."""
    for folder in (CLM.parent, EXAMPLES):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module


# --- the causal language model under a JSON ---------------------------------------------------------------------------


@pytest.mark.world
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_changes_no_bit(stages: Callable[[int], Run], stage: int) -> None:
    reference, run = stages(0), stages(stage)
    assert len(reference.rows) == NUM_STEPS + 1, "a row a step and one of the evaluation"
    assert reference.rows[NUM_STEPS - 1]["train_loss"] < reference.rows[0]["train_loss"] - 0.3, "it learns"
    assert run.measured() == reference.measured()
    assert f"ZeRO stage {stage}" in run.out


@pytest.mark.world
@pytest.mark.slow
def test_one_process_trains_like_two_with_half_the_batch_each(stages: Callable[[int], Run], place: Place) -> None:
    one = place.clm("one_process", "stage3.json", num_processes=1, batch_size=8).measured()
    two = stages(3).measured()
    assert len(one) == len(two)
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.world
@pytest.mark.slow
def test_the_saved_model_is_the_trained_one_at_every_stage(stages: Callable[[int], Run], modules: Any) -> None:
    weights = load_file(stages(0).output_dir / "model.safetensors")
    gathered = load_file(stages(3).output_dir / "model.safetensors")
    assert weights.keys() == gathered.keys()
    assert all(torch.equal(weights[name], gathered[name]) for name in weights)

    model = transformers.AutoModelForCausalLM.from_pretrained(stages(3).output_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stages(3).output_dir)
    text, place = modules("demo_text"), stages(3).output_dir.parent
    tokenised = text.load_tokenised(text.read_corpus(place / "text.py"), place / "cache", model.config.vocab_size, None)
    assert tokenizer.backend_tokenizer.get_vocab() == tokenised.tokenizer.get_vocab()
    held_out = text.Windows(tokenised.validation_ids, 32, seed=0)
    with torch.no_grad():
        losses = [model(**{name: ids[None] for name, ids in held_out[i].items()}).loss for i in range(len(held_out))]
    # Each sequence once, although the last batches of two ranks are filled up.
    assert len(losses) % 16 != 0
    assert torch.stack(losses).mean().item() == pytest.approx(stages(3).rows[-1]["eval_loss"], abs=1e-5)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.world
def test_a_resumed_run_goes_on_bit_for_bit(stages: Callable[[int], Run], place: Place) -> None:
    whole = stages(3)
    resumed = place.clm(
        "resumed", "stage3.json", "--resume_from_checkpoint", str(whole.output_dir / f"step_{SAVED_AT}")
    )
    assert resumed.measured() == whole.measured(after=SAVED_AT)


@pytest.mark.world
@pytest.mark.slow
def test_a_run_resumes_in_another_world_at_another_stage(stages: Callable[[int], Run], place: Place) -> None:
    whole = stages(3)
    checkpoint = ("--resume_from_checkpoint", str(whole.output_dir / f"step_{SAVED_AT}"))
    resumed = place.clm("resumed_alone", "stage1.json", *checkpoint, num_processes=1, batch_size=8)
    for row, other in zip(resumed.measured(), whole.measured(after=SAVED_AT), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.world
@pytest.mark.slow
def test_the_scripts_own_optimizer_and_scheduler_resume_in_the_next_epoch(place: Place) -> None:
    (place.folder / "bare.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}')
    (place.folder / "short.py").write_text((place.folder / "text.py").read_text()[:20_000])
    short = ("--train_file", "short.py", "--max_train_steps", "24", "--num_warmup_steps", "3")
    whole = place.clm("bare", "bare.json", *short, "--checkpointing_steps", "epoch")
    assert whole.rows[-1]["epoch"] == 1
    rates = [row["learning_rate"] for row in whole.rows if "learning_rate" in row]
    assert rates[:4] == pytest.approx([0, 5e-3 / 3, 5e-3 * 2 / 3, 5e-3])
    assert rates[-1] == pytest.approx(5e-3 / 21)

    resumed = place.clm("bare_resumed", "bare.json", *short, "--resume_from_checkpoint", "bare/epoch_0")
    first = resumed.rows[0]["_step"]
    assert resumed.measured() == whole.measured(after=first - 1)
    assert 1 < first < 24


@pytest.mark.world
@pytest.mark.slow
def test_the_template_of_stage_3_trains_in_fp16_and_saves_by_way_of_its_shards(place: Place) -> None:
    run = place.clm("template3", str(TEMPLATES / "zero_stage3_config.json"), "--load_best_model")
    assert run.rows[-1]["eval_loss"] < 6.2
    saved = load_file(run.output_dir / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}, "the masters, not what travels"
    best = get_fp32_state_dict_from_zero_checkpoint(str(run.output_dir / "best_checkpoint"))
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    transformers.AutoModelForCausalLM.from_pretrained(run.output_dir)


@pytest.fixture
def clm_here(place: Place, modules: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the script in this process, on a text of a few steps an epoch."""
    script = modules("deepspeed_with_config_support")
    (place.folder / "short.py").write_text((place.folder / "text.py").read_text()[:4_000])
    monkeypatch.chdir(place.folder)
    # The script, not this test run, is what quietens transformers.
    monkeypatch.setattr(script.transformers.logging, "set_verbosity_error", lambda: None)

    def run(arguments: str, **replaced: Any) -> None:
        for name, value in replaced.items():
            monkeypatch.setattr(script, name, value)
        text = "--train_file short.py --cache_dir cache --block_size 32 --cpu --learning_rate 5e-3"
        monkeypatch.setattr(sys, "argv", [str(CLM), *text.split(), *arguments.split()])
        with fresh_state():
            script.main()

    return run


def test_the_model_of_the_best_evaluation_is_saved(place: Place, clm_here: Any) -> None:
    evaluations = iter([3.0, 2.0, 4.0])
    clm_here(
        "--config_name tiny --num_train_epochs 3 --load_best_model --output_dir best",
        evaluate=lambda *_: next(evaluations),
    )
    checkpoints, saved = place.folder / "best" / "best_checkpoint", load_file(place.folder / "best/model.safetensors")
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == ["epoch_0", "epoch_1"]
    first, second = (get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), f"epoch_{epoch}") for epoch in range(2))
    assert all(torch.equal(saved[name], second[name]) for name in saved)
    assert not all(torch.equal(saved[name], first[name]) for name in saved)


def test_a_saved_folder_is_a_model_and_a_tokenizer_to_begin_with(place: Place, clm_here: Any) -> None:
    clm_here("--config_name tiny --num_train_epochs 4 --output_dir first")
    start = "--num_train_epochs 1 --logging_steps 1 --with_tracking --learning_rate 1e-6 --validation_file short.py"
    clm_here(f"{start} --config_name first --tokenizer_name first --output_dir from_its_shape")
    clm_here(f"{start} --model_name_or_path first --output_dir from_its_weights")
    (fresh, trained) = (
        json.loads((place.folder / name / "clm" / "jsonl_0001" / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("from_its_shape", "from_its_weights")
    )
    assert trained["eval_loss"] < fresh["eval_loss"] - 0.5
    tokenizers = [(place.folder / name / "tokenizer.json").read_bytes() for name in ("first", "from_its_weights")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.world
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_the_template_of_a_stage_trains_in_fp16(place: Place, stage: int) -> None:
    run = place.clm(f"template{stage}", str(TEMPLATES / f"zero_stage{stage}_config.json"), "--load_best_model")
    assert run.rows[-1]["eval_loss"] < 6.2
    transformers.AutoModelForCausalLM.from_pretrained(run.output_dir)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_command_lines_of_the_guide_are_understood(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "--config_name gpt2-large --tokenizer_name gpt2-large --dataset_name wikitext "
        "--dataset_config_name wikitext-2-raw-v1 --block_size 128 --output_dir ./clm/clm_deepspeed_stage2_accelerate "
        "--learning_rate 5e-4 --per_device_train_batch_size 24 --per_device_eval_batch_size 24 --num_train_epochs 3 "
        "--with_tracking --report_to wandb"
    )
    monkeypatch.setattr(sys, "argv", [str(CLM), *line.split()])
    args = modules("deepspeed_with_config_support").parse_args()
    assert (args.config_name, args.dataset_config_name, args.block_size) == ("gpt2-large", "wikitext-2-raw-v1", 128)
    assert (args.learning_rate, args.num_train_epochs, args.report_to) == (5e-4, 3, "wandb")

    monkeypatch.setattr(sys, "argv", ["nlp_example.py", "--mixed_precision", "fp16"])
    assert modules("nlp_example").parse_args().mixed_precision == "fp16"


def test_without_the_hub_one_error_says_what_to_do(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = modules("from_hub")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"--dataset_name glue needs the package datasets.* Leave it out\."):
        hub.load_split_dataset("glue", "mrpc", "Leave it out.")

    def unreachable() -> None:
        raise ConnectionError("no route to the hub\nand a second line")

    with pytest.raises(ConfigError, match=r"^--config_name gpt2-large cannot be had: no route to the hub Leave it out"):
        hub.from_hub("--config_name gpt2-large", unreachable, "Leave it out.")


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.json")), ids=lambda path: path.stem)
def test_a_template_has_no_key_that_nobody_knows(template: Path) -> None:
    config = json.loads(template.read_text())
    for key in ("optimizer", "scheduler"):  # "auto" in them is for prepare() to fill
        config.pop(key)
    config = _without_auto(config)
    try:
        load_config(config)
    except ConfigError as error:
        faults = [line for line in str(error).splitlines()[1:] if line.strip()]
        assert faults
        assert all("which is not supported" in line for line in faults), str(error)


def _without_auto(block: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if value != "auto"
    }


# --- sentences and images ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_labels_are_right_and_no_function_is_on_both_sides(modules: Any) -> None:
    pairs = modules("docstring_pairs")
    training, held_out = pairs.docstring_pairs(seed=3)
    assert pairs.docstring_pairs(seed=3) == (training, held_out)
    own = {(pair.sentence, pair.function) for pair in training + held_out if pair.label == 1}
    assert all((pair.sentence, pair.function) not in own for pair in training + held_out if pair.label == 0)
    share = sum(pair.label for pair in training) / len(training)
    assert 0.5 <= share < 0.52, "half of the pairs belong together, but for sentences that two functions share"
    learnt, asked = ({(pair.sentence, pair.function) for pair in side if pair.label} for side in (training, held_out))
    assert learnt.isdisjoint(asked)


NLP = ("--max_train_samples", "256", "--max_eval_samples", "101", "--max_train_steps", "4")


@pytest.mark.world
@pytest.mark.slow
def test_sentence_pairs_train_alike_without_zero_and_at_stage_3(place: Place) -> None:
    script = (str(EXAMPLES / "nlp_example.py"), *NLP, "--mixed_precision", "no")
    plain = place.launch("nlp_plain", "--num_processes", "2", *script)
    sharded = place.launch("nlp_stage3", "--num_processes", "2", "--zero_stage", "3", *script)
    (row,) = plain.measured()
    assert row["num_eval_samples"] == 101, "fillers of the last round are not counted"
    assert 0.3 < row["accuracy"] < 0.8
    assert math.isfinite(row["train_loss"])
    assert sharded.measured() == [row]


@pytest.mark.world
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sentence_pairs_train_in_fp16_at_every_stage(place: Place, stage: int) -> None:
    script = (str(EXAMPLES / "nlp_example.py"), *NLP, "--mixed_precision", "fp16")
    run = place.launch(f"nlp_fp16_{stage}", "--num_processes", "2", "--zero_stage", str(stage), *script)
    assert math.isfinite(run.rows[-1]["train_loss"])


@pytest.mark.world
@pytest.mark.slow
def test_images_train_alike_without_zero_and_at_stage_2(place: Place) -> None:
    script = (str(EXAMPLES / "cv_example.py"), "--max_train_steps", "8", "--max_train_samples", "512")
    plain = place.launch("cv_short", "--num_processes", "2", *script)
    sharded = place.launch("cv_short_stage2", "--num_processes", "2", "--zero_stage", "2", *script)
    assert math.isfinite(plain.rows[-1]["train_loss"])
    assert sharded.measured() == plain.measured() != []


@pytest.mark.world
@pytest.mark.slow
def test_images_are_learnt_alike_without_zero_at_stage_2_and_after_a_resume(place: Place) -> None:
    script = (str(EXAMPLES / "cv_example.py"), "--num_train_epochs", "2")
    plain = place.launch("cv_plain", "--num_processes", "2", *script)
    saving = ("--checkpointing_steps", "50")
    sharded = place.launch("cv_stage2", "--num_processes", "2", "--zero_stage", "2", *script, *saving)
    assert plain.rows[-1]["accuracy"] > 0.6, "of seven shapes one is guessed right"
    assert sharded.measured() == plain.measured()

    # In the middle of the first epoch of 63 steps.
    checkpoint = str(sharded.output_dir / "checkpoints" / "checkpoint_0")
    resumed = place.launch(
        "cv_resumed", "--num_processes", "2", "--zero_stage", "3", *script, "--resume_from_checkpoint", checkpoint
    ).measured()
    assert [row["accuracy"] for row in resumed] == [row["accuracy"] for row in plain.rows]
    assert resumed[1] == plain.measured()[1]
    assert resumed[0]["train_loss"] != plain.rows[0]["train_loss"], "it is of the epoch's end alone"


@pytest.mark.world
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_vit_trains_at_every_stage(place: Place, stage: int) -> None:
    script = (str(EXAMPLES / "cv_example.py"), "--model", "vit", "--max_train_steps", "8", "--max_train_samples", "512")
    run = place.launch(f"cv_vit_{stage}", "--num_processes", "2", "--zero_stage", str(stage), *script)
    assert math.isfinite(run.rows[-1]["train_loss"])
