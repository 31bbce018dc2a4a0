"""Silence what Ray says about itself: every switch in one place.

What is switched off would bury our own lines, or describes something that cannot go wrong here. Set an
environment variable of `_SWITCHES` yourself to see it again.
"""

from __future__ import annotations

import logging
import os

_LEVELS = {
    # On each start, that Ray authenticates; cluster/README.md says so to those who submit jobs.
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    # Ray Train's controller reports each worker group it starts.
    "ray.train": logging.WARNING,
    # It watches its driver through the dashboard, and without one warns every second.
    "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    # It asks for nodes, which a local Ray cannot add, and warns with a traceback when a busy machine takes
    # more than five seconds to answer.
    "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client": logging.ERROR,
    # Ray Tune misses the result files that are turned off: results are in the study's folder and in MLflow.
    "ray.tune": logging.ERROR,
    # Ray Data writes lines for each epoch of each rank.
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
    # It warns that reading might wait for ever when all CPUs are taken; the jobs have checked that the
    # workers leave one for it.
    "ray.data._internal.execution.resource_manager": logging.ERROR,
}
_SWITCHES = {
    # Ray Train's own account of each report, rank and dataset.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The name and process of the worker before each line it prints; read when Ray is imported.
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # Ray Tune's tables of trials, and its result files.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def quiet() -> None:
    """Silence Ray in this process and in those that it starts. May be called again."""
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)


def quiet_data() -> None:
    """Silence Ray Data too, in a process that reads streams of cells."""
    # Importing Ray Data resets its loggers, so they are set afterwards.
    from ray.data import DataContext

    quiet()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    # A read task bounds its memory itself, and their number is bounded too: no warning every 30 s that a task
    # asks for no memory.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
