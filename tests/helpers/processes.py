"""Start processes in tests, such as our commands as users run them, and end them completely."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).resolve().parents[1]
REPO_ROOT = TESTS.parent


def environment(**values: str) -> dict[str, str]:
    """This process's environment, extended so that Python finds our packages and these helpers."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO_ROOT), str(TESTS)]), **values}


def start_python(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start Python with these arguments and return at once; options as for `Popen`."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)], text=True, **{"env": environment(), **options}
    )


def run_python(
    *words: object, timeout_s: float = 550, status: int = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, which must end with `status`; options as for `subprocess.run`."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        **{"env": environment(), **options},
    )
    assert done.returncode == status, (
        f"status {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    )
    return done


def start_command(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """Start `python -m` with these arguments in a folder; `stdout` contains both outputs."""
    return start_python("-m", *words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process: subprocess.Popen[str], pattern: str, *, timeout_s: float = 300) -> re.Match[str]:
    """The first match in the process's output."""
    assert process.stdout is not None
    seen, deadline = [], time.monotonic() + timeout_s
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
        seen.append(line)
        assert time.monotonic() < deadline, "".join(seen)
    raise AssertionError(f"it ended without {pattern!r}:\n{''.join(seen)}")


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and everything it started."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def end_group(process: subprocess.Popen[Any], *, grace_s: float = 0) -> None:
    """End the process group led by a process: SIGTERM if `grace_s` is positive, then SIGKILL."""
    if grace_s:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_here(
    main: Callable[[Sequence[str]], int | None], *words: object, cwd: Path, status: int = 0
) -> tuple[dict[str, Any], str]:
    """Run a command in this process, with its Ray.

    Returns:
        The JSON object on the last line (empty if the expected status is not 0), and the complete output.
    """
    printed = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        found = main([str(word) for word in words])
    assert (found or 0) == status, printed.getvalue()
    result = json.loads(printed.getvalue().splitlines()[-1]) if status == 0 else {}
    return result, printed.getvalue()
