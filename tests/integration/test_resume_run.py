"""A training run on S3 from its first stop to its registered model, with its cells in a shard cache.

SIGTERM, a damaged checkpoint, two resumes at once, a kill after the last checkpoint, and a resume of a
finished run."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import ray

from helpers.local_ray import ONE_READER
from helpers.processes import REPO_ROOT, environment, kill_tree, read_until, run_here, start_python
from helpers.servers import S3
from jobs import finetune, shard
from jobs.training import stopping

pytestmark = pytest.mark.timeout(1200)
SMOKE = str(REPO_ROOT / "jobs" / "recipes" / "smoke.yaml")


class Run(NamedTuple):
    """A run folder on S3, and how to reach it."""

    uri: str
    folder: Path
    environment: dict[str, str]
    bucket: Any

    def start(self, *words: str) -> subprocess.Popen[str]:
        return start_python(
            "-m",
            "jobs.finetune",
            *words,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def resume(self, *words: str, status: int = 0) -> tuple[dict[str, Any], str]:
        """Resume in this process; for runs with nothing left to train, and refusals."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", self.environment["AWS_ENDPOINT_URL"])
            return run_here(finetune.main, "--resume", self.uri, *words, cwd=self.folder, status=status)

    def steps(self) -> list[int]:
        """The steps of its checkpoints, oldest first."""
        found = [json.loads(item.get()["Body"].read()) for item in self.objects("position.json")]
        return [position["global_step"] for position in found]

    def objects(self, part: str) -> list[Any]:
        return sorted(
            (found for found in self.bucket.objects.all() if part in found.key), key=lambda found: found.key
        )


def _client() -> Any:
    from mlflow import MlflowClient

    uri = os.environ["MLFLOW_TRACKING_URI"]
    return MlflowClient(uri, registry_uri=uri)


@pytest.fixture(scope="module")
def stopped(
    s3: S3, small_atlas: str, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Run, str]]:
    """A run that got SIGTERM (like from `ray job stop`) between two evaluations, and what it printed last."""
    variables = environment(AWS_ENDPOINT_URL=s3.endpoint)
    bucket = boto3.resource("s3", endpoint_url=s3.endpoint).Bucket(s3.bucket)
    folder = tmp_path_factory.mktemp("resume-run")
    run = Run("", folder, variables, bucket)
    cache = f"{s3.uri}/run-cells?scheme=http&endpoint_override={s3.endpoint.removeprefix('http://')}"
    run_here(shard.main, "--config", SMOKE, f"atlas.uri={small_atlas}", "--out", cache, cwd=folder)
    process = run.start(
        "--config",
        SMOKE,
        f"atlas.uri={small_atlas}",
        f"cluster.storage_path={s3.uri}/runs",
        f"stream.cache={cache}",
        *ONE_READER,
        "tracking.model_name=resumed",
        "train.max_steps=150",
        "train.eval_every_steps=25",
        "train.log_every_steps=10",
    )
    try:
        uri = read_until(process, r"--resume (s3://\S+)\)")[1]
        read_until(process, r"step +30/150")
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 130, printed
        yield run._replace(uri=uri), printed
    finally:
        if process.poll() is None:
            kill_tree(process)


def test_sigterm_saves_a_checkpoint_and_prints_how_to_resume(stopped: tuple[Run, str]) -> None:
    run, printed = stopped
    assert re.search(
        rf"interrupted; saved a checkpoint at step \d+; resume with --resume {run.uri}\n", printed
    )
    assert "Traceback" not in printed and "Fatal Python error" not in printed
    assert run.steps()[-1] >= 30 and run.steps()[-1] not in (150, run.steps()[-2])
    saved = json.loads(run.objects("run.json")[0].get()["Body"].read())
    assert _client().get_run(saved["run"]["run_id"]).info.status == "KILLED"


