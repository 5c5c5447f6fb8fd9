"""Train a causal language model under a DeepSpeed JSON, from the first step to a saved model.

    shardwise launch --deepspeed_config_file examples/deepspeed_config_templates/zero_stage2_config.json \\
        examples/by_feature/deepspeed_with_config_support.py --max_train_steps 200 --with_tracking

Without options nothing is downloaded: a small GPT-2 with random weights learns the source of Python's standard library.
``--train_file`` takes a text of your own; ``--dataset_name``, ``--config_name``, ``--tokenizer_name`` and
``--model_name_or_path`` take names of the hub.

What the JSON asks of a script is marked "JSON:" below: who brings the optimizer and the scheduler, checkpoints in
shards and how to go on from them, and the two ways to whole weights. Without a JSON the same script runs as flags say.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SchedulerType,
    get_scheduler,
)

from shardwise import Accelerator, Engine, skip_first_batches
from shardwise.errors import ConfigError
from shardwise.utils import DataLoaderConfiguration, DummyOptim, DummyScheduler, set_seed
from shardwise.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what examples share lies one folder up

from demo_model import DEFAULT_SEQUENCE_LENGTH, PRESETS, read_model_config
from demo_text import END_OF_TEXT, Corpus, TokenisedText, Windows, load_tokenised, read_corpus
from from_hub import from_hub, load_split_dataset

OFFLINE = (
    "Without the hub leave out --dataset_name and --tokenizer_name, and give --config_name a local folder or one of "
    f"{', '.join(PRESETS)}."
)
NOT_DECAYED = ("bias", "ln_", "norm")  # parts of the names of such parameters
BEST = "best_checkpoint"
EVERY_EPOCH = "epoch"  # a value of --checkpointing_steps


@dataclass
class Progress:
    """How far training is: what a checkpoint holds beside the engine's own state."""

    epoch: int = 0
    num_sequences: int = 0  # of this epoch, over all ranks
    num_steps: int = 0
    best_loss: float | None = None


# --- model and data ---------------------------------------------------------------------------------------------------


def get_model(args: argparse.Namespace) -> tuple[PreTrainedModel, int]:
    """The model, and the length of the sequences that it is to read."""
    if args.model_name_or_path is not None:
        what = f"--model_name_or_path {args.model_name_or_path}"
        model = from_hub(what, lambda: AutoModelForCausalLM.from_pretrained(args.model_name_or_path), OFFLINE)
        return model, _block_size(args, model.config)
    if args.config_name in PRESETS:
        config, block_size = read_model_config(args.config_name, args.block_size)
    else:
        what = f"--config_name {args.config_name}"
        config = from_hub(what, lambda: AutoConfig.from_pretrained(args.config_name), OFFLINE)
        block_size = _block_size(args, config)
    try:
        return AutoModelForCausalLM.from_config(config), block_size
    except ValueError:
        raise ConfigError(f"--config_name {args.config_name} is no causal language model of transformers.") from None


def _block_size(args: argparse.Namespace, config: PreTrainedConfig) -> int:
    context = getattr(config, "max_position_embeddings", None)  # absent where positions have no bound
    size = args.block_size or min(DEFAULT_SEQUENCE_LENGTH, context or DEFAULT_SEQUENCE_LENGTH)
    if context is not None and size > context:
        raise ConfigError(f"--block_size is {size}, but the model reads {context} tokens at most.")
    return size


