"""Jobs on a real cluster: two raylets on loopback, `ray job submit`, an atlas on S3; and a local Ray."""

import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.processes import REPO_ROOT, end_group, run_python
from helpers.servers import S3, free_ports

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster used only by this test."""

    dashboard: str
    """Where jobs are submitted."""
    environment: dict[str, str]
    """Has the cluster's token."""
    folders: list[str]
    """Session folder of each node."""

    def workers_on(self, node: int) -> int:
        """Ray Train workers of a node, found by their logs; Ray Train identifies nodes only by address."""
        logs = Path(self.folders[node]).glob("session_latest/logs/worker-*.out")
        return sum(":actor_name:RayTrainWorker" in path.read_text() for path in logs)

    def submit(
        self, *entrypoint: str, cwd: Path, environment: dict[str, str] | None = None, timeout_s: float = 480
    ) -> tuple[int, str]:
        """Exit status and output of `ray job submit`, which waits for the job."""
        command = [
            BIN / "ray",
            "job",
            "submit",
            "--address",
            self.dashboard,
            "--working-dir",
            REPO_ROOT,
            "--",
            *entrypoint,
        ]
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return done.returncode, done.stdout


@contextmanager
def node(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """One `ray start --block` in a separate process group, on unused ports."""
    # A raylet dies if its agent does not start within 15 s (ray-project/ray#65983), which may be too short on
    # a busy machine.
    for _ in range(3):
        names = (
            "node-manager",
            "object-manager",
            "runtime-env-agent",
            "dashboard-agent-grpc",
            "dashboard-agent-listen",
            "metrics-export",
        )
        ports = [f"--{name}-port={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
        limits = ["--num-cpus=2", f"--object-store-memory={150 * 2**20}", "--disable-usage-stats"]
        command = [
            BIN / "ray",
            "start",
            "--block",
            *ports,
            "--min-worker-port=0",
            "--max-worker-port=0",
            *limits,
            *arguments,
        ]
        with log.open("w") as out:
            process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            while process.poll() is None and "Ray runtime started" not in log.read_text():
                put_dashboard_last(process.pid)
                time.sleep(0.2)
            if process.poll() is None:
                yield
                return
        finally:
            end_group(process, grace_s=5)  # like a pod; `ray stop` would end every Ray on this machine
    pytest.fail(log.read_text())


def put_dashboard_last(parent: int) -> None:
    """Give the agent, which has only 15 s, priority over the dashboard's eleven processes."""
    with suppress(OSError):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if "dashboard.py" in Path(f"/proc/{child}/cmdline").read_text():
                os.setpriority(os.PRIO_PROCESS, int(child), 10)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two CPUs. They authenticate with a token that is not in the user's home directory."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    gcs, dashboard, client = free_ports(3)
    # Short, because Ray's socket paths are below it and may have at most 107 characters. One per node, as on
    # two machines: with a shared folder, the first node would run a job in the working directory while the
    # second is still unpacking it.
    with ExitStack() as stack:
        folders = [
            stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
            for _ in range(2)
        ]
        head = ["--head", f"--port={gcs}", f"--ray-client-server-port={client}", f"--temp-dir={folders[0]}"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        stack.enter_context(node(head, environment, Path(folders[0]) / "head.log"))
        other = [f"--address=127.0.0.1:{gcs}", f"--temp-dir={folders[1]}"]
        stack.enter_context(node(other, environment, Path(folders[1]) / "node.log"))
        yield Cluster(f"http://127.0.0.1:{dashboard}", environment, folders)


def test_a_job_has_the_packages_and_little_else(cluster: Cluster, tmp_path: Path) -> None:
    program = """if True:
        import pathlib, ray
        from cluster.connect import connect
        connect(); connect()
        files = {str(path): path.stat().st_size for path in pathlib.Path().rglob("*") if path.is_file()}
        print("bytes", sum(files.values()), end=" ")
        print("folders", sorted({name.partition("/")[0] for name in files if "/" in name}))
        @ray.remote
        def where():
            import screformer.config
            return screformer.config.__file__
        print("here", pathlib.Path().resolve(), "nodes", len(ray.nodes()), "task", ray.get(where.remote()))
        raise SystemExit(7)
    """
    status, output = cluster.submit("python", "-c", program, cwd=tmp_path)
    assert status != 0 and "failed" in output.lower(), output  # the job's own status 7 is a failed job
    assert "exit code 7" in output, output
    line = next(line for line in output.splitlines() if line.startswith("bytes"))
    assert int(line.split()[1]) < 4 * 2**20, line  # the bundled model has 1.7 MB
    folders = line.partition("folders ")[2]
    assert "'screformer'" in folders and not any(
        name in folders for name in ("tests", "docs", ".venv", ".git")
    ), line
    here, nodes, task = next(line for line in output.splitlines() if line.startswith("here")).split()[1::2]
    assert "runtime_resources/working_dir_files" in here and nodes == "2"
    assert "runtime_resources/working_dir_files" in task, (
        "a task imports the submitted packages, not those installed here"
    )


def test_submit_without_the_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    stranger = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    status, output = cluster.submit(
        "python", "-c", "print('ran')", cwd=tmp_path, environment={**stranger, "RAY_AUTH_MODE": "disabled"}
    )
    assert status != 0 and "Missing authentication token" in output, output


def test_ingest_and_train_across_both_nodes_from_s3(
    cluster: Cluster, s3: S3, sim_h5ads: list[Path], tmp_path: Path
) -> None:
    atlas = f"{s3.uri}/two-nodes"
    tiledb = [f"{name}={value}" for name, value in s3.tiledb_config.items()]
    ingest = ["python", "-m", "jobs.ingest", "--h5ad", *map(str, sim_h5ads), "--atlas", atlas]
    ingest += ["--tiledb", *tiledb]

    train = ["python", "-m", "jobs.finetune", "--config", "jobs/recipes/smoke.yaml", f"atlas.uri={atlas}"]
    train += [f"atlas.tiledb_config.{text}" for text in tiledb]
    # Two workers of 1.5 CPUs do not fit on a node of 2.
    train += [
        "cluster.num_workers=2",
        "cluster.cpus_per_worker=1.5",
        "cluster.cpus_per_read_task=0.5",
        f"cluster.storage_path={tmp_path}",
    ]
    train += ["train.max_steps=4", "train.eval_every_steps=2"]
    # A third of the cells, in one read task: each task takes seconds to start, and more to read from S3.
    train += ["query.obs_filter=dataset_id == 'sim_blood'", "stream.cells_per_task=512"]
    both = f"{shlex.join(ingest)} && {shlex.join(train)}"
    status, output = cluster.submit("sh", "-c", both, cwd=tmp_path, timeout_s=560)
    assert status == 0 and "added 900 cells" in output, output
    assert [cluster.workers_on(node) for node in (0, 1)] == [1, 1], output
    result = json.loads(next(line for line in output.splitlines() if line.startswith('{"run_id"')))
    assert (
        0 <= result["metrics"]["test/accuracy"] <= 1
        and (Path(result["model_dir"]) / "weights.safetensors").exists()
    )
    assert Path(result["run_dir"]).parent == tmp_path


def test_local_ray_from_any_directory(tmp_path: Path) -> None:
    program = """if True:
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from cluster.connect import connect
        import ray
        connect()
        connect(num_cpus=len(os.sched_getaffinity(0)) + 0.5)  # a second command of one process needs more
        connect()
        @ray.remote
        def worker():
            import logging, screformer.config
            name = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
            return logging.getLogger(name).level == logging.ERROR, screformer.config.__file__
        quiet, path = ray.get(worker.remote())
        found = ray.cluster_resources()
        print("quiet", quiet, "path", path, "more", found["CPU"] - len(os.sched_getaffinity(0)))
        print("store", found["object_store_memory"] <= 2 * 2**30, "inherited", os.environ.get("PYTHONPATH"))
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "PYTHONPATH"
    }
    done = run_python("-c", program, REPO_ROOT, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines() == [
        f"quiet True path {REPO_ROOT / 'screformer' / 'config.py'} more 1.0",
        "store True inherited None",
    ]
    assert "authentication" not in done.stderr, done.stderr
