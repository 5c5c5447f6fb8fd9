"""Train a GPT-2 under ZeRO on real text, from random weights to a saved model that writes.

    shardwise launch examples/train_gpt.py

Without options: ZeRO stage 3 on two CPU processes, or on all GPUs where there are some; the text is the source of
Python's standard library. The script is a recipe to be read, in nine steps. The ``demo_*.py`` beside it hold what is
not about training: options, text, model shapes, screen, and the folder that is left behind.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers
from demo_model import build_model, read_model_config, write_on
from demo_options import Options, is_main_process, join_config, read_options
from demo_result import save_result
from demo_screen import Progressed, Screen
from demo_text import Windows, load_tokenised, read_corpus
from torch.utils.data import DataLoader, Subset

import shardwise
from shardwise.config import load_config
from shardwise.errors import ConfigError

NUM_VALIDATION_BATCHES = 8  # on each rank
NUM_REPORTS = 25  # of progress, over the whole training
NUM_SAMPLE_TOKENS = 120
SAMPLE_TEMPERATURE = 0.7
GRACE_SECONDS = 5.0

Batch = dict[str, torch.Tensor]


def default_config(options: Options) -> dict[str, Any]:
    """The engine's JSON as options and machine choose it; the user's own --config comes before it."""
    gpu_has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {
        "train_micro_batch_size_per_gpu": options.batch_size or 8,
        "dataloader_drop_last": True,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3 if options.zero_stage is None else options.zero_stage},
        "bf16": {"enabled": options.bf16 or (gpu_has_bf16 and not options.fp16)},
        "fp16": {"enabled": options.fp16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": options.learning_rate or 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": options.steps,
                "warmup_num_steps": max(2, options.steps // 10),
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
    }


def run(options: Options, screen: Screen) -> None:
    """The recipe; every process runs all of it."""
    # 1. What to train and how: wrong settings end the run here.
    config = join_config(default_config(options), options)
    settings = load_config(config)
    model_config, sequence_length = read_model_config(options.model, options.sequence_length)

    # 2. The processes find each other: gloo between CPUs, NCCL between GPUs.
    shardwise.init_distributed()
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch_sizes = settings.resolve_batch(num_ranks)  # sequences
    micro_batch_size = batch_sizes.train_micro_batch_size_per_gpu
    tokens_per_step = batch_sizes.train_batch_size * sequence_length

    # 3. Text, tokenizer and token ids. The first process fills the cache while the others wait.
    screen.status("preparing the text …")
    corpus = read_corpus(options.train_file)
    with first_process_first(rank, num_ranks):
        text = load_tokenised(corpus, options.cache_dir, model_config.vocab_size, options.own_tokenizer)
    training_data = Windows(text.train_ids, sequence_length, options.seed)
    validation_data = Windows(text.validation_ids, sequence_length, options.seed)
    if len(training_data) < micro_batch_size * num_ranks or len(validation_data) < num_ranks:
        raise ConfigError(
            f"The text has {len(training_data)} sequences of {sequence_length} tokens and {len(validation_data)} held "
            f"out, but a step needs {micro_batch_size * num_ranks} and validation {num_ranks}. "
            "Give a longer --train-file, or lower --sequence-length or --batch-size."
        )

    # 4. The model. It starts whole on every rank; the engine keeps of it what the ZeRO stage says.
    model = build_model(model_config, options.seed)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, _, batches, _ = shardwise.initialize(model=model, training_data=training_data, config=config)
    stage = settings.zero_optimization.stage
    precision = "bf16" if settings.bf16.enabled else "fp16" if settings.fp16.enabled else "fp32"
    screen.facts(
        {
            "model": f"{model_config.model_type} with {num_parameters / 1e6:.1f} M parameters, random weights",
            "text": f"{corpus.name}: {len(text.train_ids):,} tokens, and {len(text.validation_ids):,} held out",
            "ranks": f"{num_ranks} on {engine.device.type} · {precision} · ZeRO stage {stage}",
            "steps": f"{options.steps} of {batch_sizes.train_batch_size} sequences, {tokens_per_step:,} tokens each",
        }
    )

    # 5. Before: an untrained model's loss is about the logarithm of its vocabulary's size.
    held_out = share_of_rank(validation_data, rank, num_ranks, micro_batch_size)
    loss_before = validate(engine, held_out)
    screen.say(f"validation loss before training: {loss_before:.3f}")

    # 6. Training. A step is made of micro-batches; the engine counts them and steps after the last one.
    endless_batches = repeat(batches)
    losses: list[torch.Tensor] = []  # of the micro-batches since the last report; they stay on the device until then
    reported_step, reported_at = 0, time.perf_counter()
    with screen.training(options.steps):
        for step in range(1, options.steps + 1):
            learning_rate = engine.get_lr()[0]  # of this step; engine.step() moves the schedule on
            for _ in range(engine.gradient_accumulation_steps()):
                loss = engine(**to_device(next(endless_batches), engine.device)).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach())
            screen.advance()
            if step % max(1, options.steps // NUM_REPORTS) == 0 or step == options.steps:
                mean_loss = mean_over_ranks(losses)  # waits for the device
                seconds = time.perf_counter() - reported_at
                screen.report(
                    Progressed(
                        step=step,
                        loss=mean_loss,
                        gradient_norm=engine.get_global_grad_norm(),
                        learning_rate=learning_rate,
                        tokens_per_second=(step - reported_step) * tokens_per_step / seconds,
                        held_bytes=engine.memory_report().total_bytes,
                    )
                )
                losses, reported_step, reported_at = [], step, time.perf_counter()
    memory = engine.memory_report()

    # 7. After: the same sequences again, and a text of the model's own. Inside, every rank holds the whole model.
    loss_after = validate(engine, held_out)
    screen.say(f"validation loss after training: {loss_after:.3f} (before: {loss_before:.3f})")
    engine.eval()
    with engine.gathered_parameters():
        continuation = write_on(
            lambda ids: engine(input_ids=ids.to(engine.device)).logits[0, -1],
            text.tokenizer,
            corpus.prompt,
            num_tokens=NUM_SAMPLE_TOKENS,
            context=sequence_length,
            temperature=SAMPLE_TEMPERATURE,
            seed=options.seed,
        )
    screen.sample(corpus.prompt, continuation)

    # 8. The result, as `from_pretrained` reads it. To gather it is work of all ranks, to write it of one.
    state = engine.state_dict()
    if rank == 0:
        facts = {"steps": options.steps, "loss_before": loss_before, "loss_after": loss_after, "config": config}
        save_result(options.output_dir, model, state, text.tokenizer, facts)
    screen.say(f"saved: {options.output_dir}")

    # 9. What ZeRO saved.
    held = (memory.parameters_bytes, memory.gradients_bytes, memory.optimizer_bytes)
    screen.savings(held, num_parameters=num_parameters, precision=precision, stage=stage, num_ranks=num_ranks)
    engine.close()


@contextmanager
def first_process_first(rank: int, num_ranks: int) -> Iterator[None]:
    """The first process does what is inside, then all the others do."""
    if num_ranks > 1 and rank != 0:
        dist.barrier()
    yield
    if num_ranks > 1 and rank == 0:
        dist.barrier()


def share_of_rank(data: Windows, rank: int, num_ranks: int, batch_size: int) -> DataLoader[Batch]:
    """This rank's batches of held-out text: other sequences on each rank, and as many of them."""
    num_sequences = min(NUM_VALIDATION_BATCHES * batch_size, len(data) // num_ranks)
    mine = Subset(data, range(rank, num_sequences * num_ranks, num_ranks))
    return DataLoader(mine, batch_size=min(batch_size, num_sequences), drop_last=True)


def validate(engine: shardwise.Engine, batches: DataLoader[Batch]) -> float:
    """The mean loss over the batches of all ranks."""
    engine.eval()
    with torch.no_grad():
        losses = [engine(**to_device(batch, engine.device)).loss for batch in batches]
    engine.train()
    return mean_over_ranks(losses)


def mean_over_ranks(losses: list[torch.Tensor]) -> float:
    """The mean of equally many losses on each rank."""
    mean = torch.stack(losses).float().mean()
    if dist.is_initialized():
        dist.all_reduce(mean)  # sum
        mean /= dist.get_world_size()
    return mean.item()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def repeat(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, again and again."""
    while True:
        yield from batches


def main() -> int:
    """Run the recipe; a mistake of the user's is one line, Ctrl-C a clean end."""
    transformers.logging.set_verbosity_error()
    if not is_main_process():
        logging.getLogger("shardwise").setLevel(logging.ERROR)  # one process's warnings are enough
    screen = Screen(is_main=is_main_process())
    try:
        run(read_options(sys.argv[1:]), screen)
    except ConfigError as error:
        if not is_main_process():
            # The first process makes the same mistake and says so, and the launcher then ends this one. Only a mistake
            # that is this process's alone outlives the pause.
            time.sleep(GRACE_SECONDS)
        screen.error(str(error))
        return 2
    except KeyboardInterrupt:
        screen.say("stopped before the end; nothing was saved")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
