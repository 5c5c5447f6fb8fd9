"""What ZeRO++ does to a loss: one language model, the same data and seed, one technique after the other.

The text and its tokenizer are the demo's (``examples/demo_text.py``): Python's standard library, with every twentieth
file held out. Four gloo ranks train as two nodes of two. Nothing stays whole below a threshold, so that also norms and
biases travel quantised: the hardest case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

import shardwise
from bench.machine import machine_facts
from bench.models import GPT, GPTShape
from bench.options import at_least, comma_separated, one_of
from bench.plot import Line, write_curves
from bench.report import CONSOLE, write_json
from bench.world import run_in_world

EXAMPLES = Path(__file__).parents[1] / "examples"
CACHE = Path("~/.cache/shardwise")
WORLD, NODES = 4, 2
NUM_VALIDATION_BATCHES = 16  # on each rank

MODELS = {
    # 0.7 M parameters: a step of one rank is a twentieth of a second of a core.
    "mini": GPTShape(layers=2, width=128, heads=4, vocabulary=2048, positions=64),
    # 5.8 M parameters: the demo's.
    "small": GPTShape(layers=6, width=256, heads=4, vocabulary=4096, positions=128),
}


@dataclass(frozen=True)
class Variant:
    """How states travel, beside stage 3."""

    title: str
    zero: dict[str, Any]
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    """Added to the run's seed: of weights and of the order of the text."""


