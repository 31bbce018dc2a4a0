import sys
from pathlib import Path

import pytest

from jobs.arguments import split_overrides
from jobs.cli import commands, dispatch, main


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two commands, one module that is none, and one that can't be imported."""
    folder = tmp_path / "some_jobs"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "greet.py").write_text(
        '"""Say hello.\n\nMore."""\n\ndef main(argv):\n    print("hello", *argv)\n    return 3\n'
    )
    (folder / "quiet.py").write_text('"""Return nothing."""\n\ndef main(argv):\n    pass\n')
    (folder / "parts.py").write_text('"""No command."""\n\ndef main(task, argv):\n    pass\n')
    (folder / "heavy.py").write_text(
        '"""Needs something rare."""\n\nimport not_installed_anywhere\n\ndef main(argv): ...\n'
    )
    (folder / "inner" / "__init__.py").touch()
    (folder / "inner" / "__main__.py").write_text(
        '"""A folder of commands."""\n\ndef main(argv):\n    print("inner", *argv)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    return folder


def test_lists_commands_without_importing_them(package: Path) -> None:
    assert commands(package) == {
        "greet": "Say hello.",
        "heavy": "Needs something rare.",
        "inner": "A folder of commands.",
        "quiet": "Return nothing.",
    }


def test_passes_arguments_and_status(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch("prog", package, "some_jobs", ["greet", "a", "--b"]) == 3
    assert dispatch("prog", package, "some_jobs", ["quiet"]) == 0
    assert dispatch("prog", package, "some_jobs", ["inner", "x"]) == 0
    assert capsys.readouterr().out == "hello a --b\ninner x\n"


def test_unknown_name_gets_the_nearest_and_the_list(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch("prog", package, "some_jobs", ["gret"]) == 2
    message = capsys.readouterr().err
    assert "no command 'gret'; did you mean 'greet'?" in message
    assert "heavy  Needs something rare." in message


def test_every_job_says_what_it_does() -> None:
    found = commands()
    assert "cli" not in found and {"quickstart", "benchmark"} <= set(found)
    assert all(line.endswith((".", "`.")) for line in found.values()), found


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_settings_are_found_behind_an_option_of_several_values() -> None:
    words = [
        "--test-donors",
        "d.1",
        "d2",
        "train.seed=3",
        "--labels",
        "x.tsv",
        "atlas.tiledb_config.vfs.s3.region=eu",
        "--out=a.b=c",
    ]
    assert split_overrides(words) == (
        ["--test-donors", "d.1", "d2", "--labels", "x.tsv", "--out=a.b=c"],
        ["train.seed=3", "atlas.tiledb_config.vfs.s3.region=eu"],
    )
