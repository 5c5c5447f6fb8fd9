"""The part of the configuration's page that is about a whole run: who may say what, and who wins."""

from shardwise.config.messages import dotted
from shardwise.config.run.auto import FILLED_FROM
from shardwise.config.run.resolved import IN_JSON

_TEXT = """\
## A run: flags, YAML, script and JSON

`shardwise launch` and `Accelerator` read four places. `shardwise explain` shows for every setting which of them won.

| place | how it is written |
|---|---|
| the script | `DeepSpeedPlugin(zero_stage=3)`, `Accelerator(mixed_precision="bf16")` |
| flags | `shardwise launch --zero_stage 3` (or `--zero-stage 3`) |
| the YAML | `--config_file run.yaml`, else `~/.config/shardwise/default_config.yaml`, else Accelerate's default file |
| the DeepSpeed JSON | `deepspeed_config_file: ds_config.json`, `DeepSpeedPlugin(hf_ds_config=…)` |

**Who wins.** The script before flags, flags before the YAML, the YAML before the default; but a flag that contradicts
the script is an error, for somebody has typed it. The JSON has the only word on what it says:

| the JSON says | and another place says | outcome |
|---|---|---|
| a value | nothing | the JSON's value |
| a value | the same | the JSON's value, and one warning |
| a value | another one | an error with both values, both places and the command that mends it |
| `"auto"` | a value | that value |
| `"auto"` | nothing | the default, or what `prepare` finds (below) |
| nothing | a value | that value |

The settings that a key of the JSON says as well:

{in_json}

`mixed_precision` is `fp16.enabled` and `bf16.enabled`. A `mixed_precision: 'no'` in a YAML gives way to a JSON that
asks for 16 bits, with a warning: files carry it without anybody's choice.

**What `prepare` fills.** An `"auto"` that is still there when a model is prepared is computed from what the script
passes; one that nothing fills is an error that names the key and the ways to set it.

{auto}

A script counts `total_num_steps` with the loader of one process; a run of W ranks has W times fewer steps. With
`split_batches` the number is taken as it is.

**Where this differs from Accelerate**, on purpose:

| | Accelerate 1.15 | here |
|---|---|---|
| a flag beside a JSON that says otherwise | dropped without a word | an error |
| "no" to the question about clipping | clips at 1.0 | no clipping |
| a JSON without `gradient_clipping` | clips at 1.0 (DeepSpeed's default since 2026) | no clipping |
| an unknown key inside `deepspeed_config` | accepted without a word | an error that names its neighbour |
| `--zero_stage 3` without `--use_deepspeed` | ignored | a ZeRO run |
| NVMe paths from flags and YAML | never reach the job | reach it |
| `mixed_precision` beside a JSON that agrees | an error | one warning |
| `num_processes` on the CPU | 1 on every rank | the number of ranks |
| `deepspeed_config` with another `distributed_type` | ignored | an error |
| an unquoted `no` in the YAML | false | the word |
| several machines, no launcher named | `pdsh` starts the others | `standard`: the same command on each machine |
| torch's compiler (`dynamo_…`) | compiles the model | refused: compile the model's blocks yourself |

"""


def run_introduction() -> str:
    """Return the text before the tables of a run's settings."""
    settings = [
        ("setting", "key of the JSON"),
        *((f"`{name}`", f"`{'.'.join(path)}`") for name, path in IN_JSON.items()),
    ]
    auto = [("key", '"auto" is'), *((f"`{dotted(path)}`", formula) for path, formula in FILLED_FROM.items())]
    return _TEXT.format(in_json=_table(settings), auto=_table(auto))


def _table(rows: list[tuple[str, str]]) -> str:
    head, *body = (f"| {left} | {right} |" for left, right in rows)
    return "\n".join([head, "|---|---|", *body])