HPZ = {"zero_hpz_partition_size": WORLD // NODES}
QWZ = {"zero_quantized_weights": True}
QGZ = {"zero_quantized_gradients": True}
VARIANTS = {
    "plain": Variant("stage 3", {}),
    "all": Variant("hpZ + qwZ + qgZ", HPZ | QWZ | QGZ),
    "hpz": Variant("hpZ", HPZ),
    "qwz": Variant("qwZ, int8", QWZ),
    "qgz": Variant("qgZ, int4", QGZ),
    "qgz_feedback": Variant("qgZ, int4, error_feedback", QGZ, {"error_feedback": True}),
    "qgz_fp8": Variant("qgZ, fp8", QGZ, {"quantized_gradients": "fp8"}),
    "qgz_int8": Variant("qgZ, int8", QGZ, {"quantized_gradients": "int8"}),
    "qwz_int4": Variant("qwZ, int4", QWZ, {"quantized_weights": "int4"}),
    "all_feedback": Variant("hpZ + qwZ + qgZ, error_feedback", HPZ | QWZ | QGZ, {"error_feedback": True}),
    "plain_seed1": Variant("stage 3, another seed", {}, seed=1),
}
BASELINE = "plain"


@dataclass(frozen=True)
class Settings:
    """What every variant has in common. Results of other settings are not compared."""

    model: str
    dtype: str
    steps: int
    batch: int  # sequences a rank
    sequence: int  # tokens
    learning_rate: float
    validate_every: int  # steps
    seed: int
    folder: str  # of tokens


@dataclass
class Curve:
    """One run."""

    losses: list[float]  # of training, by step, mean over ranks
    validation: dict[int, float]  # by number of steps taken; as the engine computes it, so with what qwZ gathers
    across_bytes: int  # received from the other node in the last step, by the first rank
    inside_bytes: int
    seconds: float


def add_options(parser: Any) -> None:
    """The options of this part."""
    add = parser.add_argument_group("convergence").add_argument
    add(
        "--variants",
        type=comma_separated(one_of(VARIANTS)),
        default=list(VARIANTS),
        help=f"of {', '.join(VARIANTS)}; {BASELINE} always runs; default: all",
    )
    add("--model", choices=MODELS, default="mini")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of forward and backward")
    add("--steps", type=at_least(1), default=300)
    add("--batch", type=at_least(1), default=4, help="sequences per rank and step")
    add("--learning-rate", type=float, default=1e-3, help="the peak, after warm-up")
    add(
        "--convergence-json",
        type=Path,
        default=Path("bench/results/zeropp_convergence.json"),
        help="results; variants that it holds for the same settings are not trained again",
    )
    add("--plot", type=Path, help="write the curves to this SVG")


def run(options: argparse.Namespace) -> dict[str, Curve]:
    """Train what is missing, write the file after each run, and print the comparison."""
    shape = MODELS[options.model]
    CONSOLE.print("[dim]convergence: preparing the text")
    settings = Settings(
        options.model, options.dtype, options.steps, options.batch, shape.positions, options.learning_rate,
        max(1, options.steps // 10), options.seed, str(CACHE),
    )  # fmt: skip
    _load_text(settings)  # so that ranks find the tokens made
    file: Path = options.convergence_json
    curves = _read(file, settings)
    missing = [name for name in dict.fromkeys((BASELINE, *options.variants)) if name not in curves]
    if missing:
        CONSOLE.print(f"[dim]convergence: training {', '.join(missing)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        run_in_world(WORLD, 1, train_all, settings, missing, curves, file, machine_facts())
        curves = _read(file, settings)
    CONSOLE.print(_table(settings, curves))
    if options.plot is not None:
        _plot(options.plot, settings, curves)
    return curves


def _read(file: Path, settings: Settings) -> dict[str, Curve]:
    """The curves that a former run has left, if its settings were these."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    if found["settings"] != dataclasses.asdict(settings):
        raise SystemExit(f"{file} holds runs of other settings: {found['settings']}. Name another --convergence-json.")
    return {
        name: Curve(**{**curve, "validation": {int(step): loss for step, loss in curve["validation"].items()}})
        for name, curve in found["curves"].items()
    }


# --- one run ----------------------------------------------------------------------------------------------------------


def train_all(
    settings: Settings, names: Sequence[str], curves: dict[str, Curve], file: Path, facts: dict[str, str]
) -> None:
    """One rank's part of all runs; the first rank writes the file after each."""
    for name in names:
        curves[name] = train(settings, VARIANTS[name])
        if dist.get_rank() == 0:
            print(f"{name}: {curves[name].validation}", flush=True)
            write_json(file, {"machine": facts, "settings": settings, "variants": VARIANTS, "curves": curves})


def train(settings: Settings, variant: Variant) -> Curve:
    """One rank's part of a run."""
    rank = dist.get_rank()
    text, windows = _load_text(settings)
    shape, seed = MODELS[settings.model], settings.seed + variant.seed
    training = windows(text.train_ids, settings.sequence + 1, seed)
    # Held out is the same for every seed.
    held_out = windows(text.validation_ids, settings.sequence + 1, 0)
    torch.manual_seed(seed)
    model = GPT(shape)
    engine, *_ = shardwise.initialize(model=model, config=_config(settings, variant))

    def batch_of(data: Any, index: int) -> torch.Tensor:
        """The index-th batch of this rank: int64 [batch, sequence + 1]."""
        first = (index * WORLD + rank) * settings.batch
        return torch.stack([data[(first + at) % len(data)]["input_ids"] for at in range(settings.batch)])

    def validate() -> float:
        engine.eval()
        with torch.no_grad():
            losses = [engine(batch_of(held_out, index)).float() for index in range(NUM_VALIDATION_BATCHES)]
        engine.train()
        return _mean_over_ranks(torch.stack(losses).mean())

    losses: list[torch.Tensor] = []
    validation: dict[int, float] = {}
    traffic = engine._comm.traffic
    begin = time.perf_counter()
    for step in range(settings.steps):
        if step % settings.validate_every == 0:
            validation[step] = validate()
        traffic.clear()
        loss = engine(batch_of(training, step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
    by_route = traffic.by_route
    validation[settings.steps] = validate()
    seconds = time.perf_counter() - begin
    engine.close()
    curve = Curve(
        losses=[_mean_over_ranks(loss) for loss in losses],
        validation=validation,
        across_bytes=sum(size for route, size in by_route.items() if route.across),
        inside_bytes=sum(size for route, size in by_route.items() if not route.across),
        seconds=seconds,
    )
    if not all(math.isfinite(loss) for loss in curve.losses):
        raise RuntimeError(f"{variant.title}: a loss is not finite: {curve.losses}")
    return curve


def _config(settings: Settings, variant: Variant) -> dict[str, Any]:
    """The demo's optimizer, schedule and clipping."""
    return {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": settings.dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **variant.zero},
        "shardwise": {"transport": "process_group", "simulated_nodes": NODES, **variant.own},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": settings.learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": settings.steps,
                "warmup_num_steps": max(2, settings.steps // 10),
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
    }


def _load_text(settings: Settings) -> tuple[Any, Any]:
    """The demo's tokens, and its class of windows over them."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    from demo_text import Windows, load_tokenised, read_corpus

    vocabulary = MODELS[settings.model].vocabulary
    return load_tokenised(read_corpus(None), Path(settings.folder), vocabulary, None), Windows


def _mean_over_ranks(value: torch.Tensor) -> float:
    total = value.detach().double()
    dist.all_reduce(total)  # sum
    return total.item() / dist.get_world_size()


# --- the comparison ---------------------------------------------------------------------------------------------------


def _table(settings: Settings, curves: dict[str, Curve]) -> Table:
    table = Table(
        title=f"{settings.model}, {settings.dtype}, {settings.steps} steps of {WORLD * settings.batch} sequences",
        title_justify="left",
    )
    table.add_column("stage 3 with")
    for column in ("validation loss", "to plain, %", "training loss, last 30 steps", "MB from the other node, a step"):
        table.add_column(column, justify="right")
    plain = curves[BASELINE].validation[settings.steps]
    for name, curve in curves.items():
        final = curve.validation[settings.steps]
        last = curve.losses[-30:]
        table.add_row(
            VARIANTS[name].title, f"{final:.4f}", f"{100 * (final / plain - 1):+.2f}",
            f"{sum(last) / len(last):.4f}", f"{curve.across_bytes / 1e6:.2f}",
        )  # fmt: skip
    return table


def _plot(file: Path, settings: Settings, curves: dict[str, Curve]) -> None:
    lines: Iterator[Line] = (
        Line(VARIANTS[name].title, list(curves[name].validation.items()))
        for name in ("plain", "hpz", "qwz", "qgz", "all")
        if name in curves
    )
    parameters = sum(parameter.numel() for parameter in GPT(MODELS[settings.model]).parameters())
    title = f"{parameters / 1e6:.1f} M parameters, {settings.dtype}, {WORLD} ranks as {NODES} nodes"
    write_curves(file, title, "step", "validation loss", list(lines))
    CONSOLE.print(f"written: {file}")
