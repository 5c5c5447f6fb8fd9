"""Names alone: small helpers live in `shardwise.helpers`."""

from shardwise.environment import (
    clear_environment,
    patch_environment,
)
from shardwise.helpers import (
    clean_state_dict_for_safetensors,
    convert_bytes,
    extract_model_from_parallel,
    is_compiled_module,
    is_port_in_use,
    load,
    merge_dicts,
    save,
    wait_for_everyone,
)
from shardwise.questionnaire.basic import write_basic_config

__all__ = [
    "clean_state_dict_for_safetensors",
    "clear_environment",
    "convert_bytes",
    "extract_model_from_parallel",
    "is_compiled_module",
    "is_port_in_use",
    "load",
    "merge_dicts",
    "patch_environment",
    "save",
    "wait_for_everyone",
    "write_basic_config",
]
