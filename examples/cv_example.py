"""Classify images with a small network, on one device or many, with or without ZeRO.

    shardwise launch examples/cv_example.py
    shardwise launch --zero_stage 3 examples/cv_example.py --model vit --mixed_precision bf16

Nothing is downloaded: the images are shapes that are drawn on the spot (see ``drawn_shapes.py``). The model is a small
convolutional network of this file, or a small ViT of ``transformers``; both begin with random weights.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from drawn_shapes import SHAPES, SIDE, drawn_shapes
from torch import nn
from torch.utils.data import DataLoader

from shardwise import Accelerator
from shardwise.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed

Images = torch.Tensor  # [B, 1, SIDE, SIDE]


class ConvNet(nn.Module):
    """Three convolutions that halve the image each, and a layer that tells shapes from what they found."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [1, width, 2 * width, 4 * width]
        # A batch norm would see other statistics on each rank.
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU())
            for before, after in pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], len(SHAPES))

    def forward(self, images: Images) -> torch.Tensor:
        """Logits [B, number of shapes]."""
        for block in self.blocks:
            images = block(images)
        return self.head(images.amax(dim=(2, 3)))  # wherever in the image it is


class Vit(nn.Module):
    """The ViT of ``transformers``, small, with logits as its output."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        self.config = ViTConfig(
            image_size=SIDE,
            patch_size=4,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=len(SHAPES),
        )
        self.network = ViTForImageClassification(self.config)

    def forward(self, images: Images) -> torch.Tensor:
        """Logits [B, number of shapes]."""
        return self.network(images).logits


@dataclass
class Progress:
    """How far training is; ``save_state`` keeps it, because it is registered."""

    epoch: int = 0
    num_steps: int = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.num_steps = state["epoch"], state["num_steps"]


MODELS = {"cnn": ConvNet, "vit": Vit}


def training_function(args: argparse.Namespace) -> None:
    """The training script proper; every process runs all of it."""
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The order of samples follows from seed and epoch alone, on any number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with=args.report_to if args.with_tracking else None,
        # Checkpoints go to output_dir/checkpoints/checkpoint_0 and so on; of more than three the oldest goes.
        project_config=ProjectConfiguration(args.output_dir, automatic_checkpoint_naming=True, total_limit=3),
    )
    if args.with_tracking:
        accelerator.init_trackers("cv_example", vars(args))
    set_seed(args.seed)

    # Loaders of one process; prepare() gives each rank its share.
    train_dataloader: DataLoader[Any] = DataLoader(
        drawn_shapes(args.max_train_samples, args.seed), batch_size=args.per_device_train_batch_size, shuffle=True
    )
    eval_dataloader: DataLoader[Any] = DataLoader(
        drawn_shapes(args.max_eval_samples, args.seed + 1), batch_size=args.per_device_eval_batch_size
    )
    model = MODELS[args.model]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate / 25)
    # The schedule is counted as one process would: a prepared scheduler ticks num_processes times a step.
    steps_per_epoch = -(-len(train_dataloader) // accelerator.gradient_accumulation_steps)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, epochs=args.num_train_epochs, steps_per_epoch=steps_per_epoch
    )

    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume_from_checkpoint is not None:
        accelerator.load_state(args.resume_from_checkpoint)  # the loader, too, goes on where it was
    for epoch in range(progress.epoch, args.num_train_epochs):
        model.train()
        train_dataloader.set_epoch(epoch)
        losses = []
        for images, labels in train_dataloader:
            if progress.num_steps == args.max_train_steps:
                break
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images).float(), labels)
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            progress.num_steps += 1
            if args.checkpointing_steps is not None and progress.num_steps % args.checkpointing_steps == 0:
                accelerator.print(f"checkpoint: {accelerator.save_state()}")

        measured = {
            "epoch": epoch,
            "train_loss": accelerator.reduce(torch.stack(losses).mean(), "mean").item(),
            "accuracy": evaluate(accelerator, model, eval_dataloader),
        }
        accelerator.print(" · ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        if args.with_tracking:
            accelerator.log(measured, step=progress.num_steps)
        progress.epoch += 1
        if progress.num_steps == args.max_train_steps:
            break
    accelerator.end_training()


def evaluate(accelerator: Accelerator, model: nn.Module, dataloader: DataLoader[Any]) -> float:
    """The share of images that are told right, over those of all ranks, each counted once."""
    model.eval()
    right = []
    for images, labels in dataloader:
        with torch.no_grad():
            predictions = model(images).argmax(dim=-1)  # [B]
        right.append(accelerator.gather_for_metrics(predictions == labels))  # [W B]
    return torch.cat(right).float().mean().item()


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Classify drawn shapes with a small network.", allow_abbrev=False)
    run, data, where = (parser.add_argument_group(title) for title in ("training", "model and data", "results"))
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: as the launcher was told")
    run.add_argument("--cpu", action="store_true", help="train on the CPU, also where there is a GPU")
    run.add_argument("--learning_rate", type=float, default=5e-3, help="the highest of the cycle")
    run.add_argument("--num_train_epochs", type=int, default=3)
    run.add_argument("--max_train_steps", type=int, help="end after so many optimizer steps")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--per_device_train_batch_size", type=int, default=32)
    run.add_argument("--per_device_eval_batch_size", type=int, default=64)
    run.add_argument("--seed", type=int, default=42)
    data.add_argument("--model", choices=MODELS, default="cnn", help="default: cnn; vit needs transformers")
    data.add_argument("--max_train_samples", type=int, default=4000)
    data.add_argument("--max_eval_samples", type=int, default=1000)
    where.add_argument("--output_dir", default="outputs/cv_example", help="of checkpoints and what trackers write")
    where.add_argument("--checkpointing_steps", type=int, help="save everything every so many steps")
    where.add_argument("--resume_from_checkpoint", help="a checkpoint, to go on from")
    where.add_argument("--with_tracking", action="store_true", help="keep what is measured")
    where.add_argument("--report_to", default="jsonl", help="jsonl, csv, tensorboard, wandb, trackio, mlflow or all")
    return parser.parse_args()


if __name__ == "__main__":
    training_function(parse_args())