def get_corpus(args: argparse.Namespace) -> Corpus:
    """The texts: of the hub, of the user's own files, or the standard library's."""
    if args.dataset_name is not None:
        splits = load_split_dataset(args.dataset_name, args.dataset_config_name, OFFLINE)
        missing = {"train", "validation"} - set(splits)
        if missing or "text" not in splits["train"].column_names:
            raise ConfigError(f"--dataset_name {args.dataset_name} needs splits train and validation of column text.")
        return Corpus(args.dataset_name, list(splits["train"]["text"]), list(splits["validation"]["text"]), prompt="")
    corpus = read_corpus(args.train_file)
    if args.validation_file is None:
        return corpus
    try:
        held_out = args.validation_file.read_text(encoding="utf-8")
        own = corpus.train if args.train_file is None else [args.train_file.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--validation_file {args.validation_file} cannot be read as UTF-8 text: {error}.") from None
    return replace(corpus, train=own, validation=[held_out])


def get_text(args: argparse.Namespace, vocabulary_size: int) -> TokenisedText:
    """Token ids of the texts, by the named tokenizer or by one that is trained on them; kept in ``--cache_dir``."""
    name = args.tokenizer_name or args.model_name_or_path
    own_tokenizer = None
    if name is not None:
        tokenizer = from_hub(f"--tokenizer_name {name}", lambda: AutoTokenizer.from_pretrained(name), OFFLINE)
        own_tokenizer = args.output_dir / "tokenizer.json"
        args.output_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.backend_tokenizer.save(str(own_tokenizer))
    return load_tokenised(get_corpus(args), args.cache_dir, vocabulary_size, own_tokenizer)


def get_dataloaders(
    args: argparse.Namespace, text: TokenisedText, block_size: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of one process; ``prepare`` gives each rank its share."""
    training = Windows(text.train_ids, block_size, args.seed)
    held_out = Windows(text.validation_ids, block_size, args.seed)
    if not len(training) or not len(held_out):
        raise ConfigError(
            f"The text has {len(training)} sequences of {block_size} tokens and {len(held_out)} held out: too few. "
            "Give a longer text or a smaller --block_size."
        )
    return (
        DataLoader(training, batch_size=args.per_device_train_batch_size, shuffle=True),
        DataLoader(held_out, batch_size=args.per_device_eval_batch_size),
    )


# --- what the JSON has a say in ---------------------------------------------------------------------------------------


def get_optimizer(args: argparse.Namespace, accelerator: Accelerator, model: nn.Module) -> Any:
    """JSON: where it has an "optimizer", the script only names parameters and fills what is "auto"."""
    decayed, not_decayed = [], []
    for name, parameter in model.named_parameters():
        (not_decayed if any(part in name for part in NOT_DECAYED) else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    plugin = accelerator.state.deepspeed_plugin
    in_json = plugin is not None and "optimizer" in plugin.deepspeed_config
    optimizer_cls = DummyOptim if in_json else torch.optim.AdamW
    return optimizer_cls(groups, lr=args.learning_rate, weight_decay=args.weight_decay)


def get_lr_scheduler(args: argparse.Namespace, accelerator: Accelerator, optimizer: Any, num_steps: int) -> Any:
    """JSON: where it has a "scheduler", the script only fills what is "auto".

    Args:
        args: the options.
        accelerator: of the run.
        optimizer: a real one or a dummy.
        num_steps: optimizer steps of the whole training.
    """
    # The length of a schedule is counted as one process would count it, whose loader is as many times longer.
    num_ticks = num_steps * accelerator.num_processes
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and "scheduler" in plugin.deepspeed_config:
        # The engine ticks it once a step, so the warm-up is in steps.
        return DummyScheduler(optimizer, total_num_steps=num_ticks, warmup_num_steps=args.num_warmup_steps)
    return get_scheduler(
        name=args.lr_scheduler_type,
        optimizer=optimizer,
        # It is ticked num_processes times a step.
        num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
        num_training_steps=num_ticks,
    )


def save_checkpoint(
    accelerator: Accelerator, model: Engine, lr_scheduler: Any, folder: Path, tag: str, progress: Progress
) -> None:
    """JSON: each rank writes its own shards, so every rank is to call this."""
    # A scheduler of the script's own is not the engine's to save.
    client_state = {**asdict(progress), "lr_scheduler": lr_scheduler.state_dict()}
    model.save_checkpoint(str(folder), tag, client_state)
    accelerator.print(f"checkpoint: {folder / tag}")


def load_checkpoint(accelerator: Accelerator, model: Engine, lr_scheduler: Any, path: Path) -> Progress:
    """Go on from a checkpoint, or from the latest one of a folder of them; with any number of processes."""
    holds_several = (path / "latest").is_file()
    folder, tag = (path, None) if holds_several else (path.parent, path.name)
    loaded, client_state = model.load_checkpoint(str(folder), tag)
    if client_state is None:
        raise ConfigError(f"--resume_from_checkpoint {path} is no checkpoint and no folder of them.")
    lr_scheduler.load_state_dict(client_state.pop("lr_scheduler"))
    progress = Progress(**client_state)
    accelerator.print(f"loaded: {loaded}, after {progress.num_steps} steps")
    return progress


def save_model(accelerator: Accelerator, model: Engine, text: TokenisedText, folder: Path) -> None:
    """The folder that ``from_pretrained`` reads. JSON: at stage 3 there are two ways to whole weights."""
    unwrapped_model = accelerator.unwrap_model(model)
    plugin = accelerator.state.deepspeed_plugin
    gathers = (
        plugin is None
        or plugin.get_value("zero_optimization.stage", 0) < 3
        or plugin.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True
    )
    if gathers:
        # (a) In memory: quick, and the main process has room for the whole model.
        unwrapped_model.save_pretrained(
            folder,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )
    else:
        # (b) By way of a checkpoint: fp32 weights, joined from its shards. The model that trains keeps its shards, so
        # they go into another one.
        model.save_checkpoint(str(folder / "last_checkpoint"), "last")
        if accelerator.is_main_process:
            whole_model = AutoModelForCausalLM.from_config(unwrapped_model.config)
            whole_model = load_state_dict_from_zero_checkpoint(whole_model, str(folder / "last_checkpoint"))
            whole_model.save_pretrained(folder)
    if accelerator.is_main_process:
        end = {} if text.tokenizer.token_to_id(END_OF_TEXT) is None else {"eos_token": END_OF_TEXT}
        PreTrainedTokenizerFast(tokenizer_object=text.tokenizer, **end).save_pretrained(folder)
    accelerator.wait_for_everyone()
    accelerator.print(f"saved: {folder}")


# --- training ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """The training script proper; every process runs all of it."""
    args = parse_args()
    transformers.logging.set_verbosity_error()  # its notes would come once from each process
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of samples follows from seed and epoch alone, on any number of processes and after a resume.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with=args.report_to if args.with_tracking else None,
        project_dir=str(args.output_dir),
    )
    set_seed(args.seed)
    model, block_size = get_model(args)
    with accelerator.main_process_first():  # it fills the caches, the others find them
        text = get_text(args, model.config.vocab_size)
    train_dataloader, eval_dataloader = get_dataloaders(args, text, block_size)

    # A prepared loader has a rank's share of the batches.
    num_batches = math.ceil(len(train_dataloader) / accelerator.num_processes)
    steps_per_epoch = math.ceil(num_batches / accelerator.gradient_accumulation_steps)
    num_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    num_epochs = math.ceil(num_steps / steps_per_epoch)
    optimizer = get_optimizer(args, accelerator, model)
    lr_scheduler = get_lr_scheduler(args, accelerator, optimizer, num_steps)

    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    if args.with_tracking:
        accelerator.init_trackers("clm", {name: str(value) for name, value in vars(args).items()})
    accelerator.print(
        f"{num_steps} steps of {model.train_batch_size()} sequences of {block_size} tokens, {steps_per_epoch} steps an "
        f"epoch; {accelerator.num_processes} processes, ZeRO stage {model.zero_optimization_stage()}"
    )

    progress = Progress()
    sequences_per_batch = args.per_device_train_batch_size * accelerator.num_processes
    if args.resume_from_checkpoint is not None:
        progress = load_checkpoint(accelerator, model, lr_scheduler, args.resume_from_checkpoint)

    for epoch in range(progress.epoch, num_epochs):
        model.train()
        train_dataloader.set_epoch(epoch)  # the same shuffle as the first time
        batches = skip_first_batches(train_dataloader, progress.num_sequences // sequences_per_batch)
        losses = []  # since the last report
        for batch in batches:
            if progress.num_steps == num_steps:
                break
            learning_rate = optimizer.param_groups[0]["lr"]  # of this step: the scheduler ticks in it
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach().float())
            progress.num_sequences += sequences_per_batch
            if not accelerator.sync_gradients:
                continue

            progress.num_steps += 1
            if progress.num_steps % args.logging_steps == 0 or progress.num_steps == num_steps:
                measured = {
                    "train_loss": accelerator.reduce(torch.stack(losses).mean(), "mean").item(),
                    "learning_rate": learning_rate,
                    "grad_norm": model.get_global_grad_norm(),
                }
                report(args, accelerator, measured, progress)
                losses = []
            if isinstance(args.checkpointing_steps, int) and progress.num_steps % args.checkpointing_steps == 0:
                tag = f"step_{progress.num_steps}"
                save_checkpoint(accelerator, model, lr_scheduler, args.output_dir, tag, progress)

        eval_loss = evaluate(accelerator, model, eval_dataloader)
        report(args, accelerator, {"eval_loss": eval_loss, "perplexity": math.exp(eval_loss)}, progress)
        progress.epoch, progress.num_sequences = epoch + 1, 0
        is_best = progress.best_loss is None or eval_loss < progress.best_loss
        if is_best:
            progress.best_loss = eval_loss
        if args.checkpointing_steps == EVERY_EPOCH:
            save_checkpoint(accelerator, model, lr_scheduler, args.output_dir, f"epoch_{epoch}", progress)
        if is_best and args.load_best_model:
            save_checkpoint(accelerator, model, lr_scheduler, args.output_dir / BEST, f"epoch_{epoch}", progress)

    if args.load_best_model:
        load_checkpoint(accelerator, model, lr_scheduler, args.output_dir / BEST)
    save_model(accelerator, model, text, args.output_dir)
    accelerator.end_training()


def report(args: argparse.Namespace, accelerator: Accelerator, measured: dict[str, float], progress: Progress) -> None:
    """To the screen, and to the trackers if there are any."""
    accelerator.print(
        f"step {progress.num_steps} · " + " · ".join(f"{name} {value:.6g}" for name, value in measured.items())
    )
    if args.with_tracking:
        accelerator.log({**measured, "epoch": progress.epoch}, step=progress.num_steps)


def evaluate(accelerator: Accelerator, model: nn.Module, dataloader: DataLoader[Any]) -> float:
    """The mean loss over the sequences of all ranks, each counted once."""
    model.eval()
    losses = []
    for batch in dataloader:
        with torch.no_grad():
            logits = model(**batch).logits  # [B, T, V]
        labels = batch["labels"][:, 1:]  # each token is foretold from those before it
        token_losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
        losses.append(accelerator.gather_for_metrics(token_losses.mean(dim=1)))  # [B] -> [W B]
    return torch.cat(losses).mean().item()


def parse_args() -> argparse.Namespace:
    """The options, with the names that such scripts have."""
    parser = argparse.ArgumentParser(
        description="Train a causal language model under a DeepSpeed JSON.", allow_abbrev=False
    )
    data, run, where = (parser.add_argument_group(title) for title in ("model and text", "training", "results"))
    data.add_argument(
        "--config_name",
        default="small",
        help=f"architecture, with random weights: {', '.join(PRESETS)}, a local folder, or a name of the hub",
    )
    data.add_argument("--model_name_or_path", help="a trained model instead: a local folder or a name of the hub")
    data.add_argument("--tokenizer_name", help="a local folder or a name of the hub (default: trained on the text)")
    data.add_argument("--train_file", "--train-file", type=Path, help="UTF-8 text (default: Python's library)")
    data.add_argument("--validation_file", type=Path, help="UTF-8 text (default: the end of the training text)")
    data.add_argument("--dataset_name", help="a data set of the hub with a column text, such as wikitext")
    data.add_argument("--dataset_config_name", help="which one of several, such as wikitext-2-raw-v1")
    data.add_argument("--block_size", type=int, help="tokens of a sequence (default: 128, or the model's context)")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as launcher and JSON say")
    run.add_argument("--cpu", action="store_true", help="train on the CPU, also where there is a GPU")
    run.add_argument("--learning_rate", type=float, default=1e-3)
    run.add_argument("--weight_decay", type=float, default=0.0)
    run.add_argument("--lr_scheduler_type", type=SchedulerType, choices=list(SchedulerType), default="linear")
    run.add_argument("--num_warmup_steps", type=int, default=0)
    run.add_argument("--num_train_epochs", type=int, default=1)
    run.add_argument("--max_train_steps", type=int, help="optimizer steps; it replaces --num_train_epochs")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--per_device_train_batch_size", type=int, default=8)
    run.add_argument("--per_device_eval_batch_size", type=int, default=8)
    run.add_argument("--seed", type=int, default=0)
    where.add_argument("--output_dir", type=Path, default=Path("outputs/clm"))
    where.add_argument("--cache_dir", "--cache-dir", type=Path, default=Path("~/.cache/shardwise"))
    where.add_argument(
        "--checkpointing_steps", type=_checkpointing_steps, help=f"save every so many steps, or every {EVERY_EPOCH}"
    )
    where.add_argument("--resume_from_checkpoint", type=Path, help="a checkpoint, or a folder of several: the latest")
    where.add_argument("--load_best_model", action="store_true", help="save the model of the best evaluation")
    where.add_argument("--with_tracking", action="store_true", help="keep what is measured")
    where.add_argument("--report_to", default="jsonl", help="jsonl, csv, tensorboard, wandb, trackio, mlflow or all")
    where.add_argument("--logging_steps", type=int, default=10, help="steps from one report to the next")
    return parser.parse_args()


def _checkpointing_steps(value: str) -> int | str:
    if value == EVERY_EPOCH:
        return value
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"found {value}, expected a number of steps or {EVERY_EPOCH}")
    return int(value)


if __name__ == "__main__":
    main()
