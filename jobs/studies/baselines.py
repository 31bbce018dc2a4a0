"""What scReformer-BERT has to beat.

Other methods on the very same cells and genes, tuned on the validation cells alone.

`BASELINES` is the table of them. Each gets log1p of counts per 10,000 as a sparse matrix (the tokenizer's
values), chooses its one or two settings by macro-F1 on the validation cells, and then labels the test cells
once.

Axes: n cells, g genes, k classes.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

if TYPE_CHECKING:
    pass
from jobs.studies.baseline_cells import Answer, BaselineCells, macro_f1, spread, variable_genes
from jobs.studies.scbert import scbert_baseline
from screformer.cost import peak_memory_gb

_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method took."""

    seconds: float
    """Wall time of fitting, choosing and labelling."""
    cpu_seconds: float
    """Time on processors, which other work on the machine does not lengthen."""
    peak_memory_gb: float
    """Largest resident memory of the process, with the cells."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One method to compare with."""

    title: str
    fit: Callable[[BaselineCells, int], Answer]
    """From cells and a seed."""
    seconds_per_1000_cells: float
    """CPU time per 1,000 training cells of 1,265 genes and 7 types, as measured on 4,000; for the estimate of
    `--dry-run`."""
    needs: tuple[str, ...] = ()
    """Modules beyond the main dependencies; extra `baselines` installs them."""

    @property
    def missing(self) -> list[str]:
        """Needed modules that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def run_baseline(name: str, cells: BaselineCells, seed: int) -> tuple[Answer, Cost]:
    """Fit a method of `BASELINES`, choose its settings and label the test cells."""
    start, cpu_start = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        # A weakly regularised fit need not converge to be compared on the validation cells; the rest is about
        # empty classes.
        warnings.simplefilter("ignore")
        answer = BASELINES[name].fit(cells, seed)
    return answer, Cost(
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
        peak_memory_gb=peak_memory_gb(),
    )


def _majority(cells: BaselineCells, seed: int) -> Answer:
    share_k = np.bincount(cells.train.labels_n, minlength=cells.num_classes) / len(cells.train.labels_n)
    num_test = cells.test_x_ng.shape[0]
    return Answer(
        predicted_n=np.full(num_test, int(share_k.argmax())),
        probabilities_nk=np.tile(share_k.astype(np.float32), (num_test, 1)),
        chosen={},
        parameters=cells.num_classes,
    )


def _chosen(
    cells: BaselineCells, settings: Iterable[dict[str, Any]], make: Callable[..., Any], seed: int
) -> Answer:
    """Fit one classifier of scikit-learn's kind per setting, take the best on the validation cells.

    And let it label the test cells.
    """
    best: tuple[float, dict[str, Any], Any] | None = None
    for setting in settings:
        model = make(**setting, random_state=seed).fit(cells.train.x_ng, cells.train.labels_n)
        score = macro_f1(cells.chooser.labels_n, model.predict(cells.chooser.x_ng), cells.num_classes)
        if best is None or score > best[0]:
            best = (score, setting, model)
    assert best is not None
    _, setting, model = best
    probabilities = model.predict_proba(cells.test_x_ng) if hasattr(model, "predict_proba") else None
    return Answer(
        predicted_n=np.asarray(model.predict(cells.test_x_ng), np.int64),
        probabilities_nk=None
        if probabilities is None
        else spread(probabilities, model.classes_, cells.num_classes),
        chosen=setting,
        parameters=int(np.asarray(model.coef_).size + np.asarray(model.intercept_).size),
    )


def _logistic_l2(cells: BaselineCells, seed: int) -> Answer:
    from sklearn.linear_model import LogisticRegression

    def make(**settings: Any) -> Any:
        return LogisticRegression(class_weight="balanced", max_iter=200, **settings)

    return _chosen(cells, ({"C": c} for c in (0.01, 0.1, 1.0, 10.0)), make, seed)


def _logistic_l1(cells: BaselineCells, seed: int) -> Answer:
    from sklearn.linear_model import LogisticRegression

    def make(**settings: Any) -> Any:
        # Source of the choice: saga is the one solver of a multinomial L1 model; its last digits are not
        # worth its time.
        return LogisticRegression(
            l1_ratio=1.0, solver="saga", class_weight="balanced", max_iter=40, tol=1e-2, **settings
        )

    return _chosen(cells, ({"C": c} for c in (0.1, 1.0, 10.0)), make, seed)


def _linear_svm(cells: BaselineCells, seed: int) -> Answer:
    from sklearn.svm import LinearSVC

    def make(**settings: Any) -> Any:
        return LinearSVC(class_weight="balanced", max_iter=300, **settings)

    return _chosen(cells, ({"C": c} for c in (1e-4, 1e-3, 1e-2, 1e-1)), make, seed)


def _pca_knn(cells: BaselineCells, seed: int) -> Answer:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.neighbors import KNeighborsClassifier

    num_components = max(1, min(50, cells.train.x_ng.shape[1] - 1, cells.train.x_ng.shape[0] - 1))
    svd = TruncatedSVD(num_components, random_state=seed).fit(cells.train.x_ng)
    train, chooser, test = (svd.transform(x) for x in (cells.train.x_ng, cells.chooser.x_ng, cells.test_x_ng))
    best: tuple[float, int, Any] | None = None
    for neighbours in sorted({min(count, len(train)) for count in (5, 15, 30)}):
        model = KNeighborsClassifier(neighbours, weights="distance").fit(train, cells.train.labels_n)
        score = macro_f1(cells.chooser.labels_n, model.predict(chooser), cells.num_classes)
        if best is None or score > best[0]:
            best = (score, neighbours, model)
    assert best is not None
    _, neighbours, model = best
    probabilities = spread(model.predict_proba(test), model.classes_, cells.num_classes)
    return Answer(
        predicted_n=probabilities.argmax(1),
        probabilities_nk=probabilities,
        chosen={"neighbours": neighbours},
        parameters=train.size,
    )


def _gradient_boosting(cells: BaselineCells, seed: int) -> Answer:
    import lightgbm

    columns = variable_genes(cells.train.x_ng, 2000)
    train, chooser, test = (
        sparse.csr_matrix(x[:, columns]) for x in (cells.train.x_ng, cells.chooser.x_ng, cells.test_x_ng)
    )
    known = np.isin(cells.chooser.labels_n, cells.train.labels_n)
    best: tuple[float, dict[str, Any], Any] | None = None
    for leaves in (7, 31):
        model = lightgbm.LGBMClassifier(
            n_estimators=150,
            num_leaves=leaves,
            learning_rate=0.1,
            class_weight="balanced",
            colsample_bytree=0.3,
            random_state=seed,
            n_jobs=1,
            verbose=-1,
            deterministic=True,
            force_row_wise=True,
        )
        stop = lightgbm.early_stopping(15, verbose=False)
        model.fit(
            train,
            cells.train.labels_n,
            eval_set=[(chooser[known], cells.chooser.labels_n[known])],
            callbacks=[stop],
        )
        score = macro_f1(cells.chooser.labels_n, model.predict(chooser), cells.num_classes)
        if best is None or score > best[0]:
            best = (
                score,
                {"num_leaves": leaves, "rounds": int(model.best_iteration_ or model.n_estimators)},
                model,
            )
    assert best is not None
    _, setting, model = best
    probabilities = spread(model.predict_proba(test), model.classes_, cells.num_classes)
    parameters = sum(tree["num_leaves"] * 2 - 1 for tree in model.booster_.dump_model()["tree_info"])
    return Answer(
        predicted_n=probabilities.argmax(1),
        probabilities_nk=probabilities,
        chosen=setting,
        parameters=parameters,
    )


def _mlp(cells: BaselineCells, seed: int) -> Answer:
    """One hidden layer of 128 units; the epoch is chosen on the validation cells."""
    import copy

    from sklearn.neural_network import MLPClassifier

    classes = np.unique(cells.train.labels_n)
    model = MLPClassifier(
        hidden_layer_sizes=(128,),
        alpha=1e-4,
        batch_size=min(200, len(cells.train.labels_n)),
        random_state=seed,
    )
    best: tuple[float, int, Any] | None = None
    for epoch in range(1, 13):
        model.partial_fit(cells.train.x_ng, cells.train.labels_n, classes=classes)
        score = macro_f1(cells.chooser.labels_n, model.predict(cells.chooser.x_ng), cells.num_classes)
        if best is None or score > best[0]:
            best = (score, epoch, copy.deepcopy(model))
        elif epoch - best[1] >= 4:
            break
    assert best is not None
    _, epoch, model = best
    probabilities = spread(model.predict_proba(cells.test_x_ng), model.classes_, cells.num_classes)
    parameters = sum(weight.size for weight in (*model.coefs_, *model.intercepts_))
    return Answer(
        predicted_n=probabilities.argmax(1),
        probabilities_nk=probabilities,
        chosen={"epochs": epoch},
        parameters=parameters,
    )


def _celltypist(cells: BaselineCells, seed: int) -> Answer:
    """CellTypist trained on the fold, as its authors say.

    SGD logistic regression, then again on the genes it weighs most.
    """
    import logging

    import celltypist
    from anndata import AnnData

    logging.getLogger("celltypist.logger").setLevel(logging.ERROR)
    names = np.array([f"class{code}" for code in range(cells.num_classes)], dtype=object)

    def data(values_ng: Any) -> AnnData:
        found = AnnData(values_ng)
        found.var_names = list(cells.genes)
        return found

    def label(model: Any, x_ng: sparse.csr_matrix) -> np.ndarray:
        """One-against-rest scores, (n, k), a few dense cells at a time.

        Sparse ones fail in CellTypist 1.7 unless they were centred.
        """
        whole = np.zeros((x_ng.shape[0], cells.num_classes), np.float32)
        for start in range(0, len(whole), _CHUNK):
            found = celltypist.annotate(
                data(x_ng[start : start + _CHUNK].toarray()), model=model
            ).probability_matrix
            whole[start : start + _CHUNK, [int(name.removeprefix("class")) for name in found.columns]] = (
                found.to_numpy()
            )
        return whole

    expressed = len(np.unique(cells.train.x_ng.indices))
    best: tuple[float, dict[str, Any], Any] | None = None
    for alpha in (1e-4, 1e-3):
        # Without centring, so that the training cells stay sparse.
        model = celltypist.train(
            data(cells.train.x_ng),
            labels=names[cells.train.labels_n],
            use_SGD=True,
            alpha=alpha,
            feature_selection=expressed > 300,
            top_genes=300,
            with_mean=False,
            check_expression=False,
            n_jobs=1,
            max_iter=200,
            random_state=seed,
        )
        score = macro_f1(
            cells.chooser.labels_n, label(model, cells.chooser.x_ng).argmax(1), cells.num_classes
        )
        if best is None or score > best[0]:
            best = (score, {"alpha": alpha}, model)
    assert best is not None
    _, setting, model = best
    spread = label(model, cells.test_x_ng)
    predicted = spread.argmax(1)
    # Divided by their sum they can be read as probabilities.
    spread /= np.maximum(spread.sum(1, keepdims=True), 1e-12)
    return Answer(
        predicted_n=predicted,
        probabilities_nk=spread,
        chosen=setting,
        parameters=int(model.classifier.coef_.size),
    )


def _spearman_centroid(cells: BaselineCells, seed: int) -> Answer:
    """SingleR's idea: rank correlation with each type's mean, over genes that separate pairs of types."""
    classes = np.unique(cells.train.labels_n)
    mean_kg = np.stack(
        [np.asarray(cells.train.x_ng[cells.train.labels_n == code].mean(0)).ravel() for code in classes]
    )

    def rank_rows(values: np.ndarray) -> np.ndarray:
        ranks = rankdata(values, axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        return ranks / np.maximum(np.linalg.norm(ranks, axis=1, keepdims=True), 1e-12)

    def correlations(x_ng: sparse.csr_matrix, columns: np.ndarray) -> np.ndarray:
        centroids = rank_rows(mean_kg[:, columns])
        chunks = [
            rank_rows(x_ng[start : start + _CHUNK][:, columns].toarray()) @ centroids.T
            for start in range(0, x_ng.shape[0], _CHUNK)
        ]
        return np.concatenate(chunks) if chunks else np.zeros((0, len(classes)))

    best: tuple[float, int, np.ndarray] | None = None
    for top in (10, 20, 50, 100):
        pairs = [(a, b) for a in range(len(classes)) for b in range(len(classes)) if a != b]
        marked = [np.argsort(-(mean_kg[a] - mean_kg[b]), kind="stable")[:top] for a, b in pairs]
        columns = np.unique(np.concatenate(marked)) if marked else np.arange(mean_kg.shape[1])
        found = classes[correlations(cells.chooser.x_ng, columns).argmax(1)]
        score = macro_f1(cells.chooser.labels_n, found, cells.num_classes)
        if best is None or score > best[0]:
            best = (score, top, columns)
    assert best is not None
    _, top, columns = best
    predicted = classes[correlations(cells.test_x_ng, columns).argmax(1)]
    return Answer(
        predicted_n=predicted,
        chosen={"markers_per_pair": top, "genes": len(columns)},
        parameters=len(classes) * len(columns),
    )


BASELINES: dict[str, Baseline] = {
    "majority": Baseline(title="most frequent type", fit=_majority, seconds_per_1000_cells=0.01),
    "logistic_l2": Baseline(title="logistic regression, L2", fit=_logistic_l2, seconds_per_1000_cells=1.2),
    "logistic_l1": Baseline(title="logistic regression, L1", fit=_logistic_l1, seconds_per_1000_cells=3.5),
    "linear_svm": Baseline(title="linear SVM", fit=_linear_svm, seconds_per_1000_cells=1.2),
    "pca_knn": Baseline(title="SVD + nearest neighbours", fit=_pca_knn, seconds_per_1000_cells=0.2),
    "gradient_boosting": Baseline(
        title="gradient boosting (LightGBM)",
        fit=_gradient_boosting,
        seconds_per_1000_cells=10,
        needs=("lightgbm",),
    ),
    "mlp": Baseline(title="multilayer perceptron", fit=_mlp, seconds_per_1000_cells=0.5),
    "celltypist": Baseline(
        title="CellTypist", fit=_celltypist, seconds_per_1000_cells=1.5, needs=("celltypist",)
    ),
    "spearman_centroid": Baseline(
        title="nearest centroid by Spearman (as SingleR)", fit=_spearman_centroid, seconds_per_1000_cells=0.1
    ),
    "scbert": Baseline(
        title="scBERT's architecture (Performer), small",
        fit=scbert_baseline,
        seconds_per_1000_cells=28,
        needs=("performer_pytorch",),
    ),
}
"""All methods by name, in the order of the report."""


def check_names(names: Sequence[str]) -> list[str]:
    """The baselines of a list of names, or of `all`.

    Raises:
        ValueError: An unknown name.
    """
    for name in names:
        if name != "all" and name not in BASELINES:
            raise ValueError(f"crossval.baselines has no {name!r}; there is all, {', '.join(BASELINES)}")
    return list(BASELINES) if "all" in names else list(dict.fromkeys(names))


def baseline_title(name: str) -> str:
    """How a method is called in reports; a name that is no baseline's is its own title."""
    return BASELINES[name].title if name in BASELINES else name
