"""What is wrong with a node is named with the way to fix it."""

import dataclasses

from jobs.checkup.nodes import (
    Node,
    gpu_faults,
    look,
    storage_faults,
    tracking_faults,
    version_faults,
    versions_here,
)

NODE = Node(
    name="a",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    gpus=0,
    ray_gpus=0,
    torch_cuda=False,
    storage="",
    tracking="",
)


def changed(**values: object) -> Node:
    return dataclasses.replace(NODE, name="b", **values)  # type: ignore[arg-type]


def test_versions_are_compared_with_this_process() -> None:
    here = dict(NODE.versions)
    older = changed(versions={"python": "3.11.7", "torch": "2.12.0"})
    assert version_faults([NODE], here) == []
    assert version_faults([NODE, older, changed(versions={"python": "3.11.7"})], here) == [
        "node b has torch 2.12.0, this process 2.13.0; install the same environment on all nodes",
        "node b has torch None, this process 2.13.0; install the same environment on all nodes",
    ]


def test_gpus_that_ray_or_torch_does_not_see() -> None:
    assert gpu_faults([NODE, changed(gpus=2, ray_gpus=2, torch_cuda=True)]) == []
    first, second = gpu_faults([changed(gpus=2, ray_gpus=0)])
    assert "node b has 2 GPUs, but Ray counts 0; start Ray there with --num-gpus=2" in first
    assert "PyTorch is built for CPUs; install the CUDA build of torch" in second


def test_a_storage_that_is_not_shared_or_not_writable() -> None:
    assert storage_faults([NODE, changed()], "/runs", ["node-a", "node-b", "atlas"]) == []
    assert storage_faults([NODE, changed(), changed(storage="Read-only")], "/runs", ["node-a"]) == [
        "node b writes to a /runs of its own",
        "node b cannot write to /runs: Read-only",
    ]


def test_a_node_looks_at_itself(tmp_path: object) -> None:
    found = look(str(tmp_path), f"sqlite:///{tmp_path}/elsewhere.db", 0.0)
    assert found.versions == versions_here() and found.storage == "" and found.gpus == 0
    (fault,) = tracking_faults([found])
    assert "is a file that this node does not have; set tracking.uri to an MLflow server" in fault
