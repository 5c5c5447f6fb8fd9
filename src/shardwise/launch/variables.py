"""The environment variables that go along to other machines: an allow-list, and the file in which users name more.

They stand on command lines, which everybody on those machines can read. So nothing whose name speaks of a secret, or
whose value is an address with a password, is taken along unless the user names it, and a variable that says something
about one machine alone never is.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from shardwise.errors import ConfigError

_NAMES = frozenset({"PATH", "LD_LIBRARY_PATH", "LANG", "TZ", "GLIBC_TUNABLES", "CUDA_HOME", "XDG_CACHE_HOME"})
_PREFIXES = (
    *("CUDA_", "CUBLAS_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_", "PYTHON", "LC_"),
    *("OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "UCX_", "FI_", "OPENBLAS_"),
    *("HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "MLFLOW_", "COMET_"),
)
# Of this machine, or of this process: another one finds its own.
_STAYS = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONHOME"})
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(?:^|_)(?:KEY|KEYS|APIKEY|AUTH|USER|USERNAME)(?:_|$)")
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")  # scheme://user:password@host
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
USERS_FILE = ".deepspeed_env"


def forwarded(environ: Mapping[str, str], also: Iterable[str] = ()) -> dict[str, str]:
    """Those of this process's variables that go along: the allow-list, and the names in `also`.

    Raises ConfigError where a name of `also` is not set here.
    """
    chosen = {
        name: value
        for name, value in environ.items()
        if (name in _NAMES or name.startswith(_PREFIXES))
        and name not in _STAYS
        and not _SECRET.search(name)
        and not _PASSWORD_IN_URL.search(value)
    }
    for name in also:
        if name not in environ:
            raise ConfigError(f"--forward_env names {name}, which is not set here. Set it, or leave it out.")
        chosen[name] = environ[name]
    return dict(sorted(chosen.items()))


def users_variables(environ: Mapping[str, str], directory: Path) -> tuple[dict[str, str], tuple[Path, ...]]:
    """What a user's `.deepspeed_env` says, and the files that were read.

    DeepSpeed's places: the file that DS_ENV_FILE names, or else one in the home and one in the working directory, which
    is the stronger. It is only read here. Raises ConfigError with every line that is no `NAME=value`.
    """
    named = environ.get("DS_ENV_FILE")
    homes = [Path(environ["HOME"])] if environ.get("HOME") else []
    places = [Path(named)] if named else [place / USERS_FILE for place in (*homes, directory)]
    found = tuple(dict.fromkeys(place for place in places if place.is_file()))
    if named and not found:
        raise ConfigError(f"DS_ENV_FILE is {named}, and there is no such file. Mend it, or unset it.")
    values: dict[str, str] = {}
    for place in found:
        values |= _read(place)
    return values, found


def _read(place: Path) -> dict[str, str]:
    try:
        text = place.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} cannot be read: {error}.") from None
    values, faults = {}, []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.rstrip("\r").partition("=")
        if not equals or not _NAME.fullmatch(name.strip()) or "\0" in value:
            faults.append(f"{place}, line {number}: expected NAME=value.")
        else:
            values[name.strip()] = value
    if faults:
        raise ConfigError("\n".join(faults))
    return values
