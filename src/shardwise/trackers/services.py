"""Trackers that bring values to TensorBoard, Weights & Biases, Trackio and MLflow; each needs its package.

The packages are imported when a run begins: a script that does not ask for one does not wait for it either.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardwise.environment import str_to_bool
from shardwise.trackers.base import GeneralTracker, on_main_process
from shardwise.trackers.values import SCALARS, LeftOut, flat, plain

# What MLflow's servers take: characters of a setting, settings a request.
MLFLOW_SETTING_CHARACTERS = 6000
MLFLOW_SETTINGS_AT_ONCE = 100


class TensorBoardTracker(GeneralTracker):
    """``tensorboard``: an event file in ``logging_dir/project``.

    Every run writes an event file of its own. TensorBoard shows all of a directory as one curve, which suits a run that
    goes on from a checkpoint; another experiment needs another project.

    Args:
        run_name: the project: a directory.
        logging_dir: where that directory is.
        kwargs: for ``SummaryWriter``.
    """

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.logging_dir = os.path.join(logging_dir, run_name)
        self.init_kwargs = kwargs
        self._left_out = LeftOut(self.name)

    @on_main_process
    def start(self) -> None:
        """Begin an event file."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(**{"log_dir": self.logging_dir, **self.init_kwargs})

    @property
    def tracker(self) -> Any:
        """The ``SummaryWriter``."""
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write hyperparameters, flat; what is no number or string is written as ``str`` says it."""
        settings = {name: value if isinstance(value, SCALARS) else str(value) for name, value in flat(values).items()}
        # Into the run's own directory: by default each call makes a directory that TensorBoard shows as another run.
        self.writer.add_hparams(settings, {}, run_name=".")
        self.writer.flush()

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write numbers as scalars, strings as text, a dict of numbers as several curves in one chart."""
        for name, value in plain(values).items():
            if isinstance(value, str):
                self.writer.add_text(name, value, global_step=step, **kwargs)
            elif isinstance(value, SCALARS):
                self.writer.add_scalar(name, value, global_step=step, **kwargs)
            elif isinstance(value, Mapping) and all(_is_number(each) for each in value.values()):
                self.writer.add_scalars(name, value, global_step=step, **kwargs)
            else:
                self._left_out.tell(name, value, "a number, a string or a dict of numbers")
        self.writer.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write images: arrays with ``dataformats`` as ``add_images`` takes them, or lists of H x W x C images."""
        for name, images in values.items():
            if isinstance(images, (list, tuple)):
                listed = {"dataformats": "NHWC", **kwargs}
                self.writer.add_images(name, _stacked(images), global_step=step, **listed)
            else:
                self.writer.add_images(name, images, global_step=step, **kwargs)
        self.writer.flush()

    @on_main_process
    def finish(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandBTracker(GeneralTracker):
    """``wandb``: a run of Weights & Biases, one for all processes.

    Args:
        run_name: the project.
        kwargs: for ``wandb.init``.
    """

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        """Begin a run."""
        self.run: Any = importlib.import_module("wandb").init(**{"project": self.run_name, **self.init_kwargs})

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Add to the config of the run."""
        self.run.config.update(plain(values), allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values, among them the media objects of the package."""
        self.run.log(plain(values), step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images under their names."""
        image = importlib.import_module("wandb").Image
        self.run.log({name: [image(each) for each in images] for name, images in values.items()}, step=step, **kwargs)

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a table, from ``columns`` and rows in ``data``, or from ``dataframe``."""
        table = importlib.import_module("wandb").Table(columns=columns, data=data, dataframe=dataframe)
        self.run.log({table_name: table}, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Send what is left and end the run."""
        self.run.finish()


class TrackioTracker(GeneralTracker):
    """``trackio``: a run of Trackio's.

    Args:
        run_name: the project.
        kwargs: for ``trackio.init``.
    """

    name = "trackio"
    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        """Begin a run."""
        self.run: Any = importlib.import_module("trackio").init(**{"project": self.run_name, **self.init_kwargs})

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Add to the config of the run, which is sent with the first log."""
        self.run.config.update(plain(values))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values, among them the media objects of the package."""
        self.run.log(plain(values), step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images under their names; several of one name as ``name/0``, ``name/1`` and so on."""
        image = importlib.import_module("trackio").Image
        numbered = {
            name if len(images) == 1 else f"{name}/{index}": image(each)
            for name, images in values.items()
            for index, each in enumerate(images)
        }
        self.run.log(numbered, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Send what is left and end the run."""
        self.run.finish()


class MLflowTracker(GeneralTracker):
    """``mlflow``: a run in an experiment, which is made if it is not there.

    MLflow's ``MLFLOW_EXPERIMENT_NAME``, ``MLFLOW_TAGS`` (JSON), ``MLFLOW_NESTED_RUN`` and ``MLFLOW_RUN_ID`` win over
    arguments, ``MLFLOW_TRACKING_URI`` says where the server or the files are.

    Args:
        experiment_name: of the experiment: the project.
        logging_dir: where a new experiment keeps its artifacts.
        run_id: a run to go on with.
        tags: of the run; a dict or JSON.
        nested_run: whether the run stands inside of one that is active.
        run_name: of a new run.
        description: of the run.
    """

    name = "mlflow"
    requires_logging_directory = False

    def __init__(
        self,
        experiment_name: str,
        logging_dir: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | str | None = None,
        nested_run: bool = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        said = os.environ
        tags = said.get("MLFLOW_TAGS", tags)
        self.experiment_name = said.get("MLFLOW_EXPERIMENT_NAME", experiment_name)
        self.logging_dir = None if logging_dir is None else os.fspath(logging_dir)
        self.run_id = said.get("MLFLOW_RUN_ID", run_id)
        self.tags: dict[str, Any] | None = json.loads(tags) if isinstance(tags, str) else tags
        self.nested_run = bool(str_to_bool(said.get("MLFLOW_NESTED_RUN", str(nested_run))))
        self.run_name = run_name
        self.description = description
        self._left_out = LeftOut(self.name)

    @on_main_process
    def start(self) -> None:
        """Begin a run, or go on with the one of ``run_id``."""
        mlflow: Any = importlib.import_module("mlflow")
        experiment = mlflow.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            experiment_id = mlflow.create_experiment(self.experiment_name, artifact_location=self.logging_dir)
        else:
            experiment_id = experiment.experiment_id
        self._mlflow = mlflow
        self.active_run: Any = mlflow.start_run(
            run_id=self.run_id,
            experiment_id=experiment_id,
            run_name=self.run_name,
            nested=self.nested_run,
            tags=self.tags,
            description=self.description,
        )

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.active_run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log parameters, flat; one that is too long for MLflow is left out."""
        settings = list(flat(values).items())
        for name, value in settings:
            if len(str(value)) > MLFLOW_SETTING_CHARACTERS:
                self._left_out.tell(name, value, f"a parameter of at most {MLFLOW_SETTING_CHARACTERS} characters")
        held = [(name, value) for name, value in settings if len(str(value)) <= MLFLOW_SETTING_CHARACTERS]
        for begin in range(0, len(held), MLFLOW_SETTINGS_AT_ONCE):
            self._mlflow.log_params(dict(held[begin : begin + MLFLOW_SETTINGS_AT_ONCE]))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers, flat."""
        numbers = {}
        for name, value in flat(values).items():
            if _is_number(value):
                numbers[name] = value
            else:
                self._left_out.tell(name, value, "a number")
        self._mlflow.log_metrics(numbers, step=step, **kwargs)

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """Keep a figure of Matplotlib's or Plotly's as the artifact ``artifact_file``."""
        self._mlflow.log_figure(figure=figure, artifact_file=artifact_file, **save_kwargs)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """Keep a file, under the directory ``artifact_path`` of the run's artifacts."""
        self._mlflow.log_artifact(local_path=local_path, artifact_path=artifact_path)

    @on_main_process
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Keep all files of a directory, under the directory ``artifact_path`` of the run's artifacts."""
        self._mlflow.log_artifacts(local_dir=local_dir, artifact_path=artifact_path)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def _is_number(value: Any) -> bool:
    return isinstance(value, SCALARS) and not isinstance(value, str)


def _stacked(images: list[Any] | tuple[Any, ...]) -> Any:
    """One array of images of one size: grey H x W ones get a channel.  # [N, H, W, C]"""
    arrays = [np.asarray(image) for image in images]
    return np.stack([array[:, :, None] if array.ndim == 2 else array for array in arrays])
