"""Nothing that a run leaves behind contains a secret of its environment."""

from pathlib import Path

import pytest
import ray

from helpers.local_ray import ONE_READER
from helpers.processes import REPO_ROOT, run_here
from helpers.servers import mlflow_server
from jobs import finetune, report

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "s3-secret-wJalrXUtnFEMI",
    "AWS_SESSION_TOKEN": "session-token-FwoGZXIvYXdz",
}
PASSWORD = "tracking-password-9f8e7d"


@pytest.mark.timeout(600)
def test_no_file_and_no_line_of_a_run_holds_a_secret(
    small_atlas: str, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so both are restored
        monkeypatch.delenv(name)
    (tmp_path / "server").mkdir()
    (tmp_path / "run").mkdir()
    with mlflow_server(tmp_path / "server") as server:
        address = server.url.replace("http://", f"http://me:{PASSWORD}@")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        smoke = str(REPO_ROOT / "jobs" / "recipes" / "smoke.yaml")
        words = ["--config", smoke, f"atlas.uri={small_atlas}", *ONE_READER]
        result, printed = run_here(finetune.main, *words, cwd=tmp_path / "run")
        assert result["model_version"] is not None
        run_here(report.main, "--run", result["run_id"], cwd=tmp_path / "run")
        server.stop()
        _, failed = run_here(finetune.main, *words, cwd=tmp_path / "run", status=1)
        assert "does not answer" in failed

    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    searched = [path for folder in (tmp_path, logs) for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in searched}
    assert {"run.json", "config.yaml", "server.db", "MODEL_CARD.md", "meta.json"} <= names
    assert any(name.startswith("report") and name.endswith(".html") for name in names)
    for secret in (*SECRETS.values(), PASSWORD):
        assert secret not in printed and secret not in failed
        assert not [str(path) for path in searched if secret.encode() in path.read_bytes()], secret
