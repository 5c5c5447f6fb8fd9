"""Classify pairs of sentences with BERT, on one device or many, with or without ZeRO.

    shardwise launch examples/nlp_example.py --mixed_precision fp16
    shardwise launch --zero_stage 2 examples/nlp_example.py

Without options nothing is downloaded: a small BERT with random weights learns whether a sentence describes a Python
function (see ``docstring_pairs.py``). With ``--dataset_name glue`` it is the paraphrases of MRPC and BERT from the hub.

The same script runs plain data parallelism and every ZeRO stage: what is sharded is said by flags or a config file.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from docstring_pairs import Pair, docstring_pairs
from from_hub import from_hub, load_split_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from shardwise import Accelerator
from shardwise.errors import ConfigError
from shardwise.utils import DataLoaderConfiguration, set_seed

MAX_LENGTH = 128  # tokens of a pair from the hub
MAX_LENGTH_OFFLINE = 32
VOCABULARY_SIZE = 4096
HIDDEN_SIZE = 64
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
OFFLINE = "Without the hub leave out --dataset_name and --model_name_or_path, or give a local folder as the model."


def get_dataloaders(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[DataLoader[Any], DataLoader[Any], PreTrainedTokenizerBase]:
    """Loaders of one process for training and for evaluation; ``prepare`` gives each rank its share."""
    if args.dataset_name is None:
        training, held_out = docstring_pairs(args.seed)
    else:
        with accelerator.main_process_first():  # it downloads, the others find the cache
            training, held_out = pairs_of_hub(args)
    training, held_out = training[: args.max_train_samples], held_out[: args.max_eval_samples]
    tokenizer = get_tokenizer(args, training)
    max_length = MAX_LENGTH_OFFLINE if args.dataset_name is None else MAX_LENGTH

    def collate(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        batch = tokenizer(
            [pair.sentence for pair in pairs],
            [pair.function for pair in pairs],
            truncation=True,
            max_length=max_length,
            padding="longest",
            return_tensors="pt",
        )
        return {**batch, "labels": torch.tensor([pair.label for pair in pairs])}

    return (
        DataLoader(training, batch_size=args.per_device_train_batch_size, shuffle=True, collate_fn=collate),
        DataLoader(held_out, batch_size=args.per_device_eval_batch_size, collate_fn=collate),
        tokenizer,
    )


def pairs_of_hub(args: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """The pairs of MRPC, or of another data set with the same columns."""
    splits = load_split_dataset(args.dataset_name, args.dataset_config_name, OFFLINE)
    missing = {"sentence1", "sentence2", "label"} - set(splits["train"].column_names)
    if missing:
        raise ConfigError(f"--dataset_name {args.dataset_name} lacks {', '.join(sorted(missing))}: try glue and mrpc.")
    training, held_out = (
        [Pair(row["sentence1"], row["sentence2"], row["label"]) for row in splits[name]]
        for name in ("train", "validation")
    )
    return training, held_out


def get_tokenizer(args: argparse.Namespace, training: Sequence[Pair]) -> PreTrainedTokenizerBase:
    """That of the named model; without one, the commonest words of the training pairs."""
    name = args.model_name_or_path
    if name is not None:
        return from_hub(f"--model_name_or_path {name}", lambda: AutoTokenizer.from_pretrained(name), OFFLINE)
    counts = Counter(word for pair in training for text in (pair.sentence, pair.function) for word in text.split())
    # The commonest words, equals by the alphabet: every rank and every run numbers them alike.
    words = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY_SIZE - len(SPECIAL_TOKENS)]
    numbers = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    by_word = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_word.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=by_word,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def get_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The named model with its weights; without one, a small BERT with random ones."""
    name = args.model_name_or_path
    if name is not None:
        return from_hub(
            f"--model_name_or_path {name}",
            lambda: AutoModelForSequenceClassification.from_pretrained(name, num_labels=2),
            OFFLINE,
        )
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * HIDDEN_SIZE,
            max_position_embeddings=MAX_LENGTH,
            num_labels=2,
        )
    )


