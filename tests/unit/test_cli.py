"""The shared command line: names, arguments, settings, messages and exit statuses."""

import argparse
import json
import logging
from pathlib import Path

import pytest

import jobs
from helpers.commands import MODULES, NEEDED, command
from jobs.arguments import RECIPES, Command, Parser, Result, recipe_path, recipes, split_overrides
from jobs.benchmark.__main__ import PARTS
from jobs.cli import COMMANDS, main
from screformer import __version__
from screformer.genes import MIN_GENE_OVERLAP

FOLDER = Path(jobs.__file__).parent


def test_the_table_names_every_command_and_nothing_else() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "arguments", "cli"}
    groups = {path.parent.name for path in FOLDER.glob("*/__main__.py")}
    assert set(COMMANDS) == files | groups
    assert all(line.endswith(".") and len(line) <= 90 for line in (*COMMANDS.values(), *PARTS.values()))


@pytest.mark.parametrize("name", MODULES)
def test_every_command_is_called_as_its_file(name: str) -> None:
    found = command(name)
    assert found.name == name
    assert found.doc is not None and found.doc.partition("\n")[0].endswith(".")


@pytest.mark.parametrize("name", MODULES)
def test_a_mistyped_argument_or_setting_is_the_users_error(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(name)([*NEEDED.get(name, []), "--verbos"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"screformer {name}: unknown argument --verbos; did you mean --verbose?"
        f" (`screformer {name} --help` lists the arguments)\n"
    )
    assert command(name)(["modle.dim=8", *NEEDED.get(name, [])]) == 2
    error = capsys.readouterr().err
    needed, takes_settings = NEEDED.get(name, []), command(name).recipe is not None
    assert ("unknown setting modle; did you mean model?" in error) == takes_settings
    assert error.startswith(f"screformer {name}: ") and error.count("\n") == 1
    if takes_settings:
        assert command(name)([*needed, "model.dept=2"]) == 2
        assert "unknown setting model.dept; did you mean model.depth?" in capsys.readouterr().err
        assert command(name)([*needed, "--config", "blod"]) == 2
        assert "--config blod: no such file or recipe; did you mean blood?" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in MODULES if name in NEEDED])
def test_what_is_missing_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(name)([]) == 2
    option = NEEDED[name][0]
    assert option in capsys.readouterr().err


