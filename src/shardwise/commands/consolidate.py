"""`shardwise consolidate`: ordinary weights of a checkpoint, for anybody to load."""

from typing import Annotated

import typer


def consolidate(
    checkpoint_dir: Annotated[str, typer.Argument(metavar="DIR", help="Directory of checkpoints.", show_default=False)],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="A file (*.safetensors, *.bin), or a directory for shards.", show_default=False
        ),
    ],
    tag: Annotated[
        str | None, typer.Option("--tag", "-t", help="Which checkpoint; default: the one that `latest` names.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, fp16 or bf16.")] = "fp32",
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Of a file in a directory.")] = "5GB",
    safetensors: Annotated[
        bool, typer.Option("--safetensors/--torch", help="Shards of safetensors, or files for torch.load.")
    ] = True,
    exclude_frozen: Annotated[bool, typer.Option("--exclude-frozen", help="Leave frozen parameters out.")] = False,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="MODEL_DIR",
            help="Take config and tokenizer from there, so that from_pretrained reads OUT.",
        ),
    ] = None,
    model: Annotated[int, typer.Option("--model", help="Which one, where several were saved together.")] = 0,
) -> None:
    """Write a checkpoint's whole weights: no GPU, no configuration, memory of the largest parameter."""
    from pathlib import Path

    from shardwise.checkpoint.model_settings import check_settings, copy_settings
    from shardwise.checkpoint.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    if like is not None:
        check_settings(Path(like), Path(output))

    convert_zero_checkpoint_to_fp32_state_dict(
        checkpoint_dir, output, max_shard_size, safetensors, tag, exclude_frozen, dtype, model
    )
    if like is not None:
        copy_settings(Path(like), dtype, Path(output))