def training_function(args: argparse.Namespace) -> None:
    """The training script proper; every process runs all of it."""
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of samples follows from seed and epoch alone, on any number of processes and after a resume.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    if args.with_tracking:
        accelerator.init_trackers("nlp_example", vars(args))
    set_seed(args.seed)

    train_dataloader, eval_dataloader, tokenizer = get_dataloaders(args, accelerator)
    model = get_model(args, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    # Ticks are counted as one process would: a prepared scheduler ticks num_processes times a step.
    num_ticks = math.ceil(len(train_dataloader) / accelerator.gradient_accumulation_steps) * args.num_train_epochs
    if args.max_train_steps is not None:
        num_ticks = min(num_ticks, args.max_train_steps * accelerator.num_processes)
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer,
        num_warmup_steps=args.num_warmup_steps * accelerator.num_processes,
        num_training_steps=num_ticks,
    )

    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    completed_steps = 0
    for epoch in range(args.num_train_epochs):
        model.train()
        train_dataloader.set_epoch(epoch)
        losses = []
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach().float())
            completed_steps += accelerator.sync_gradients
            if completed_steps == args.max_train_steps:
                break

        measured = {"epoch": epoch, "train_loss": accelerator.reduce(torch.stack(losses).mean(), "mean").item()}
        measured |= evaluate(accelerator, model, eval_dataloader)
        accelerator.print(" · ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        if args.with_tracking:
            accelerator.log(measured, step=completed_steps)
        if completed_steps == args.max_train_steps:
            break
    accelerator.end_training()


def evaluate(accelerator: Accelerator, model: torch.nn.Module, dataloader: DataLoader[Any]) -> dict[str, float]:
    """Accuracy, and the F1 of the label 1, over the pairs of all ranks, each counted once."""
    model.eval()
    right = found = claimed = true = total = 0
    for batch in dataloader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(dim=-1)  # [B]
        predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
        right += int((predictions == labels).sum())
        found += int((predictions * labels).sum())
        claimed += int(predictions.sum())
        true += int(labels.sum())
        total += len(labels)
    return {"accuracy": right / total, "f1": 2 * found / max(1, claimed + true), "num_eval_samples": total}


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Classify pairs of sentences with BERT.", allow_abbrev=False)
    run, data, where = (parser.add_argument_group(title) for title in ("training", "model and data", "results"))
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as the launcher was told")
    run.add_argument("--cpu", action="store_true", help="train on the CPU, also where there is a GPU")
    run.add_argument("--learning_rate", type=float, help="default: 2e-3, with --model_name_or_path 2e-5")
    run.add_argument("--num_train_epochs", type=int, default=3)
    run.add_argument("--max_train_steps", type=int, help="end after so many optimizer steps")
    run.add_argument("--num_warmup_steps", type=int, default=20)
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--per_device_train_batch_size", type=int, default=16)
    run.add_argument("--per_device_eval_batch_size", type=int, default=32)
    run.add_argument("--seed", type=int, default=42)
    data.add_argument("--model_name_or_path", help="a model of the hub or of a local folder (default: a small BERT)")
    data.add_argument("--dataset_name", help="a data set of the hub with sentence1, sentence2 and label, such as glue")
    data.add_argument("--dataset_config_name", help="default: mrpc for glue")
    data.add_argument("--max_train_samples", type=int, help="use so many pairs alone")
    data.add_argument("--max_eval_samples", type=int, help="use so many pairs alone")
    where.add_argument("--output_dir", default="outputs/nlp_example", help="of what trackers write")
    where.add_argument("--with_tracking", action="store_true", help="keep what is measured")
    where.add_argument("--report_to", default="jsonl", help="jsonl, csv, tensorboard, wandb, trackio, mlflow or all")
    args = parser.parse_args()
    if args.dataset_name == "glue":
        args.dataset_config_name = args.dataset_config_name or "mrpc"
    if args.dataset_name is not None and args.model_name_or_path is None:
        args.model_name_or_path = "bert-base-cased"
    if args.learning_rate is None:
        args.learning_rate = 2e-3 if args.model_name_or_path is None else 2e-5
    return args


if __name__ == "__main__":
    training_function(parse_args())
