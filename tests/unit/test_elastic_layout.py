"""How many workers fit on which nodes, and which numbers of workers a run may have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.training.elastic import places, reserved_cpus
from screformer.config import ExperimentConfig


@given(cpus_per_worker=st.sampled_from([0.25, 0.5, 1, 1.5, 2, 4, 16]), nodes=st.lists(st.integers(0, 128)))
def test_workers_fill_whole_nodes_and_leave_room_for_readers(
    cpus_per_worker: float, nodes: list[int]
) -> None:
    expected = sum(int(cpus / cpus_per_worker) for cpus in nodes)
    assert places([{"CPU": cpus} for cpus in nodes], cpus_per_worker, use_gpu=False) == expected
    for cpus in nodes:
        fitting = places([{"CPU": cpus}], cpus_per_worker, use_gpu=False)
        left = cpus - fitting * reserved_cpus(cpus_per_worker)
        assert left >= 0.02 * min(fitting, 1) - 1e-9, "ten tasks of 0.001 CPUs can start"


def test_readers_of_other_nodes_take_no_place() -> None:
    assert places([{"CPU": 1.984}], 1, use_gpu=False) == 2
    assert places([{"CPU": 8, "GPU": 2}, {"CPU": 8}], 1, use_gpu=True) == 2


@pytest.mark.parametrize(
    ("least", "most", "expected"), [(1, 4, [1, 2, 4]), (2, 4, [2, 4]), (4, 4, [4]), (1, 8, [1, 2, 4, 8])]
)
def test_fewer_workers_keep_the_global_batch(least: int, most: int, expected: list[int]) -> None:
    settings = {"train.global_batch_size": 64, "train.micro_batch_size": 8}
    config = ExperimentConfig().merge({**settings, "cluster.num_workers": most, "cluster.min_workers": least})
    assert config.worker_counts() == expected
    for count in expected:
        assert config.grad_accum_steps(count) * count * 8 == 64


@pytest.mark.parametrize("least", [0, 3])
def test_the_fewest_workers_are_checked(least: int) -> None:
    with pytest.raises(ValueError, match="cluster.min_workers=. must be at least 1 and at most num_workers"):
        ExperimentConfig().merge({"cluster.num_workers": 2, "cluster.min_workers": least})
