"""The kinds of values that keys hold, and the base of all blocks.

Types are strict: true is not 1 and "2" is not 2. The one licence is that of JSON itself, where 2e8 is a way to write
a whole number.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from shardwise.layout import ALIGNMENT, MAX_BLOCK

LARGEST_COUNT = 2**63 - 1  # what a torch size can hold


class Block(BaseModel):
    """A frozen block of the config whose every key is declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def expand(cls, value: object) -> object:
        """Return the mapping that a shorthand of this block stands for; anything else unchanged."""
        return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_stage(value: Any) -> Any:
    if isinstance(value, bool):  # a Literal takes true for 1
        raise PydanticCustomError("literal_error", "true or false", {"expected": "0, 1, 2 or 3"})
    return _whole(value)


def _frozen_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _endless_is_never(value: Any) -> Any:
    return None if value == float("inf") else value


Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT), BeforeValidator(_whole)]
PositiveCount = Annotated[int, Field(ge=1, le=LARGEST_COUNT), BeforeValidator(_whole)]
BlockLength = Annotated[int, Field(ge=ALIGNMENT, le=MAX_BLOCK, multiple_of=ALIGNMENT), BeforeValidator(_whole)]
SignedCount = Annotated[int, Field(ge=-1, le=LARGEST_COUNT), BeforeValidator(_whole)]
ScalePower = Annotated[int, Field(ge=0, le=127), BeforeValidator(_whole)]  # 2^127 is the last power that fp32 holds
Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_whole_stage)]
Interval = Annotated[PositiveCount | None, BeforeValidator(_endless_is_never)]
Ratio = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_frozen_list)]
Dtype = Literal["fp32", "fp16", "bf16"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
Foreign = dict[str, Any]  # the block of a feature that is not here: its inside is not ours to judge
