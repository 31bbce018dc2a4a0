"""How many workers a training starts on a real Ray of four CPUs, when it takes more, and when it gives up."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from jobs.training import elastic
from jobs.training.elastic import FittingWorkers, NodesMissingError, reserved_cpus
from jobs.training.stopping import StopWatch

pytestmark = pytest.mark.usefixtures("ray_local")


class _Workers(FittingWorkers):
    def _maybe_send_resource_request(self) -> None:
        """Ask no autoscaler."""


def _workers(sizes: list[int], *, patience_s: float = 60) -> FittingWorkers:
    scaling = ray.train.ScalingConfig(num_workers=max(sizes), resources_per_worker={"CPU": reserved_cpus(1)})
    return _Workers(scaling, sizes=sizes, cpus_per_worker=1, save_flag="test-save", patience_s=patience_s)


def _status(*, saved: bool) -> Any:
    report = SimpleNamespace(checkpoint="checkpoint") if saved else None
    return SimpleNamespace(worker_statuses={0: SimpleNamespace(training_report=report)})


@pytest.mark.parametrize(("sizes", "expected"), [([1, 2, 4, 8], 4), ([1, 3], 3), ([2], 2)])
def test_the_largest_allowed_number_that_fits_is_started(sizes: list[int], expected: int) -> None:
    decision = _workers(sizes).make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision) and decision.num_workers == expected


def test_it_gives_up_in_time() -> None:
    workers = _workers([8], patience_s=1.5)
    ends_s = time.monotonic() + 60
    with pytest.raises(ray.train.ControllerError) as missing:
        while time.monotonic() < ends_s:
            assert isinstance(workers.make_decision_for_non_running_worker_group(), NoopDecision)
    error = missing.value.controller_failure
    assert isinstance(error, NodesMissingError) and error.args == (8,)


def test_more_workers_start_from_a_new_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "LOOK_EVERY_S", 0)
    workers, watch = _workers([1, 2, 4]), StopWatch("test", every_s=0)
    running = SimpleNamespace(num_workers=1)
    try:
        # A checkpoint that nobody asked for may be old by now.
        decision = workers.make_decision_for_running_worker_group(running, _status(saved=True))
        assert isinstance(decision, NoopDecision)
        ends_s = time.monotonic() + 60
        while not watch.checkpoint_due():
            assert time.monotonic() < ends_s
            time.sleep(0.05)
        watch.saved()
        assert not watch.checkpoint_due() and not watch.stop_asked()
        decision = workers.make_decision_for_running_worker_group(running, _status(saved=False))
        assert isinstance(decision, NoopDecision)
        decision = workers.make_decision_for_running_worker_group(running, _status(saved=True))
        assert isinstance(decision, ResizeDecision) and decision.num_workers == 4
    finally:
        watch.end()
    full = SimpleNamespace(num_workers=4)
    decision = workers.make_decision_for_running_worker_group(full, _status(saved=True))
    assert isinstance(decision, NoopDecision)
