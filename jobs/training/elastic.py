"""Match the number of workers to the nodes that are there: fewer after a loss, more when a node comes back.

Ray Train's controller imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

from jobs.training.stopping import lower_flag, raise_flag

START_TIMEOUT_S = 15
"""How long workers wait for their places before the nodes are counted again. Ray takes about this long to
notice that a node is gone."""
LOOK_EVERY_S = 10.0
"""How often to look for room for more workers."""
_SPARE_CPUS = 0.02


def reserved_cpus(cpus_per_worker: float) -> float:
    """CPUs that Ray reserves for a worker: slightly less than it uses.

    Tasks that read cells reserve almost nothing, but could never start on a node without any free CPU.
    """
    return cpus_per_worker - min(_SPARE_CPUS, cpus_per_worker / 10)


def places(nodes: Iterable[Mapping[str, float]], cpus_per_worker: float, *, use_gpu: bool) -> int:
    """How many workers fit on nodes with these resources."""
    spare = cpus_per_worker - reserved_cpus(cpus_per_worker)
    return sum(
        min(
            int((node.get("CPU", 0) + spare) / cpus_per_worker + 1e-6),
            int(node.get("GPU", 0)) if use_gpu else sys.maxsize,
        )
        for node in nodes
    )


class NodesMissingError(RuntimeError):
    """No workers could be started for too long; its argument is how many were needed."""


class FittingWorkers(ScalingPolicy):
    """Ray Train's decision how many workers to start.

    Workers are started as soon as an allowed number fits. When more fit later, rank 0 is asked for a
    checkpoint, and all start again from it, so that nothing is lost.
    """

    def __init__(
        self,
        scaling_config: ray.train.ScalingConfig,
        *,
        sizes: Sequence[int],
        cpus_per_worker: float,
        save_flag: str,
        patience_s: float,
    ) -> None:
        """Make no decision yet.

        Args:
            scaling_config: Resources of a worker, and the largest number of workers.
            sizes: Allowed numbers of workers.
            cpus_per_worker: CPUs a worker uses.
            save_flag: Name of the flag that asks rank 0 for a checkpoint.
            patience_s: How long to try to start workers.
        """
        super().__init__(scaling_config)
        self._sizes = sorted(sizes, reverse=True)
        self._cpus, self._save_flag, self._patience_s = cpus_per_worker, save_flag, patience_s
        self._idle_since: float | None = None
        self._start_failed = False
        self._looked_s = 0.0
        self._asked: Any = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as many workers as fit; called at the start, after a loss, and after a start that failed.

        Raises:
            ControllerError: It was called for longer than `patience_s`.
        """
        self._maybe_send_resource_request()
        self._lower()
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since > self._patience_s:
            raise ray.train.ControllerError(NodesMissingError(self._sizes[-1]))
        # The places of workers that were just lost may not be free yet. Only if a start fails, somebody else
        # uses some.
        size = self._fitting(self._free() if self._start_failed else self._all())
        if size is None:
            time.sleep(1)
            return NoopDecision()
        self._start_failed = True
        return self._resize(size)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Start again with more workers if they fit and there is a new checkpoint."""
        self._maybe_send_resource_request()
        self._idle_since, self._start_failed = None, False
        now, current = time.monotonic(), worker_group_state.num_workers
        reports = [status.training_report for status in worker_group_status.worker_statuses.values()]
        saved = any(report is not None and report.checkpoint is not None for report in reports)
        if current == self._sizes[0]:
            return NoopDecision()
        if self._asked is None and now - self._looked_s > LOOK_EVERY_S:
            self._looked_s = now
            if (self._fitting(current + self._free()) or 0) > current:
                self._asked = raise_flag(self._save_flag)
        elif self._asked is not None and saved:
            self._lower()
            size = self._fitting(current + self._free()) or 0
            if size > current:
                return self._resize(size)
        return NoopDecision()

    def _get_num_workers_for_resource_request(self) -> int:
        """What Ray's autoscaler is asked for."""
        return self._sizes[0]

    def _lower(self) -> None:
        lower_flag(self._asked)
        self._asked = None

    def _resize(self, size: int) -> ResizeDecision:
        return ResizeDecision(
            num_workers=size, resources_per_worker=self.scaling_config._resources_per_worker_not_none
        )

    def _fitting(self, room: int) -> int | None:
        return next((size for size in self._sizes if size <= room), None)

    def _all(self) -> int:
        return self._places(node["Resources"] for node in ray.nodes() if node["Alive"])

    def _free(self) -> int:
        return self._places(ray._private.state.available_resources_per_node().values())

    def _places(self, nodes: Iterable[Mapping[str, float]]) -> int:
        return places(nodes, self._cpus, use_gpu=bool(self.scaling_config.use_gpu))