def test_a_stop_that_no_worker_answers_ends_in_time(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver waits for Ray, and nobody saves a checkpoint: nodes are missing, or readers are stuck."""
    monkeypatch.setattr(stopping, "STOP_WITHIN_S", 1)
    before = signal.getsignal(signal.SIGTERM)
    waits = ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt) as stopped, stopping.stop_on_signals("nobody-looks"):
        ray.get(waits)
    assert stopped.value.__notes__ == ["no checkpoint could be saved within 1 s, so the last one counts"]
    assert signal.getsignal(signal.SIGTERM) == before and signal.alarm(0) == 0
    ray.cancel(waits, force=True)


@pytest.fixture(scope="module")
def finished(stopped: tuple[Run, str]) -> tuple[dict[str, Any], str]:
    """The run resumed to its end, with the newest checkpoint damaged and another resume in between."""
    run, _ = stopped
    before = run.steps()[-2]
    shard = run.objects("training_state.safetensors")[-1]
    content = bytearray(shard.get()["Body"].read())
    content[-1] ^= 1
    shard.put(Body=bytes(content))
    assert "now without a shard cache; the order" in run.resume("stream.cache=''", status=2)[1]
    process = run.start("--resume", run.uri, "train.max_steps=60")
    try:
        line = read_until(process, r".* is skipped: training_state.safetensors was changed: .*")[0]
        assert "is being written by process" in run.resume(status=2)[1]
        printed, _ = process.communicate(timeout=500)
        assert process.returncode == 0, printed
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert "checkpoint_" in line and f"resumed after step {before} " in printed
    return json.loads(printed.splitlines()[-1]), printed


def test_a_damaged_checkpoint_is_left_out_and_a_second_resume_is_refused(
    stopped: tuple[Run, str], finished: tuple[dict[str, Any], str]
) -> None:
    result, _ = finished
    assert result["model_version"] == 1 and result["run_dir"] == stopped[0].uri
    assert len(_client().search_model_versions("name='resumed'")) == 1
    assert _client().get_run(result["run_id"]).info.status == "FINISHED"


def test_a_finished_run_is_left_alone(stopped: tuple[Run, str], finished: tuple[dict[str, Any], str]) -> None:
    before = _client().get_run(finished[0]["run_id"]).info
    again, printed = stopped[0].resume()
    assert "is already finished; there is nothing to resume" in printed and again == finished[0]
    after = _client().get_run(finished[0]["run_id"]).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)


def test_what_a_kill_after_the_last_checkpoint_left_undone_is_done(
    stopped: tuple[Run, str], finished: tuple[dict[str, Any], str]
) -> None:
    """As if killed before registration: no version, no result."""
    run, (result, _) = stopped[0], finished
    client = _client()
    client.delete_registered_model("resumed")
    for found in run.objects("result.json"):
        found.delete()
    again, printed = run.resume()
    assert "training had already ended; completing the rest of the run" in printed
    assert "step  10/" not in printed
    assert again["metrics"] == result["metrics"] and again["model_version"] == 1
    assert client.get_run(result["run_id"]).info.status == "FINISHED"


def test_a_nan_ends_the_run_without_a_model(small_atlas: str, ray_local: None, tmp_path: Path) -> None:
    settings = [*ONE_READER, "tracking.model_name=diverged", "train.lr=1e30"]
    words = ["--config", SMOKE, f"atlas.uri={small_atlas}", f"cluster.storage_path={tmp_path}", *settings]
    _, printed = run_here(finetune.main, *words, cwd=tmp_path, status=2)
    assert "Traceback" not in printed
    assert "became NaN or infinite at step" in printed and "lower train.lr=1e+30" in printed
    (found,) = tmp_path.glob("finetune-*/non_finite.json")
    assert json.loads(found.read_text())["joinids"]
    run = json.loads((found.parent / "run.json").read_text())["run"]
    assert _client().get_run(run["run_id"]).info.status == "FAILED"
    assert not _client().search_model_versions("name='diverged'")
