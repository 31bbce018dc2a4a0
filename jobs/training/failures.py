"""Worker failures: whether to retry them, and how to report them.

Ray Train's controller imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import ray.train
from ray.exceptions import OutOfMemoryError, RayError

from jobs.training.elastic import NodesMissingError
from screformer.storage import StorageError

if TYPE_CHECKING:
    from screformer.config import ExperimentConfig

_NODE_MEMORY = re.compile(r"IP: ([^,)]+).*?was (\S+) used / (\S+) limit", re.DOTALL)


class GiveUp(ray.train.UserCallback):
    """Ends a training at once if another attempt would fail in the same way.

    Ray Train alone would retry it `cluster.max_failures` times.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, which does not retry after an error in a callback."""
        for error in worker_exceptions.values():
            if isinstance(error, StorageError) or type(error) is ValueError:
                raise ray.train.ControllerError(error)


def explained(
    error: ray.train.TrainingFailedError | RayError, config: ExperimentConfig, run_dir: str
) -> ValueError | OSError | RuntimeError:
    """Explain in one line why Ray Train gave up and how to resume the run.

    Args:
        error: The error raised by Ray Train, or by Ray if Ray Train's own process was lost.
        config: The run's settings.
        run_dir: The run's folder.

    Returns:
        The error for the command to raise. The user can fix a ValueError or StorageError; other errors may
        not occur again.
    """
    resume = f"resume with --resume {run_dir}"
    if isinstance(error, RayError):
        who = "the process that controls the workers"
        return RuntimeError(
            _memory(who, error, config, resume) or f"{who} was lost: something killed it; {resume}"
        )
    if not isinstance(error, ray.train.WorkerGroupError):
        inner = getattr(error, "controller_failure", error)
        if isinstance(inner, StorageError) or type(inner) is ValueError:
            return inner
        if isinstance(inner, NodesMissingError):
            cluster = config.cluster
            return RuntimeError(
                f"{inner.args[0]} workers of {cluster.cpus_per_worker:g} CPUs could not be started within"
                f" cluster.wait_for_nodes_minutes={cluster.wait_for_nodes_minutes:g}; nodes are missing or"
                f" busy; add nodes or wait, then {resume}, or with fewer workers: cluster.num_workers=..."
            )
        return RuntimeError(f"Ray Train failed ({_first_line(inner)}); {resume}")
    rank, cause = _root(error.worker_failures)
    who = f"rank {rank}" if _is_gpu_memory(cause) else f"rank {rank} or a task that reads cells for it"
    what = _memory(who, cause, config, resume)
    if not what:
        lost = isinstance(cause, RayError)
        how = (
            "was lost: its node is gone, or something killed it, such as the kernel when memory runs out"
            if lost
            else f"failed: {type(cause).__name__}: {_first_line(cause)}"
        )
        what = f"rank {rank} {how}; {resume}"
    attempts = config.cluster.max_failures + 1
    return RuntimeError(what if attempts == 1 else f"{attempts} attempts failed; in the last, {what}")


def _memory(who: str, cause: Exception, config: ExperimentConfig, resume: str) -> str:
    """The message if memory ran out; else empty."""
    size = config.train.micro_batch_size
    smaller = (
        f"train.micro_batch_size={size // 2}"
        if size % 2 == 0
        else f"cluster.cpus_per_worker={2 * config.cluster.cpus_per_worker:g}"
    )
    if _is_gpu_memory(cause):
        return (
            f"{who} ran out of GPU memory; {resume} {smaller}, or with a higher zero.stage (now"
            f" {config.zero.stage})"
        )
    if not isinstance(cause, OutOfMemoryError | MemoryError):
        return ""
    found = _NODE_MEMORY.search(str(cause))
    node = f"node {found[1]} ran out of memory ({found[2]} of {found[3]} used)" if found else "memory ran out"
    killed = f"{who} was killed because {node}; {resume}"
    if config.cluster.num_workers > 1 or config.train.micro_batch_size > 1:
        return f"{killed} {smaller}, or spread the workers over more nodes"
    return f"{killed} with more memory"


def _is_gpu_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError" and isinstance(error, RuntimeError)  # PyTorch's


def _root(failures: dict[int, Exception]) -> tuple[int, Exception]:
    """The failure that caused the others, and its rank."""
    causes = {rank: _cause(error) for rank, error in sorted(failures.items())}

    def order(rank: int) -> int:
        cause = causes[rank]
        if isinstance(cause, OutOfMemoryError | MemoryError) or _is_gpu_memory(cause):
            return 0
        # When one rank ends, the collective operations of the others fail with a RuntimeError.
        return 1 if type(cause) is not RuntimeError else 2

    first = min(causes, key=order)
    return first, causes[first]


def _cause(error: Exception) -> Exception:
    """The original exception inside Ray's wrappers."""
    inner = getattr(error, "health_check_failure", None) or getattr(error, "cause", None)
    return _cause(inner) if isinstance(inner, Exception) and inner is not error else error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
