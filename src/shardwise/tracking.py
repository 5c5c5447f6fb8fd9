"""The trackers under the name that scripts import them from; they live in `shardwise.trackers`."""

from shardwise.trackers.base import GeneralTracker, on_main_process
from shardwise.trackers.choose import (
    LOGGER_TYPE_TO_CLASS,
    LoggerType,
    filter_trackers,
    get_available_trackers,
    register_tracker_class,
)
from shardwise.trackers.files import CsvTracker, JsonLinesTracker
from shardwise.trackers.services import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "CsvTracker",
    "GeneralTracker",
    "JsonLinesTracker",
    "LoggerType",
    "MLflowTracker",
    "TensorBoardTracker",
    "TrackioTracker",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
]
