"""What each node of the cluster looks like from inside, and what is wrong with it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.tracking.client import probe, sqlite_path
from jobs.tracking.identity import code_identity
from jobs.training.run_folder import write_json

ANSWER_S = 120.0
"""How long a node may take to answer: its first process imports our packages."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node found on itself."""

    name: str
    versions: dict[str, str]
    """Python and packages."""
    gpus: int
    """GPUs that the driver of NVIDIA lists."""
    ray_gpus: float
    """GPUs that Ray counts there."""
    torch_cuda: bool
    """Whether PyTorch is built for GPUs."""
    storage: str
    """Why it cannot write to the storage; empty if it can."""
    tracking: str
    """Why it does not reach the tracking store; empty if it does."""


def look_at_nodes(storage: str, tracking_uri: str) -> tuple[list[Node], list[str]]:
    """Ask each node that is alive; Ray must be running.

    Args:
        storage: Folder or URI into which each node writes `node-NAME`.
        tracking_uri: The tracking store.

    Returns:
        The nodes that answered, and what is wrong with the others.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    calls = {}
    for node in alive:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(look)
        calls[task.remote(storage, tracking_uri, node["Resources"].get("GPU", 0.0))] = node
    ray.wait(list(calls), num_returns=len(calls), timeout=ANSWER_S)
    found, faults = [], []
    for call, node in calls.items():
        try:
            found.append(ray.get(call, timeout=0))
        except ray.exceptions.GetTimeoutError:
            faults.append(
                f"node {node['NodeManagerHostname']} did not answer in {ANSWER_S:.0f} s; restart Ray there"
            )
        except ray.exceptions.RayError as error:
            text = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            faults.append(
                f"node {node['NodeManagerHostname']} cannot run our code: {text}; install the same"
                f" environment there"
            )
    return found, faults


def look(storage: str, tracking_uri: str, ray_gpus: float) -> Node:
    """What this node looks like; the body of a Ray task."""
    import torch

    identity, name = code_identity(), platform.node()
    return Node(
        name=name,
        versions={
            "python": identity["python"],
            "screformer": identity["screformer"],
            **identity["packages"],
        },
        gpus=_gpus(),
        ray_gpus=ray_gpus,
        torch_cuda=torch.version.cuda is not None,
        storage=_storage_fault(storage, f"node-{name}"),
        tracking=_tracking_fault(tracking_uri),
    )


def version_faults(nodes: Sequence[Node], here: dict[str, str]) -> list[str]:
    """Packages with other versions than in this process."""
    return [
        f"node {node.name} has {package} {node.versions.get(package)}, this process {version}; install the"
        f" same environment on all nodes"
        for node in nodes
        for package, version in here.items()
        if node.versions.get(package) != version
    ]


def gpu_faults(nodes: Sequence[Node]) -> list[str]:
    """GPUs that Ray or PyTorch does not see."""
    faults = []
    for node in nodes:
        if node.gpus != node.ray_gpus:
            faults.append(
                f"node {node.name} has {node.gpus} GPUs, but Ray counts {node.ray_gpus:g}; start Ray there"
                f" with --num-gpus={node.gpus}, and check CUDA_VISIBLE_DEVICES and the container's access"
                f" to GPUs"
            )
        if node.gpus and not node.torch_cuda:
            faults.append(
                f"node {node.name} has GPUs, but its PyTorch is built for CPUs; install the CUDA build of"
                f" torch"
            )
    return faults


def storage_faults(nodes: Sequence[Node], storage: str, seen: Sequence[str]) -> list[str]:
    """Nodes that cannot write, or write to another place than the one that this process sees.

    Args:
        nodes: The nodes.
        storage: Folder or URI that they wrote to.
        seen: Names of the files that this process sees there.
    """
    return [
        f"node {node.name} cannot write to {storage}: {node.storage}"
        if node.storage
        else f"node {node.name} writes to a {storage} of its own"
        for node in nodes
        if node.storage or f"node-{node.name}" not in seen
    ]


def tracking_faults(nodes: Sequence[Node]) -> list[str]:
    """Nodes that do not reach the tracking store."""
    return [f"node {node.name}: {node.tracking}" for node in nodes if node.tracking]


def _gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _storage_fault(storage: str, name: str) -> str:
    try:
        write_json(storage, name, {})
    except OSError as error:
        return str(error)
    return ""


def _tracking_fault(uri: str) -> str:
    if uri.startswith("sqlite:") and not sqlite_path(uri).is_file():
        return f"{uri} is a file that this node does not have; set tracking.uri to an MLflow server"
    try:
        probe(uri)
    except ConnectionError as error:
        return str(error)
    return ""


def versions_here() -> dict[str, str]:
    """Python and packages of this process."""
    identity: dict[str, Any] = code_identity()
    return {"python": identity["python"], "screformer": identity["screformer"], **identity["packages"]}
