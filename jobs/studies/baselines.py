"""The methods scReformer-BERT has to beat, on the same cells and genes.

`BASELINES` lists them. Each gets log1p of counts per 10,000 as a sparse matrix (the tokenizer's
values), chooses its one or two settings by macro-F1 on the validation cells alone, and then labels the test
cells once.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.studies import baseline_methods as methods
from jobs.studies.baseline_cells import Answer, BaselineCells, Candidates, choose
from jobs.studies.scbert import scbert
from screformer.cost import peak_memory_gb


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method cost."""

    seconds: float
    """Wall time of fitting, choosing and labelling."""
    cpu_seconds: float
    """CPU time, which other load on the machine does not affect."""
    peak_memory_gb: float
    """Peak resident memory of the process, including the cells."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One method to compare with."""

    title: str
    candidates: Callable[[BaselineCells, int], Candidates]
    """Takes cells and a seed."""
    seconds_per_1000_cells: float
    """CPU time per 1,000 training cells of 1,265 genes and 7 types, as measured on 4,000; for the estimate of
    `--dry-run`."""
    patience: int = 0
    """Stop after this many candidates without an improvement; 0 tries all."""
    needs: tuple[str, ...] = ()
    """Modules beyond the main dependencies; the extra `baselines` installs them."""

    @property
    def missing(self) -> list[str]:
        """Required modules that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


BASELINES: dict[str, Baseline] = {
    "majority": Baseline(
        title="most frequent type", candidates=methods.majority, seconds_per_1000_cells=0.01
    ),
    "logistic_l2": Baseline(
        title="logistic regression, L2", candidates=methods.logistic_l2, seconds_per_1000_cells=1.2
    ),
    "logistic_l1": Baseline(
        title="logistic regression, L1", candidates=methods.logistic_l1, seconds_per_1000_cells=3.5
    ),
    "linear_svm": Baseline(title="linear SVM", candidates=methods.linear_svm, seconds_per_1000_cells=1.2),
    "pca_knn": Baseline(
        title="SVD + nearest neighbours", candidates=methods.pca_knn, seconds_per_1000_cells=0.2
    ),
    "gradient_boosting": Baseline(
        title="gradient boosting (LightGBM)",
        candidates=methods.gradient_boosting,
        seconds_per_1000_cells=10,
        needs=("lightgbm",),
    ),
    "gradient_boosting_panels": Baseline(
        title="gradient boosting, our inputs",
        candidates=methods.gradient_boosting_panels,
        seconds_per_1000_cells=10,
        needs=("lightgbm",),
    ),
    "mlp": Baseline(
        title="multilayer perceptron", candidates=methods.mlp, seconds_per_1000_cells=0.5, patience=4
    ),
    "celltypist": Baseline(
        title="CellTypist",
        candidates=methods.celltypist,
        seconds_per_1000_cells=1.5,
        needs=("celltypist",),
    ),
    "spearman_centroid": Baseline(
        title="nearest centroid by Spearman (as SingleR)",
        candidates=methods.spearman_centroid,
        seconds_per_1000_cells=0.1,
    ),
    "scbert": Baseline(
        title="scBERT's architecture (Performer), small",
        candidates=scbert,
        seconds_per_1000_cells=28,
        needs=("performer_pytorch",),
    ),
}
"""All methods by name, in the order of the report."""


def run_baseline(name: str, cells: BaselineCells, seed: int) -> tuple[Answer, Cost]:
    """Fit a method of `BASELINES`, choose its settings and label the test cells."""
    start, cpu_start, baseline = time.perf_counter(), time.process_time(), BASELINES[name]
    with warnings.catch_warnings():
        # A weakly regularised fit need not converge to be compared on the validation cells; the other
        # warnings are about empty classes.
        warnings.simplefilter("ignore")
        answer = choose(cells, baseline.candidates(cells, seed), patience=baseline.patience)
    return answer, Cost(
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
        peak_memory_gb=peak_memory_gb(),
    )


def check_names(names: Sequence[str]) -> list[str]:
    """Check the names of baselines; `all` selects every one.

    Raises:
        ValueError: An unknown name.
    """
    for name in names:
        if name != "all" and name not in BASELINES:
            raise ValueError(f"crossval.baselines has no {name!r}; choose from all, {', '.join(BASELINES)}")
    return list(BASELINES) if "all" in names else list(dict.fromkeys(names))


def baseline_title(name: str) -> str:
    """A method's title in reports; a name that is not a baseline is its own title."""
    return BASELINES[name].title if name in BASELINES else name
