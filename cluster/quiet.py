"""Silence Ray's own log output: all switches in one place.

The silenced messages would bury ours or warn about problems that cannot occur here. To see one again, set its
environment variable from `_SWITCHES` yourself.
"""

from __future__ import annotations

import logging
import os

_LEVELS = {
    # Reports at each start that Ray uses a token; cluster/README.md explains this.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    # Ray Train's controller reports each worker group it starts.
    "ray.train": logging.WARNING,
    # The traceback of each failed worker: the command reports the reason in one line, and all of it with -v.
    "ray.train.v2._internal.util": logging.CRITICAL,
    # Watches its driver through the dashboard, and warns every second if there is none.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    # Requests nodes, which a local Ray cannot add, and warns with a traceback if a busy machine takes more
    # than five seconds to answer.
    "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client": logging.ERROR,
    # Ray Tune warns about missing result files, which are turned off: results are in the study's folder and
    # in MLflow.
    "ray.tune": logging.ERROR,
    # Ray Data logs each epoch of each rank.
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
    # Warns that reading might hang when all CPUs are taken; the jobs check that the workers leave one free.
    "ray.data._internal.execution.resource_manager": logging.ERROR,
}
_SWITCHES = {
    # Ray Train's logs of each report, rank and dataset.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The worker's name and process id before each line it prints; read when Ray is imported.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # Ray Tune's tables of trials, and its result files.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def quiet() -> None:
    """Silence Ray in this process and the processes it starts. Can be called more than once."""
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)


def quiet_data() -> None:
    """Also silence Ray Data, in a process that reads streams of cells."""
    # Importing Ray Data resets its loggers, so set them afterwards.
    from ray.data import DataContext

    quiet()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    # Read tasks limit their own memory, and their number is limited too, so turn off the warning every 30 s
    # that they request no memory.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
