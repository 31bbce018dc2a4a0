"""Messages when Ray Train gives up, and errors that it does not retry."""

import pickle

import pytest
import ray.train
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from jobs.training.elastic import NodesMissingError
from jobs.training.failures import GiveUp, explained
from screformer.config import ExperimentConfig
from screformer.storage import StorageError

CONFIG = ExperimentConfig().merge({"cluster.num_workers": 2, "train.micro_batch_size": 8})
KILLED = OutOfMemoryError(
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID:"
    " 1b6e) was 30.64GB used / 31.54GB limit (0.971)\nOOM kill reason: ..."
)
FULL = StorageError("/runs/a cannot be written: no space is left; free some space, then resume")
FOLLOWS = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")


def _said(failures: dict[int, Exception], config: ExperimentConfig = CONFIG) -> str:
    error = ray.train.WorkerGroupError("a long text\nwith a traceback", failures)
    found = explained(error, config, "/runs/a")
    assert type(found) is RuntimeError and "\n" not in str(found)
    return str(found)


def test_memory_is_named_with_the_setting_to_change() -> None:
    for error in (KILLED, WorkerHealthCheckFailedError("a worker died", KILLED)):
        assert _said({0: FOLLOWS, 1: error}) == (
            "3 attempts failed; in the last, rank 1 or a task that reads cells for it was killed because node"
            " 10.0.0.7 ran out of memory (30.64GB of 31.54GB used); resume with --resume /runs/a"
            " train.micro_batch_size=4, or spread the workers over more nodes"
        )
    assert "rank 0 ran out of GPU memory; resume with --resume /runs/a train.micro_batch_size=4" in _said(
        {0: torch.OutOfMemoryError("CUDA out of memory")}
    )
    odd = CONFIG.merge({"train.micro_batch_size": 1, "train.global_batch_size": 6})
    assert "--resume /runs/a cluster.cpus_per_worker=2" in _said({0: KILLED}, odd)


def test_a_lost_controller_is_reported() -> None:
    """Ray may kill it together with the worker, because both have a process that takes memory."""
    assert str(explained(KILLED, CONFIG, "/runs/a")).startswith(
        "the process that controls the workers was killed because node 10.0.0.7 ran out of memory"
    )
    assert str(explained(ActorDiedError(), CONFIG, "/runs/a")) == (
        "the process that controls the workers was lost: something killed it; resume with --resume /runs/a"
    )


def test_a_lost_worker_and_an_error_are_told_apart_from_what_follows() -> None:
    lost = WorkerHealthCheckFailedError("a worker died", ActorDiedError())
    assert "rank 1 was lost: its node is gone, or something killed it" in _said({0: FOLLOWS, 1: lost})
    once = CONFIG.merge({"cluster.max_failures": 0})
    assert _said({0: FOLLOWS, 1: KeyError("x")}, once) == (
        "rank 1 failed: KeyError: 'x'; resume with --resume /runs/a"
    )


def test_workers_that_never_start_are_reported_with_the_wait() -> None:
    error = pickle.loads(pickle.dumps(ray.train.ControllerError(NodesMissingError(1))))
    assert str(explained(error, CONFIG, "/runs/a")) == (
        "1 workers of 1 CPUs could not be started within cluster.wait_for_nodes_minutes=20; nodes are missing"
        " or busy; add nodes or wait, then resume with --resume /runs/a, or with fewer workers:"
        " cluster.num_workers=..."
    )


@pytest.mark.parametrize("error", [FULL, ValueError("a node does not see the folder")])
def test_what_only_the_user_can_mend_is_not_tried_again(error: Exception) -> None:
    with pytest.raises(ray.train.ControllerError) as given_up:
        GiveUp().after_exception(None, {0: FOLLOWS, 1: error})
    travelled = pickle.loads(pickle.dumps(given_up.value))
    found = explained(travelled, CONFIG, "/runs/a")
    assert type(found) is type(error) and str(found) == str(error)


def test_what_may_not_happen_again_is_tried_again() -> None:
    GiveUp().after_exception(None, {0: FOLLOWS, 1: KILLED, 2: OSError("AWS Error SLOW_DOWN")})
