"""The command-line grammar shared by all commands; one file because all of it is needed together.

It covers arguments, settings, messages and exit statuses. Heavy modules are imported only after arguments and
settings have been checked, so typos are reported at once.

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
_EXTRAS = {"jinja2": "report", "umap": "report"}
"""Extras of packages that only an option of a command needs."""
_TRY_AGAIN = (ConnectionError, TimeoutError, RuntimeError)
"""Not the user's fault: the same command may succeed later. The first two are subclasses of OSError."""
_THE_USERS = (ValueError, OSError)

Result = dict[str, Any] | str | None
"""What a command prints last: one JSON object, text, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its arguments, the settings they change, and what it does.

    Calling it with the words of a command line parses and checks them, does the work, prints the result and
    returns the exit status.
    """

    name: str
    """What follows `screformer` or `python -m jobs.`, with a space in place of any further dot."""
    doc: str | None
    """Docstring of the module; the text of `--help`."""
    arguments: Callable[[Parser], None]
    """Adds the command's own arguments. An argument for a setting has the setting's name as `dest`."""
    work: Callable[[argparse.Namespace], Result]
    """Imports what it needs and runs the command."""
    extra: str = "all"
    """The extra of the package that installs what the command needs."""
    check: Callable[[argparse.Namespace], None] = lambda args: None
    """Raises ValueError for arguments that cannot be combined."""
    recipe: str | None = None
    """Recipe to start from; empty means the defaults. None: the command accepts neither `--config` nor
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
            hints = getattr(stop, "__notes__", None) or ["run the same command to start again"]
            return self._refuse("; ".join(["interrupted", *hints]), INTERRUPTED)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", *_OURS):
                raise
            remedy = f"pip install 'screformer[{_EXTRAS.get(package, self.extra)}]'"
            return self._refuse(f"it needs {package}, which is not installed; {remedy}", USER)
        except (*_THE_USERS, RuntimeError) as error:
            if verbose:
                traceback.print_exc()
            # Ray wraps a task's error in one whose text is a traceback.
            cause = getattr(error, "cause", None) or error
            return self._refuse(str(cause), FAILED if isinstance(error, _TRY_AGAIN) else USER)
        if result is not None:
            print(result if isinstance(result, str) else json.dumps(result, default=str), flush=True)
        return DONE

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse and check the words of a command line, without doing any work.

        Args:
            argv: The words after the command's name; None means those of this process.

        Returns:
            The arguments. `settings` is the settings tree with every change applied; `overrides` are the
            words of the form `section.field=value`.

        Raises:
            ValueError: A word, setting or combination that the command does not accept.
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
            default = f"default {self.recipe}" if self.recipe else "default: the default of every setting"
            parser.add_argument(
                "--config", metavar="RECIPE", help=f"YAML file, or one of {', '.join(recipes())} ({default})"
            )
            parser.add_argument(
                "words",
                nargs="*",
                metavar="section.field=value",
                help="settings, for example model.n_hashes=8; `screformer settings` lists them",
            )
        amount = parser.add_mutually_exclusive_group()
        amount.add_argument(
            "-v", "--verbose", action="store_true", help="show more messages, and errors with a traceback"
        )
        amount.add_argument("-q", "--quiet", action="store_true", help="print only the result and warnings")
        return parser

    def _refuse(self, message: str, status: int) -> int:
        print(f"screformer {self.name}: {message}", file=sys.stderr)
        return status


Group = argparse._MutuallyExclusiveGroup


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors reported like all others."""

    @property
    def option_strings(self) -> list[str]:
        """All options of the parser."""
        return list(self._option_string_actions)

    def error(self, message: str) -> Any:
        """Raise ValueError instead of ending the process."""
        raise ValueError(f"{message} (`{self.prog} --help` lists the arguments)")


class Pairs(argparse.Action):
    """Parse `NAME=VALUE` words into a dict; the option may be repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the pairs to those already given."""
        pairs = dict(getattr(namespace, self.dest) or {})
        for text in values:
            name, equals, value = text.partition("=")
            if not (equals and name and value):
                raise argparse.ArgumentError(self, f"{text!r} must read {self.metavar}")
            if pairs.setdefault(name, value) != value:
                raise argparse.ArgumentError(
                    self, f"{name!r} is both {pairs[name]!r} and {value!r}; give it once"
                )
        setattr(namespace, self.dest, pairs)


def add_model(parser: Parser) -> None:
    """`--model`, in the forms that `jobs.tracking.models.resolve_model` accepts, and `--tracking-uri`."""
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
        help="where runs and models are stored (default: MLFLOW_TRACKING_URI, else ./mlflow.db)",
    )


FILES = ".h5ad, 10x .h5 or matrix.mtx folder, .zarr, .loom, or the URL of one"
"""Formats that commands read, for their help."""


