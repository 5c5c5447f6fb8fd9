"""Where a run's default YAML lies: our own place first, then Accelerate's, which is only ever read."""

from collections.abc import Mapping
from pathlib import Path

_NAMES = ("default_config.yaml", "default_config.yml", "default_config.json")


def own_default(environ: Mapping[str, str]) -> Path:
    """The file that `shardwise config` writes when it is given no other name."""
    base = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".config")
    return base / "shardwise" / _NAMES[0]


def accelerate_default(environ: Mapping[str, str]) -> Path | None:
    """The existing default file of Accelerate, if there is one.

    Its place is HF_HOME/accelerate, where HF_HOME is XDG_CACHE_HOME/huggingface or ~/.cache/huggingface if it is not
    set (huggingface.co/docs/accelerate/package_reference/cli).
    """
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".cache"
    home = Path(environ.get("HF_HOME") or Path(cache) / "huggingface")
    candidates = (home / "accelerate" / name for name in _NAMES)
    return next((path for path in candidates if path.is_file()), None)
