"""One writer per atlas: a second one is rejected without harm to the first; a dead owner loses its claim."""

import json
import multiprocessing
import re
import socket
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pytest
import tiledbsoma

from data_ingest import claims, schema
from data_ingest.atlas import open_atlas
from data_ingest.atlas_lock import locked
from data_ingest.ingest import ingest
from data_ingest.verify import verify_atlas
from helpers.cells import atlas_content, cells, differences, write
from helpers.processes import start_python
from helpers.servers import S3
from screformer.config import AtlasConfig
from screformer.files import write_whole

HOLD = (
    "import sys, json; from data_ingest.atlas_lock import locked\n"
    "with locked(sys.argv[1], json.loads(sys.argv[2])):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


def holder(uri: str, tiledb_config: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start another process that holds the lock until its stdin is closed."""
    words = ["-c", HOLD, uri, json.dumps(tiledb_config or {})]
    process = start_python(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_ingest_is_rejected_and_a_dead_owners_claim_is_taken_over(tmp_path: Path) -> None:
    uri, sample = str(tmp_path / "atlas"), write(tmp_path / "a.h5ad", cells())
    first = holder(uri)
    host = re.escape(socket.gethostname())
    with pytest.raises(
        ValueError, match=rf"is being written by process {first.pid} of \S+ on {host}, since .* wait for it"
    ):
        ingest([sample], uri)
    assert not Path(uri).exists()
    first.kill()
    first.wait()
    assert ingest([sample], uri).cells_added == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "atlas"]


def test_two_ingests_at_once_leave_a_correct_atlas(tmp_path: Path) -> None:
    first = write(tmp_path / "a.h5ad", cells(200))
    more = [write(tmp_path / f"{k}.h5ad", cells(150, dataset=f"d{k}", seed=k)) for k in (1, 2)]
    for name in ("both", "one"):
        ingest([first], str(tmp_path / name))
    program = "import sys; from data_ingest.ingest import ingest; ingest([sys.argv[1]], sys.argv[2])"
    jobs = [start_python("-c", program, path, tmp_path / "both", stderr=subprocess.PIPE) for path in more]
    errors = [job.communicate()[1] for job in jobs]
    done = [job.returncode == 0 for job in jobs]
    for succeeded, error in zip(done, errors, strict=True):
        assert succeeded or "is being written by process" in error.splitlines()[-1], error
    ingest([path for path, succeeded in zip(more, done, strict=True) if succeeded], str(tmp_path / "one"))
    assert not differences(atlas_content(str(tmp_path / "both")), atlas_content(str(tmp_path / "one")))


def test_a_claim_of_another_machine_is_valid_while_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RENEW_S", 0.2)
    folder = tmp_path / "atlas.writing"
    folder.mkdir()
    claim = {"user": "ada", "host": "elsewhere pid:[1]", "pid": 7, "process": "1", "since": time.time()}
    path = folder / "theirs.json"

    path.write_text(json.dumps(claim | {"renewed": time.time() + 7200}))
    with (
        pytest.raises(ValueError, match=r"ada on elsewhere, .*its clock is 7\d\d\d s ahead"),
        locked(str(tmp_path / "atlas"), {}),
    ):
        pass
    # The other machine's clock is two hours behind, but its process is alive.
    receive, send = multiprocessing.Pipe(duplex=False)
    other = multiprocessing.get_context("spawn").Process(target=renew_behind, args=(path, claim, receive))
    path.write_text(json.dumps(claim | {"renewed": time.time() - 7200}))
    other.start()
    while time.time() - json.loads(path.read_text())["renewed"] > 7199.9:
        time.sleep(0.05)
    with pytest.raises(ValueError, match="is being written"), locked(str(tmp_path / "atlas"), {}):
        pass
    send.send("stop")
    other.join()
    with locked(str(tmp_path / "atlas"), {}):
        assert not path.exists()


def renew_behind(path: Path, claim: dict, stop: Connection) -> None:
    """Renew a claim with a clock that is two hours behind."""
    while not stop.poll(0.1):
        write_whole(path, json.dumps(claim | {"renewed": time.time() - 7199}))


def test_a_claim_on_s3(s3: S3) -> None:
    uri = f"{s3.uri}/locked/atlas"
    first = holder(uri, s3.tiledb_config)
    with pytest.raises(ValueError, match="is being written"), locked(uri, s3.tiledb_config):
        pass
    first.communicate()
    with locked(uri, s3.tiledb_config):
        pass


def test_an_atlas_written_with_a_clock_that_is_ahead_is_reported(tmp_path: Path) -> None:
    uri, sample = tmp_path / "atlas", write(tmp_path / "a.h5ad", cells())
    ingest([sample], str(uri))
    ahead_ms = 2 * 3600 * 1000
    for path in sorted(uri.rglob("*"), key=lambda path: -len(path.parts)):
        path.rename(path.with_name(re.sub(r"\d{13}", lambda time: str(int(time[0]) + ahead_ms), path.name)))
    with pytest.raises(ValueError, match="machine whose clock is ahead"):
        ingest([sample], str(uri))
    with (
        pytest.raises(ValueError, match="machine whose clock is ahead"),
        open_atlas(AtlasConfig(uri=str(uri))),
    ):
        pass


@pytest.mark.parametrize("name", ["batch#2", "what?", "a;b"])
def test_a_path_that_tiledb_cannot_open_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="TileDB cannot open a path with"):
        ingest([write(tmp_path / "a.h5ad", cells())], str(tmp_path / name))


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert schema.atlas_place("~/atlas") == str(tmp_path / "atlas")


def test_an_atlas_with_wrong_counts_is_found(tmp_path: Path) -> None:
    uri = str(tmp_path / "atlas")
    ingest([write(tmp_path / "a.h5ad", cells())], uri)
    assert verify_atlas(uri) == 60
    with tiledbsoma.SparseNDArray.open(f"{uri}/{schema.X}", "w") as x:
        x.write(pa.table({"soma_dim_0": [7], "soma_dim_1": [3], "soma_data": pa.array([99], pa.float32())}))
    with pytest.raises(
        ValueError, match=r"the counts of 1 of 60 cells .*'cell_7' of 'blood_one' \(sum 1\d\d,"
    ):
        verify_atlas(uri)
    with pytest.raises(ValueError, match="does not exist"):
        verify_atlas(str(tmp_path / "gone"))
