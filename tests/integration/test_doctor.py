"""The command `doctor` on a cluster that is well, and on one whose storage and tracking server are not."""

from pathlib import Path

import pytest

from helpers.processes import run_here
from helpers.servers import free_port
from jobs import doctor


def test_all_is_well(ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"cluster.storage_path={tmp_path}/runs"]
    assert doctor.main([*words, "cluster.cpus_per_worker=0.5"]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert said.count("ok ") == 9 and "ok     a short training (" in said and "wrong" not in said
    assert said.splitlines()[-1] == "all is well"
    assert list((tmp_path / "runs").iterdir()) == [], "what it wrote is removed"


def test_what_is_wrong_is_named(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    server = f"http://127.0.0.1:{free_port()}"
    words = [f"--tracking-uri={server}", f"cluster.storage_path={tmp_path}/file"]
    _, said = run_here(doctor.main, *words, cwd=tmp_path, status=2)
    assert "wrong  storage" in said and "Not a directory" in said
    assert "wrong  tracking store" in said and f"tracking.uri={server} does not answer" in said
    assert "ok     same versions on all nodes" in said and "training" not in said
    assert "screformer doctor: 3 things are wrong, the first: " in said