def greet(error: BaseException | None = None, result: Result = None) -> Command:
    """A command that raises the error, or prints progress and returns the result."""

    def work(args: argparse.Namespace) -> Result:
        print("working")
        logging.getLogger("jobs.greet").info("hello")
        if error is not None:
            raise error
        return result

    def arguments(parser: Parser) -> None:
        parser.add_argument("--names", nargs="*", default=[])
        parser.add_argument("--seed", dest="train.seed", type=int)

    return Command(name="greet", doc="Greet.", arguments=arguments, work=work, recipe="")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("wrong"), 2),
        (FileNotFoundError("wrong"), 2),
        (PermissionError("wrong"), 2),
        (ConnectionError("wrong"), 1),
        (TimeoutError("wrong"), 1),
        (RuntimeError("wrong"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_exit_status_says_who_can_fix_it(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert greet(error)([]) == status
    said = capsys.readouterr()
    assert said.err.startswith("screformer greet: ") and said.err.count("\n") == 1
    assert ("wrong" in said.err) == (status != 130)
    assert greet(error)(["-v"]) == status
    assert ("Traceback" in capsys.readouterr().err) == (status != 130)


def test_an_internal_error_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        greet(KeyError("x"))([])


def test_an_interrupted_command_says_how_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    stop = KeyboardInterrupt()
    stop.add_note("continue with --resume runs/1")
    assert greet(stop)([]) == 130
    assert capsys.readouterr().err == "screformer greet: interrupted; continue with --resume runs/1\n"


def test_the_error_of_a_ray_task_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("Traceback\n  many\n  lines")
    error.cause = ValueError("wrong")  # type: ignore[attr-defined]
    assert greet(error)([]) == 2
    assert capsys.readouterr().err == "screformer greet: wrong\n"


def test_results_are_printed_last_and_are_all_that_quiet_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert greet(result={"a": 1})([]) == 0
    assert capsys.readouterr().out == 'working\n{"a": 1}\n'
    assert greet(result={"a": 1})(["-q"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert greet(result="done")(["--quiet"]) == 0
    assert capsys.readouterr().out == "done\n"


def test_settings_come_from_the_recipe_then_options_then_overrides() -> None:
    args = greet().parse(["--config", "smoke", "--names", "a", "model.depth=3", "b", "--seed", "4"])
    assert args.names == ["a", "b"]
    assert (args.settings.model.depth, args.settings.train.seed, args.settings.model.dim) == (3, 4, 16)
    assert args.overrides == ["model.depth=3"]
    assert greet().parse(["train.seed=5", "--seed", "4"]).settings.train.seed == 5


def test_settings_are_found_behind_an_option_of_several_values() -> None:
    words = (
        "--test-donors d.1 d2 train.seed=3 --labels x.tsv atlas.tiledb_config.vfs.s3.region=eu --out=a.b=c"
    )
    assert split_overrides(words.split()) == (
        ["--test-donors", "d.1", "d2", "--labels", "x.tsv", "--out=a.b=c"],
        ["train.seed=3", "atlas.tiledb_config.vfs.s3.region=eu"],
    )


def test_pairs_are_parsed_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    query = command("query")
    args = query.parse(["--atlas", "a", "--tiledb", "vfs.s3.region=eu", "--tiledb", "vfs.s3.scheme=http"])
    assert args.settings.atlas.tiledb_config == {"vfs.s3.region": "eu", "vfs.s3.scheme": "http"}
    for words, message in (
        (["vfs.s3.region"], "argument --tiledb: 'vfs.s3.region' must read NAME=VALUE"),
        (["a=1", "a=2"], "argument --tiledb: 'a' is both '1' and '2'; give it once"),
    ):
        assert query(["--tiledb", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "runs/1", "--group-by", "none"], "give nothing else"),
        (["--folds", "runs/1", "--group-by", "none"], "crossval.group_by has no effect with --folds runs/1"),
        (["--folds", "runs/1", "crossval.num_folds=3"], "crossval.num_folds has no effect with --folds"),
        (["split.group_by=donor_id"], "split.group_by has no effect in crossval"),
    ],
)
def test_a_study_refuses_what_has_no_effect(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command("crossval").parse(words)


def test_a_resumed_run_has_its_own_settings() -> None:
    args = command("finetune").parse(["--resume", "runs/1", "cluster.num_workers=3"])
    assert (args.resume, args.overrides) == ("runs/1", ["cluster.num_workers=3"])
    annotate = [*NEEDED["annotate"], "--resume", "--tracking-uri", "http://m:5000"]
    assert command("annotate").parse(annotate).settings.tracking.uri == "http://m:5000"


@pytest.mark.parametrize("name", ["annotate", "explain"])
def test_an_atlas_is_opened_with_its_tiledb_settings(name: str) -> None:
    words = ["--model", "m", "--out", "o", "--atlas", "s3://b/a", "--tiledb", "vfs.s3.region=eu"]
    args = command(name).parse([*words, "--obs-filter", "sex == 'male'", "--tracking-uri", "http://m:5000"])
    assert (args.settings.atlas.uri, args.settings.query.obs_filter) == ("s3://b/a", "sex == 'male'")
    assert args.settings.atlas.tiledb_config == {"vfs.s3.region": "eu"}
    assert args.settings.tracking.uri == "http://m:5000"


def test_the_help_gives_the_default_that_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("annotate").parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"must cover (default {MIN_GENE_OVERLAP})" in said
    assert "exit status: 0 done, 1 failed, 2 something you can fix" in said


def test_recipes_have_names(tmp_path: Path) -> None:
    assert {"base", "blood", "smoke"} <= set(recipes())
    assert recipe_path("blood") == RECIPES / "blood.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {dim: 8}")
    assert recipe_path(mine) == mine
    with pytest.raises(ValueError, match=r"no such file or recipe; installed recipes are .*blood"):
        recipe_path(tmp_path / "xyz.yaml")


def test_settings_are_listed_explained_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["settings", *words]) == 0
        return capsys.readouterr().out

    assert all(
        any(line.startswith(f"{name} = ") for line in said().splitlines())
        for name in ("train.lr", "crossval.register")
    )
    assert said("model.pooling").splitlines()[0] == "model.pooling = attention   (cls, mean, attention)"
    assert "train.warmup_steps = 50" in said("train") and "model.dim" not in said("train")
    assert " ".join(said("crossval.baselines").split()).endswith("Refused by ablate.")
    assert said("--config", "smoke", "tokens") == "tokens.max_genes = 64   (default 1024)\n"
    listed = said("--recipes").splitlines()
    assert [line.split()[0] for line in listed] == recipes() and all(len(line) <= 110 for line in listed)
    assert main(["settings", "modle"]) == 2
    assert "no section or setting 'modle'; did you mean model?" in capsys.readouterr().err


def test_the_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: screformer COMMAND" in capsys.readouterr().err
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said and line in said for name, line in COMMANDS.items())
    assert main(["benchmark", "-h"]) == 0
    said = capsys.readouterr().out
    assert "usage: screformer benchmark COMMAND" in said
    assert all(f"  {name}" in said and line in said for name, line in PARTS.items())
    assert main(["anotate"]) == 2
    assert "screformer: no command 'anotate'; did you mean annotate?" in capsys.readouterr().err
    assert main(["benchmark", "steam"]) == 2
    assert "screformer benchmark: no command 'steam'; did you mean stream?" in capsys.readouterr().err
    assert main(["query", "--mistyped"]) == 2


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"screformer {__version__}\n"
