"""The command-line grammar that all commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from jobs.training.cells import describe, prepare_cells
from jobs.training.run import run_training
from jobs.training.run_folder import read_run
from jobs.training.start import load_start
from screformer.config import Command, ExperimentConfig, Task


def train_command(task: Task, description: str, argv: Sequence[str] | None = None) -> int:
    """The command line of both training jobs."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{task}", description=description)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML recipe, such as jobs/recipes/base.yaml; what it leaves out keeps its default",
    )
    if task == "finetune":
        parser.add_argument(
            "--from",
            dest="init_from",
            metavar="MODEL",
            help="start from a run id, runs:/ID, models:/NAME@ALIAS or a model directory",
        )
    parser.add_argument("--obs-filter", metavar="FILTER", help="same as query.obs_filter=FILTER")
    parser.add_argument(
        "--query", metavar="FILE", help="same as query.file=FILE, a query saved by jobs.query"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, cells, steps and memory, and stop"
    )
    parser.add_argument(
        "--resume", metavar="RUN_DIR", help="go on with a killed run; only settings given beside it change"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="settings, such as atlas.uri=ATLAS model.n_hashes=8",
    )
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("jobs.tracking").setLevel(logging.WARNING)
    overrides: list[str] = list(arguments.overrides)
    try:
        config = (
            ExperimentConfig.from_file(arguments.config, command=task)
            if arguments.config
            else ExperimentConfig()
        )
        flags = {"query.obs_filter": arguments.obs_filter, "query.file": arguments.query}
        config = config.merge({name: value for name, value in flags.items() if value is not None})
        if arguments.resume is None:
            config = config.merge(overrides, command=task)
        init_from = getattr(arguments, "init_from", None)
        if arguments.dry_run:
            if arguments.resume is not None:
                config = ExperimentConfig.from_saved(read_run(arguments.resume)["config"], resume=True).merge(
                    overrides, command=task
                )
            start = load_start(config, init_from) if init_from else None
            cells = prepare_cells(config, task, start=start)
            print(yaml.safe_dump(cells.config.to_dict(task), sort_keys=False))
            print(yaml.safe_dump(describe(cells), sort_keys=False) + cells.attention)
            return 0
        result = run_training(config, task, init_from=init_from, resume=arguments.resume, overrides=overrides)
    except (ValueError, ConnectionError, FileNotFoundError) as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(result)))
    return 0


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that studies share."""
    parser.add_argument("--config", metavar="FILE", help="YAML recipe, such as jobs/recipes/crossval.yaml")
    parser.add_argument(
        "--folds",
        metavar="RUN",
        help="take the folds of an earlier study: its folder, folds.parquet or MLflow run id",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print settings, folds, what is to be known and how long it takes, and stop",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="go on with an interrupted study; finished folds are not run again",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="settings, such as atlas.uri=ATLAS crossval.num_folds=3",
    )


def run_study_command(
    command: Command,
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    dry_run: Callable[[ExperimentConfig], dict[str, Any]],
    run: Callable[..., dict[str, Any]],
) -> int:
    """Run a study's command: read the recipe, look ahead or run, print the result."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if arguments.resume and (arguments.overrides or overrides or arguments.config or arguments.folds):
            raise ValueError(
                "--resume goes on with the settings of the interrupted study; give nothing beside it"
            )
        config = (
            ExperimentConfig.from_file(arguments.config, command=command)
            if arguments.config
            else ExperimentConfig()
        )
        config = config.merge([*arguments.overrides, *overrides], command=command)
        if arguments.dry_run:
            print(yaml.safe_dump(config.to_dict(command), sort_keys=False))
            print(yaml.safe_dump(dry_run(config), sort_keys=False), end="")
            return 0
        result = run(config, folds_from=arguments.folds, resume=arguments.resume)
    except (ValueError, ConnectionError, FileNotFoundError, RuntimeError) as error:
        print(f"{parser.prog}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


def parse_pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """Read `NAME=VALUE` arguments.

    Raises:
        ValueError: One is malformed, or a name stands twice with different values.
    """
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise ValueError(f"{option} {text!r} must be NAME=VALUE, such as donor_id=patient")
        if pairs.setdefault(name, value) != value:
            raise ValueError(f"{option} gives {name!r} twice: {pairs[name]!r} and {value!r}")
    return pairs


_OVERRIDE = re.compile(r"[a-z_]\w*(\.\w+)+=")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the settings (`section.field=value`) out of the words of a command line, wherever they stand.

    An option that takes several values would swallow those behind it: `--test-donors d1 d2 train.seed=1`.

    Returns:
        The other words, and the settings.
    """
    overrides = [word for word in argv if _OVERRIDE.match(word)]
    return [word for word in argv if not _OVERRIDE.match(word)], overrides
