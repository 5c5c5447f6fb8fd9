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
    model: Annotated[int, typer.Option("--model", help="Which one, where several were saved together.")] = 0,
) -> None:
    """Write a checkpoint's whole weights: no GPU, no configuration, memory of the largest parameter."""
    from shardwise.checkpoint.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(
        checkpoint_dir, output, max_shard_size, safetensors, tag, exclude_frozen, dtype, model
    )