def add_cells(parser: Parser, *, many: bool) -> None:
    """The choice of cells: .h5ad files (one file unless `many`) or an atlas query."""
    where = parser.add_mutually_exclusive_group(required=True)
    if many:
        where.add_argument(
            "--h5ad", nargs="+", type=Path, metavar="FILE", help=f"files of raw counts: {FILES}"
        )
    else:
        where.add_argument("--h5ad", type=Path, metavar="FILE", help=f"a file of raw counts: {FILES}")
    add_atlas(where)
    add_filter(parser)
    add_tiledb(parser)
    add_counts(parser)


def add_atlas(parser: Parser | Group) -> None:
    """`--atlas`."""
    parser.add_argument(
        "--atlas", dest="atlas.uri", metavar="URI", help="a path, s3://bucket/prefix, census or census:DATE"
    )


def add_query(parser: Parser | Group) -> None:
    """`--query`."""
    parser.add_argument(
        "--query", dest="query.file", metavar="FILE", help="a query saved by `screformer query --out FILE`"
    )


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
    """`--layer` and `--use`: where to find the counts in an .h5ad file."""
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument("--layer", metavar="NAME", help="read the counts of .h5ad files from this layer")
    counts.add_argument(
        "--use", choices=("X", "raw"), default="X", help="read the counts from X (default) or raw.X"
    )


def add_gene_overlap(parser: Parser) -> None:
    """`--min-gene-overlap`; None means `MIN_GENE_OVERLAP`, whose module is too heavy to load here."""
    parser.add_argument(
        "--min-gene-overlap",
        type=float,
        metavar="SHARE",
        help="smallest share of the model's expected expression that a file's genes must cover (default 0.1)",
    )


def add_training(parser: Parser) -> None:
    """Arguments of the training commands: the cells, `--dry-run`, `--run-dir` and `--resume`."""
    add_filter(parser)
    add_query(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, cells, steps and memory, then stop"
    )
    _add_run_folder(
        parser,
        "resume an interrupted run with its own settings; only section.field=value given now can change them",
    )


def add_study(parser: Parser) -> None:
    """Arguments of cross-validation and ablation: `--folds`, `--dry-run`, `--run-dir` and `--resume`."""
    parser.add_argument(
        "--folds",
        metavar="RUN",
        help="use the folds of an earlier study: its folder, folds.parquet or MLflow run id",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, folds, notes and the time needed, then stop"
    )
    _add_run_folder(parser, "resume an interrupted study; finished folds are not run again")


def _add_run_folder(parser: Parser, resume: str) -> None:
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--run-dir",
        metavar="RUN_DIR",
        help="folder of the run; the same command, given again after an interruption, resumes the run",
    )
    folder.add_argument("--resume", metavar="RUN_DIR", help=resume)


def check_study(args: argparse.Namespace) -> None:
    """Refuse settings given with `--resume`, and settings that `--folds` already fixes.

    Raises:
        ValueError: Such a setting is given.
    """
    given = {text.partition("=")[0] for text in args.overrides}
    given |= {name for name, value in vars(args).items() if "." in name and value is not None}
    if args.resume and (given or args.config or args.folds or args.dry_run):
        raise ValueError("--resume uses the settings the study was started with; give nothing else")
    fixed = sorted(given & {"crossval.group_by", "crossval.num_folds"})
    if args.folds and fixed:
        raise ValueError(f"{fixed[0]} has no effect with --folds {args.folds}, which fixes it; remove one")


def add_device(parser: Parser, *, rounds: int) -> None:
    """Arguments of the network benchmarks: rounds, threads, device, dtype and peak speed."""
    parser.add_argument(
        "--rounds", type=count, default=rounds, help="timed rounds after a warm-up (default %(default)s)"
    )
    parser.add_argument("--threads", type=count, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--device", default="cpu", help="for example cuda (default %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="peak speed of the device, for the utilisation; built in for some GPUs",
    )


def count(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def recipes() -> list[str]:
    """Names of the recipes installed with screformer."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe, given the name of an installed one or any path.

    Raises:
        ValueError: There is no such recipe or file.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.name == str(name) and path.suffix == "" and (RECIPES / f"{name}.yaml").is_file():
        return RECIPES / f"{name}.yaml"
    near = difflib.get_close_matches(path.stem, recipes(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"installed recipes are {', '.join(recipes())}"
    raise ValueError(f"--config {name}: no such file or recipe; {hint}")


def split_overrides(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separate the settings (`section.field=value`) from the other words of a command line.

    argparse would give them to an option that takes several values: `--test-donors d1 d2 train.seed=1`.

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
    """The command as it was called: `screformer NAME` or `python -m jobs.NAME`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    as_module = bool(name) and module == f"jobs.{name.split()[0]}"
    return f"python -m jobs.{name}" if as_module else f"screformer {name}"


@contextlib.contextmanager
def _messages(*, verbose: bool, quiet: bool) -> Iterator[None]:
    """Log warnings, or more if verbose; if quiet, suppress progress on stdout and stderr."""
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
