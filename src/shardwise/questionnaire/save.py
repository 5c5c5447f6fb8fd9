"""Writing a config file: whole or not at all, and the file that was there before is kept."""

import os
import shutil
from pathlib import Path

from shardwise.errors import ConfigError


def backup_of(path: Path) -> Path:
    """Where the previous file is kept."""
    return path.with_name(path.name + ".bak")


def save(path: Path, text: str) -> Path | None:
    """Write `text` to `path`; return where the previous file is kept, or None if there was no other one."""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() == text.encode():
            return None
        kept = Path(shutil.copy2(path, backup_of(path))) if path.exists() else None
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Give --config_file another path.") from None
    return kept
