"""The command line that all commands share; one file, because it is their whole grammar.

Arguments, settings, messages and exit statuses are here.

Nothing heavy is imported before the arguments and settings are checked, so typing errors are
reported at once.

Exit statuses, the same for every command:

    0    done
    1    failed: a server did not answer, a worker died, a fold could not be trained
    2    the user can fix it: a wrong argument, setting, file or address
    130  interrupted by Ctrl-C
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.quiet import quiet as quiet_ray
from screformer.bundled import DEFAULT
from screformer.config import WITHOUT_EFFECT, ExperimentConfig

DONE, FAILED, USER, INTERRUPTED = 0, 1, 2, 130

RECIPES = Path(__file__).parent / "recipes"

_OURS = ("jobs", "data_ingest", "cluster", "screformer")
_TRY_AGAIN = (ConnectionError, TimeoutError, RuntimeError)
"""Not the user's fault: the same command may succeed later. The first two are kinds of OSError."""
_THE_USERS = (ValueError, OSError)

Result = dict[str, Any] | str | None
"""What a command prints last: one JSON object, some words, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its arguments, the settings they change, and what it does.

    Called with the words of a command line, it parses and checks them, works, prints the result and returns
    the exit status.
    """

    name: str
    """What follows `screformer` or `python -m jobs.`, with a blank instead of a further dot."""
    doc: str | None
    """Docstring of the module; the text of `--help`."""
    arguments: Callable[[Parser], None]
    """Adds the command's own arguments. An argument for a setting has the setting's name as `dest`."""
    work: Callable[[argparse.Namespace], Result]
    """Imports what it needs and runs the command."""
    extra: str = "all"
    """Extra of the package that installs what it needs."""
    check: Callable[[argparse.Namespace], None] = lambda args: None
    """Raises ValueError for arguments that do not go together."""
    recipe: str | None = None
    """Recipe to start from; empty starts from the defaults. None: the command takes neither `--config` nor
    `section.field=value`."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command, and return its exit status."""
        verbose = False
        try:
            args = self.parse(argv)
            verbose = args.verbose
            with _messages(verbose=verbose, quiet=args.quiet):
                result = self.work(args)
        except KeyboardInterrupt as stop:
            hints = getattr(stop, "__notes__", None) or ["the same command starts it again"]
            return self._refuse("; ".join(["interrupted", *hints]), INTERRUPTED)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", *_OURS):
                raise
            remedy = f"pip install 'screformer[{self.extra}]'"
            return self._refuse(f"it needs {package}, which is not installed; {remedy}", USER)
        except (*_THE_USERS, RuntimeError) as error:
            if verbose:
                traceback.print_exc()
            # Ray wraps the error of a task in one whose text is a traceback.
            cause = getattr(error, "cause", None) or error
            return self._refuse(str(cause), FAILED if isinstance(error, _TRY_AGAIN) else USER)
        if result is not None:
            print(result if isinstance(result, str) else json.dumps(result, default=str), flush=True)
        return DONE

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse and check the words of a command line, without any work.

        Args:
            argv: The words behind the command's name; None takes those of this process.

        Returns:
            The arguments; `settings` is the settings tree with all that the words change, `overrides` those
            of the form `section.field=value`.

        Raises:
            ValueError: A word, a setting or a combination that the command does not take.
            SystemExit: With `--help`.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        parser = self._parser()
        overrides: list[str] = []
        if self.recipe is not None:
            words, overrides = split_overrides(words)
        args, unknown = parser.parse_known_intermixed_args(words)
        if unknown:
            near = difflib.get_close_matches(unknown[0], parser.option_strings, n=1)
            parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        flags = {name: value for name, value in vars(args).items() if "." in name and value is not None}
        args.overrides = overrides + getattr(args, "words", [])
        args.settings = ExperimentConfig()
        if not isinstance(getattr(args, "resume", None), str):  # a resumed run already has its settings
            settings = self._start(args).merge(flags, command=self._effect)
            args.settings = settings.merge(args.overrides, command=self._effect)
        self.check(args)
        return args

    def _start(self, args: argparse.Namespace) -> ExperimentConfig:
        recipe = getattr(args, "config", None) or self.recipe
        if not recipe:
            return ExperimentConfig()
        return ExperimentConfig.from_file(recipe_path(recipe), command=self._effect)

    @property
    def _effect(self) -> Any:
        """The command in which every setting must have an effect; None if it uses only some settings."""
        return self.name if self.name in WITHOUT_EFFECT else None

    def _parser(self) -> Parser:
        parser = Parser(
            prog=program(self.name),
            description=self.doc,
            epilog="exit status: 0 done, 1 failed, 2 something you can fix, 130 interrupted",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.arguments(parser)
        if self.recipe is not None:
            default = f"default {self.recipe}" if self.recipe else "default: every setting's own default"
            parser.add_argument(
                "--config", metavar="RECIPE", help=f"YAML file, or one of {', '.join(recipes())} ({default})"
            )
            parser.add_argument(
                "words",
                nargs="*",
                metavar="section.field=value",
                help="settings, e.g. atlas.uri=./atlas model.n_hashes=8; `screformer settings` lists them",
            )
        amount = parser.add_mutually_exclusive_group()
        amount.add_argument(
            "-v", "--verbose", action="store_true", help="more messages, errors with traceback"
        )
        amount.add_argument("-q", "--quiet", action="store_true", help="print the result and warnings only")
        return parser

    def _refuse(self, message: str, status: int) -> int:
        print(f"screformer {self.name}: {message}", file=sys.stderr)
        return status


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are reported as all others are."""

    @property
    def option_strings(self) -> list[str]:
        """All options that it knows."""
        return list(self._option_string_actions)

    def error(self, message: str) -> Any:
        """Raise the error instead of ending the process."""
        raise ValueError(f"{message} (`{self.prog} --help` lists the arguments)")


class Pairs(argparse.Action):
    """Read `NAME=VALUE` words into a dict; the option may be repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the pairs to those that are there."""
        pairs = dict(getattr(namespace, self.dest) or {})
        for text in values:
            name, equals, value = text.partition("=")
            if not (equals and name and value):
                raise argparse.ArgumentError(self, f"{text!r} must read {self.metavar}")
            if pairs.setdefault(name, value) != value:
                raise argparse.ArgumentError(self, f"{name!r} is {pairs[name]!r} and {value!r}; give it once")
        setattr(namespace, self.dest, pairs)


def add_model(parser: Parser) -> None:
    """`--model`, as `jobs.tracking.models.resolve_model` reads it, and where models are kept."""
    parser.add_argument(
        "--model",
        default=DEFAULT,
        help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID, a model directory, or bundled:NAME"
        " (default %(default)s: human blood cells)",
    )
    add_tracking(parser)


def add_tracking(parser: Parser) -> None:
    """`--tracking-uri`."""
    parser.add_argument(
        "--tracking-uri",
        dest="tracking.uri",
        metavar="URI",
        help="where runs and models are kept (default MLFLOW_TRACKING_URI, else ./mlflow.db)",
    )


def add_cells(parser: Parser, *, many: bool) -> None:
    """Which cells: those of .h5ad files (one file unless `many`) or of an atlas query."""
    where = parser.add_mutually_exclusive_group(required=True)
    if many:
        where.add_argument("--h5ad", nargs="+", type=Path, metavar="FILE", help=".h5ad files of raw counts")
    else:
        where.add_argument("--h5ad", type=Path, metavar="FILE", help=".h5ad file of raw counts")
    where.add_argument(
        "--atlas", dest="atlas.uri", metavar="URI", help="a path, s3://..., census or census:DATE"
    )
    add_filter(parser)
    add_tiledb(parser)
    add_counts(parser)


def add_filter(parser: Parser) -> None:
    """`--obs-filter`."""
    parser.add_argument(
        "--obs-filter",
        dest="query.obs_filter",
        metavar="FILTER",
        help="cells of the atlas to use, for example \"tissue_general == 'blood' and sex != 'unknown'\"",
    )


def add_tiledb(parser: Parser) -> None:
    """`--tiledb`."""
    parser.add_argument(
        "--tiledb",
        dest="atlas.tiledb_config",
        nargs="+",
        action=Pairs,
        metavar="NAME=VALUE",
        help="TileDB settings of the atlas, for example vfs.s3.region=eu-west-1",
    )


def add_counts(parser: Parser) -> None:
    """`--layer` and `--use`: where the counts of an .h5ad file are."""
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument("--layer", metavar="NAME", help="take the counts of .h5ad files from this layer")
    counts.add_argument(
        "--use", choices=("X", "raw"), default="X", help="take them from X (default) or from raw.X"
    )


def add_gene_overlap(parser: Parser) -> None:
    """`--min-gene-overlap`; None takes `MIN_GENE_OVERLAP`, whose module is too heavy to load here."""
    parser.add_argument(
        "--min-gene-overlap",
        type=float,
        metavar="SHARE",
        help="least share of the model's expected expression that a file's genes must carry (default 0.1)",
    )


def add_training(parser: Parser) -> None:
    """What the trainings share: which cells, `--dry-run` and `--resume`."""
    add_filter(parser)
    parser.add_argument(
        "--query", dest="query.file", metavar="FILE", help="a query saved by `screformer query --out FILE`"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, cells, steps and memory, and stop"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="continue an interrupted run, with its settings; of those given now only"
        " `section.field=value` counts",
    )


def add_study(parser: Parser) -> None:
    """What cross-validation and ablation share: `--folds`, `--dry-run` and `--resume`."""
    parser.add_argument(
        "--folds",
        metavar="RUN",
        help="use the folds of an earlier study: its folder, folds.parquet or MLflow run id",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, folds, notes and how long it takes, and stop"
    )
    parser.add_argument(
        "--resume", metavar="RUN_DIR", help="continue an interrupted study; finished folds are not run again"
    )


def check_study(args: argparse.Namespace) -> None:
    """Refuse settings next to `--resume`, which continues a study as it began, and what `--folds` fixes.

    Raises:
        ValueError: There are some.
    """
    given = {text.partition("=")[0] for text in args.overrides}
    given |= {name for name, value in vars(args).items() if "." in name and value is not None}
    if args.resume and (given or args.config or args.folds or args.dry_run):
        raise ValueError("--resume continues a study with the settings it began with; give nothing else")
    fixed = sorted(given & {"crossval.group_by", "crossval.num_folds"})
    if args.folds and fixed:
        raise ValueError(f"{fixed[0]} has no effect with --folds {args.folds}, which fixes it; remove one")


def add_device(parser: Parser, *, rounds: int) -> None:
    """What the benchmarks of the network share: rounds, threads, device, dtype and its peak speed."""
    parser.add_argument(
        "--rounds", type=count, default=rounds, help="timed rounds after one to warm up (default %(default)s)"
    )
    parser.add_argument("--threads", type=count, help="threads on a CPU (default: as many as PyTorch takes)")
    parser.add_argument("--device", default="cpu", help="for example cuda (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="what the device can do, for the utilisation; known by name for some GPUs",
    )


def count(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def recipes() -> list[str]:
    """Names of the recipes that are installed with screformer."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe: an installed one by its name, or any other by its path.

    Raises:
        ValueError: There is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.name == str(name) and path.suffix == "" and (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    near = difflib.get_close_matches(path.stem, recipes(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes by name are {', '.join(recipes())}"
    raise ValueError(f"--config {name}: no such file or recipe; {hint}")


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Take the settings (`section.field=value`) out of the words of a command line, wherever they are.

    An option that takes several values would swallow those behind it: `--test-donors d1 d2 train.seed=1`.

    Returns:
        The other words, and the settings.
    """
    sections = "|".join(ExperimentConfig.__dataclass_fields__)
    override = re.compile(rf"({sections})(\.\w+)+=")
    words = list(words)
    return [word for word in words if not override.match(word)], [
        word for word in words if override.match(word)
    ]


def program(name: str) -> str:
    """How the command was called: `screformer NAME` or `python -m jobs.NAME`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    as_module = bool(name) and module == f"jobs.{name.split()[0]}"
    return f"python -m jobs.{name}" if as_module else f"screformer {name}"


@contextlib.contextmanager
def _messages(*, verbose: bool, quiet: bool) -> Iterator[None]:
    """Log warnings, or more; when quiet, drop progress from both outputs."""
    style = "%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(levelname)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=style)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.WARNING)
    if not (verbose or quiet or sys.stderr.isatty()):
        logging.getLogger("data_ingest.tasks").setLevel(logging.INFO)  # where a progress bar is not shown
    quiet_ray()
    if not quiet:
        yield
        return
    os.environ["TQDM_DISABLE"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):
        yield
