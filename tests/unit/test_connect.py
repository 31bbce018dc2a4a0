"""Addresses that no driver can connect to, and the limits of a local Ray.

Starting and joining are tested in tests/integration/test_ray_job.py.
"""

import os
from pathlib import Path

import pytest

from cluster import connect as door
from helpers.servers import free_port


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_for_submitting_jobs_is_recognised(address: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT.*ray job submit --address http://HOST:8265"):
        door.connect(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "head:port", ":6379", "6379"])
def test_an_address_without_host_or_port(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be HOST:PORT \(such as 10.0.0.5:6379\), auto or local"):
        door.connect(address)


def test_nobody_answers() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        ValueError, match=rf"no Ray cluster answers at {address}.*`ray start --head`.*unset RAY_ADDRESS"
    ):
        door.connect(address)


def test_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="no Ray cluster answers at"):
        door.connect()


def test_a_ray_that_is_too_slow_to_start_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    slow = "The current node timed out during startup. This could happen because some of the raylet failed"
    errors: list[Exception] = [Exception(slow), Exception(slow)]

    def start() -> None:
        if errors:
            raise errors.pop()

    door.start_patiently(start)
    assert not errors and caplog.text.count("too slow to start; trying again") == 2
    errors[:] = [Exception(slow)] * door.STARTS
    with pytest.raises(RuntimeError, match=r"did not start in 3 tries of 30 s: this machine .* is too busy"):
        door.start_patiently(start)
    errors[:] = [OSError("another")]
    with pytest.raises(OSError, match="another"):
        door.start_patiently(start)


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "old")
    monkeypatch.delenv("ADDED", raising=False)
    with pytest.raises(RuntimeError), door.environment({"KEPT": "new", "ADDED": "1"}):
        assert (os.environ["KEPT"], os.environ["ADDED"]) == ("new", "1")
        raise RuntimeError
    assert os.environ["KEPT"] == "old" and "ADDED" not in os.environ


def test_machine_is_what_scheduler_and_container_allow(tmp_path: Path) -> None:
    cores, memory = door.machine(tmp_path)
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert door.machine(tmp_path) == (1, 2**30)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert door.machine(tmp_path) == (cores, memory)
