"""The contenders that are engines with DeepSpeed's calls: DeepSpeed itself, and shardwise."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from bench.contenders.base import Contender
from bench.workload import Workload

# Both libraries are optional here and DeepSpeed has no types: an engine is Any, used by three methods only.

NVME_PATH = "SHARDWISE_BENCH_NVME"
"""Names the directory of files, for ranks that are started by name."""

ZeroBlock = Callable[[Workload], dict[str, Any]]
"""Gives the JSON's ``zero_optimization`` block."""


class EngineTrainer:
    """The training loop of an engine that owns backward and step."""

    def __init__(self, engine: Any, close: Callable[[], None]) -> None:
        self.engine = engine
        self._close = close

    def step(self, tokens: Tensor) -> Tensor:
        """One step; with an accumulation of one, every step is a boundary. The engine clears the gradients."""
        loss: Tensor = self.engine(tokens)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def close(self) -> None:
        """End the engine."""
        self._close()


class PatchedLinearTrainer:
    """An engine that has replaced ``torch.nn.functional.linear`` for the whole process.

    The replacement is in force during its own steps only: the other contenders in the process get torch's function.
    """

    def __init__(self, inner: EngineTrainer, linear: Any) -> None:
        self._inner = inner
        self._linear = linear
        self.engine = inner.engine

    def step(self, tokens: Tensor) -> Tensor:
        """One step under the engine's own linear function."""
        with _linear_restored_afterwards():
            functional.linear = self._linear
            return self._inner.step(tokens)

    def close(self) -> None:
        """End the engine."""
        self._inner.close()


@contextmanager
def _linear_restored_afterwards() -> Iterator[None]:
    linear = functional.linear
    try:
        yield
    finally:
        functional.linear = linear


def _config(workload: Workload, zero: dict[str, Any]) -> dict[str, Any]:
    """The JSON that both engines read. Clipping is off, as no other contender clips."""
    return {
        "train_micro_batch_size_per_gpu": workload.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
    }


def _defaults(stage: int, workload: Workload) -> dict[str, Any]:
    """The stage with the engine's own defaults."""
    return {"stage": stage}


def _offloaded(stage: int, parameters: str, optimizer: str, workload: Workload) -> dict[str, Any]:
    """States off the device; files lie where ``bench.offload`` is told to put them."""
    place = {"nvme_path": os.environ.get(NVME_PATH, tempfile.gettempdir())}
    block: dict[str, Any] = {"stage": stage, "offload_optimizer": {"device": optimizer, **place}}
    if stage == 3:
        block["offload_param"] = {"device": parameters, **place}
    return block


def _sized_by_width(workload: Workload) -> dict[str, Any]:
    """Stage 3 with the sizes that Accelerate and Transformers put for "auto" into DeepSpeed's config.

    DeepSpeed's default bucket of 5e8 elements takes all gradients of such small models at once, so these sizes are the
    fairer opponent.
    """
    width = workload.shape.width
    return {
        "stage": 3,
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }


def _deepspeed_reason_to_skip() -> str | None:
    return None if importlib.util.find_spec("deepspeed") else "deepspeed is not installed (extra: bench)"


def _prepare_deepspeed() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # read on import; it would otherwise look for devices
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls names that torch has renamed, and torch says so on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with redirect_stdout(io.StringIO()):  # each rank prints a line about the extension that it has loaded
        deepspeed.init_distributed(dist_backend="gloo")  # adopts the process group that torch has made


def _build_deepspeed(workload: Workload, zero: ZeroBlock) -> EngineTrainer | PatchedLinearTrainer:
    deepspeed = importlib.import_module("deepspeed")
    model = workload.build_model()
    with _linear_restored_afterwards():
        torch_linear = functional.linear
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=workload.build_optimizer(model.parameters()),
            # Torch's own AdamW, as everybody has it: its Adam for the CPU is compiled for minutes.
            config=_config(workload, zero(workload)) | {"zero_force_ds_cpu_optimizer": False},
        )
        linear = functional.linear
    trainer = EngineTrainer(engine, close=engine.destroy)
    return trainer if linear is torch_linear else PatchedLinearTrainer(trainer, linear)


def _shardwise_reason_to_skip() -> str | None:
    if importlib.util.find_spec("shardwise") is None:
        return "shardwise is not installed in this environment"
    return None if hasattr(importlib.import_module("shardwise"), "initialize") else "shardwise has no initialize"


def _prepare_shardwise() -> None:
    importlib.import_module("shardwise").initialize  # noqa: B018  loads the engine's modules where they load lazily


def _build_shardwise(workload: Workload, zero: ZeroBlock, own: dict[str, Any] | None = None) -> EngineTrainer:
    shardwise = importlib.import_module("shardwise")
    model = workload.build_model()
    engine, *_ = shardwise.initialize(
        model=model,
        optimizer=workload.build_optimizer(model.parameters()),
        config=_config(workload, zero(workload)) | {"shardwise": own or {}},
    )
    return EngineTrainer(engine, close=engine.close)


CONTENDERS = (
    *(
        Contender(
            f"deepspeed{stage}",
            f"DeepSpeed stage {stage}",
            partial(_build_deepspeed, zero=partial(_defaults, stage)),
            _deepspeed_reason_to_skip,
            _prepare_deepspeed,
        )
        for stage in (1, 2, 3)
    ),
    Contender(
        "deepspeed3_auto",
        'DeepSpeed stage 3, sizes as for "auto"',
        partial(_build_deepspeed, zero=_sized_by_width),
        _deepspeed_reason_to_skip,
        _prepare_deepspeed,
    ),
    *(
        Contender(
            f"deepspeed{stage}_cpu",
            f"DeepSpeed stage {stage}, optimizer (and parameters at stage 3) in host memory",
            partial(_build_deepspeed, zero=partial(_offloaded, stage, "cpu", "cpu")),
            _deepspeed_reason_to_skip,
            _prepare_deepspeed,
        )
        for stage in (2, 3)
    ),
    *(
        Contender(
            f"shardwise{stage}_{name}",
            f"shardwise stage {stage}, {words}",
            partial(_build_shardwise, zero=partial(_offloaded, stage, parameters, optimizer)),
            _shardwise_reason_to_skip,
            _prepare_shardwise,
        )
        for stage, name, words, parameters, optimizer in (
            (2, "cpu", "optimizer in host memory", "none", "cpu"),
            (3, "cpu", "optimizer and parameters in host memory", "cpu", "cpu"),
            (2, "nvme", "optimizer in a file", "none", "nvme"),
            (3, "nvme", "optimizer and parameters in files", "nvme", "nvme"),
        )
    ),
    *(
        Contender(
            f"shardwise{stage}_nvme_early",
            f"shardwise stage {stage}, {words}, stepped in backward",
            partial(
                _build_shardwise,
                zero=partial(_offloaded, stage, parameters, "nvme"),
                own={"step_in_backward": True},
            ),
            _shardwise_reason_to_skip,
            _prepare_shardwise,
        )
        for stage, words, parameters in (
            (2, "optimizer in a file", "none"),
            (3, "optimizer and parameters in files", "nvme"),
        )
    ),
    *(
        Contender(
            f"shardwise{stage}",
            f"shardwise stage {stage}",
            partial(_build_shardwise, zero=partial(_defaults, stage)),
            _shardwise_reason_to_skip,
            _prepare_shardwise,
        )
        for stage in (0, 1, 2, 3)
    ),
)
