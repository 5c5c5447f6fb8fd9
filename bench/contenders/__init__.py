"""Every contender by its name."""

from __future__ import annotations

from bench.contenders import engines, front, torch_native
from bench.contenders.base import Contender, Trainer

CONTENDERS: dict[str, Contender] = {
    contender.name: contender for contender in (*torch_native.CONTENDERS, *engines.CONTENDERS, *front.CONTENDERS)
}

__all__ = ["CONTENDERS", "Contender", "Trainer"]
