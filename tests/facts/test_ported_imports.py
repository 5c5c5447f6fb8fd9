"""The fear: a script that only changed the word in its imports fails at the first of them."""

from __future__ import annotations

import importlib

import pytest

import shardwise

# What scripts import, by module: names of Accelerate's public examples and test scripts, as its documentation shows
# them, but those of other back-ends (FSDP, Megatron-LM, TPUs, inference of models too large for one machine).
NAMES = {
    "shardwise": """Accelerator AutocastKwargs DDPCommunicationHookType DataLoaderConfiguration DeepSpeedPlugin
        DistributedDataParallelKwargs DistributedType GradScalerKwargs InitProcessGroupKwargs PartialState ProfileKwargs
        debug_launcher find_executable_batch_size is_rich_available notebook_launcher skip_first_batches
        synchronize_rng_states""",
    "shardwise.accelerator": "Accelerator DataLoaderConfiguration GradientAccumulationPlugin",
    "shardwise.data_loader": """BatchSamplerShard DataLoaderDispatcher DataLoaderShard IterableDatasetShard
        SeedableRandomSampler SkipBatchSampler SkipDataLoader prepare_data_loader skip_first_batches""",
    "shardwise.launchers": "debug_launcher notebook_launcher",
    "shardwise.logging": "MultiProcessAdapter get_logger",
    "shardwise.optimizer": "AcceleratedOptimizer",
    "shardwise.scheduler": "AcceleratedScheduler",
    "shardwise.state": "AcceleratorState DistributedType GradientState PartialState",
    "shardwise.tracking": "GeneralTracker LoggerType TensorBoardTracker WandBTracker filter_trackers on_main_process",
    "shardwise.utils": """AutocastKwargs DDPCommunicationHookType DataLoaderConfiguration DeepSpeedPlugin
        DistributedDataParallelKwargs DistributedOperationException DistributedType DummyOptim DummyScheduler
        GradScalerKwargs GradientAccumulationPlugin HfDeepSpeedConfig InitProcessGroupKwargs KwargsHandler LoggerType
        ProfileKwargs ProjectConfiguration RNGType SAFE_WEIGHTS_INDEX_NAME SAFE_WEIGHTS_NAME WEIGHTS_INDEX_NAME
        WEIGHTS_NAME broadcast broadcast_object_list clean_state_dict_for_safetensors compare_versions concatenate
        convert_outputs_to_fp32 convert_to_fp32 extract_model_from_parallel find_batch_size find_device
        find_executable_batch_size gather gather_object get_active_deepspeed_plugin honor_type is_bf16_available
        is_bnb_available is_comet_ml_available is_cuda_available is_datasets_available is_deepspeed_available
        is_fp16_available is_fp8_available is_hpu_available is_megatron_lm_available is_mlu_available is_mps_available
        is_musa_available is_neuron_available is_npu_available is_port_in_use is_pytest_available is_rich_available
        is_rocm_available is_schedulefree_available is_sdaa_available is_tensorboard_available is_torch_version
        is_torch_xla_available is_transformers_available is_wandb_available is_weights_only_available is_xpu_available
        listify load merge_dicts pad_across_processes patch_environment recursively_apply reduce release_memory save
        send_to_device set_seed slice_tensors synchronize_rng_state synchronize_rng_states tqdm wait_for_everyone""",
    "shardwise.utils.constants": "MODEL_NAME SAFE_MODEL_NAME SAFE_WEIGHTS_NAME WEIGHTS_NAME",
    "shardwise.utils.dataclasses": """DDPCommunicationHookType DeepSpeedPlugin DistributedType
        DistributedDataParallelKwargs GradientAccumulationPlugin LoggerType ProfileKwargs ProjectConfiguration
        RNGType""",
    "shardwise.utils.deepspeed": "DummyOptim DummyScheduler HfDeepSpeedConfig get_active_deepspeed_plugin",
    "shardwise.utils.environment": "get_int_from_env parse_flag_from_env patch_environment str_to_bool",
    "shardwise.utils.imports": "is_cuda_available is_tqdm_available is_transformers_available is_xpu_available",
    "shardwise.utils.memory": "clear_device_cache find_executable_batch_size release_memory should_reduce_batch_size",
    "shardwise.utils.operations": """DistributedOperationException TensorInformation broadcast copy_tensor_to_devices
        gather gather_object is_tensor_information pad_across_processes reduce send_to_device""",
    "shardwise.utils.other": "clean_state_dict_for_safetensors extract_model_from_parallel is_compiled_module save",
    "shardwise.utils.random": "set_seed synchronize_rng_state synchronize_rng_states",
    "shardwise.utils.versions": "compare_versions is_torch_version",
}
FACES = [name for name in NAMES if name.startswith("shardwise.utils")]


@pytest.mark.parametrize("module", NAMES)
def test_the_names_that_scripts_import_are_there(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("face", FACES)
def test_a_face_says_all_of_its_names_and_none_of_its_own(face: str) -> None:
    module = importlib.import_module(face)
    assert set(NAMES[face].split()) <= set(module.__all__)
    for name in module.__all__:
        home = getattr(getattr(module, name), "__module__", "")
        assert not home.startswith(face), f"{name} is made in {face}"


@pytest.mark.parametrize("face", [face for face in FACES if face != "shardwise.utils"])
def test_the_same_thing_has_the_same_name_everywhere(face: str) -> None:
    module, utils = importlib.import_module(face), importlib.import_module("shardwise.utils")
    for name in module.__all__:
        assert getattr(utils, name, getattr(module, name)) is getattr(module, name)


@pytest.mark.parametrize("name", ["FullyShardedDataParallelPlugin", "MegatronLMPlugin", "init_empty_weights"])
def test_other_back_ends_are_not_pretended(name: str) -> None:
    assert not hasattr(shardwise, name)
    assert not hasattr(importlib.import_module("shardwise.utils"), name)
