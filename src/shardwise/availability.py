"""Which packages and devices there are: the questions that scripts ask before they import something."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch


def _installed(package: str, short_name: str | None = None) -> Callable[[], bool]:
    def is_installed() -> bool:
        return importlib.util.find_spec(package) is not None

    is_installed.__name__ = f"is_{short_name or package}_available"
    is_installed.__doc__ = f"Whether the package {package} is installed."
    return is_installed


is_aim_available = _installed("aim")
is_amdsmi_available = _installed("amdsmi")
is_bnb_available = _installed("bitsandbytes", "bnb")
is_boto3_available = _installed("boto3")
is_clearml_available = _installed("clearml")
is_comet_ml_available = _installed("comet_ml")
is_datasets_available = _installed("datasets")
is_dvclive_available = _installed("dvclive")
is_lomo_available = _installed("lomo_optim", "lomo")
is_matplotlib_available = _installed("matplotlib")
is_mlflow_available = _installed("mlflow")
is_pandas_available = _installed("pandas")
is_peft_available = _installed("peft")
is_pynvml_available = _installed("pynvml")
is_pytest_available = _installed("pytest")
is_rich_available = _installed("rich")
is_schedulefree_available = _installed("schedulefree")
is_swanlab_available = _installed("swanlab")
is_tensorboard_available = _installed("tensorboard")
is_timm_available = _installed("timm")
is_torchao_available = _installed("torchao")
is_torchdata_available = _installed("torchdata")
is_torchvision_available = _installed("torchvision")
is_tqdm_available = _installed("tqdm")
is_trackio_available = _installed("trackio")
is_transformer_engine_available = _installed("transformer_engine")
is_transformers_available = _installed("transformers")
is_triton_available = _installed("triton")
is_wandb_available = _installed("wandb")


def is_deepspeed_available() -> bool:
    """Yes: scripts ask this before they use ZeRO, which is shardwise's own."""
    return True


def is_cuda_available() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def is_rocm_available() -> bool:
    """Whether torch was built for AMD's GPUs and sees one."""
    return torch.version.hip is not None and torch.cuda.is_available()


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether this machine computes in bf16: every CPU does, and GPUs that say so."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else True


def is_weights_only_available() -> bool:
    """Yes: every torch that shardwise runs on loads tensors without unpickling anything else."""
    return True


def is_fp16_available() -> bool:
    """Yes: fp16 runs on the GPU and, slowly, on the CPU."""
    return True


def _never(device: str) -> Callable[..., bool]:
    def is_usable(*args: object, **kwargs: object) -> bool:
        return False

    is_usable.__doc__ = f"No: shardwise runs on the CPU and on CUDA, not on {device}."
    return is_usable


is_fp8_available = _never("fp8 kernels")
is_hpu_available = _never("Gaudi HPUs")
is_megatron_lm_available = _never("Megatron-LM")
is_mlu_available = _never("Cambricon MLUs")
is_mps_available = _never("Apple's GPUs")
is_msamp_available = _never("MS-AMP")
is_musa_available = _never("Moore Threads GPUs")
is_neuron_available = _never("AWS Neuron")
is_npu_available = _never("Ascend NPUs")
is_sdaa_available = _never("SDAA devices")
is_torch_xla_available = _never("XLA devices")
is_xpu_available = _never("Intel's XPUs")
