"""The baseline methods: each fits one setting after another and yields the fitted labeller.

`choose` in `jobs.studies.baseline_cells` scores the candidates on the validation cells.

Axes: n cells, g genes, k classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from jobs.studies.baseline_cells import (
    BaselineCells,
    Candidate,
    Candidates,
    Cells,
    Labels,
    spread,
    variable_genes,
)
from screformer.additive_start import Labelled, informative_genes, reference_profile

_CHUNK = 2048
"""Cells made dense at a time."""


def majority(cells: BaselineCells, seed: int) -> Candidates:
    """The most frequent class for every cell."""
    share_k = np.bincount(cells.train.labels_n, minlength=cells.num_classes) / len(cells.train.labels_n)

    def label(found: Cells) -> Labels:
        num_cells = len(found.counts)
        return Labels(
            np.full(num_cells, int(share_k.argmax())), np.tile(share_k.astype(np.float32), (num_cells, 1))
        )

    yield Candidate({}, label, lambda: cells.num_classes)


def logistic_l2(cells: BaselineCells, seed: int) -> Candidates:
    """Logistic regression with an L2 penalty."""
    from sklearn.linear_model import LogisticRegression

    def make(c: float) -> Any:
        return LogisticRegression(class_weight="balanced", max_iter=200, C=c, random_state=seed)

    return _linear(cells, make, (0.01, 0.1, 1.0, 10.0))


def logistic_l1(cells: BaselineCells, seed: int) -> Candidates:
    """Logistic regression with an L1 penalty."""
    from sklearn.linear_model import LogisticRegression

    def make(c: float) -> Any:
        # saga is the only solver for a multinomial L1 model; its last digits are not worth the time.
        return LogisticRegression(
            l1_ratio=1.0,
            solver="saga",
            class_weight="balanced",
            max_iter=40,
            tol=1e-2,
            C=c,
            random_state=seed,
        )

    return _linear(cells, make, (0.1, 1.0, 10.0))


def linear_svm(cells: BaselineCells, seed: int) -> Candidates:
    """Linear support vector machine, which gives no probabilities."""
    from sklearn.svm import LinearSVC

    def make(c: float) -> Any:
        return LinearSVC(class_weight="balanced", max_iter=300, C=c, random_state=seed)

    return _linear(cells, make, (1e-4, 1e-3, 1e-2, 1e-1))


def _linear(cells: BaselineCells, make: Callable[[float], Any], cs: Sequence[float]) -> Candidates:
    """A scikit-learn linear classifier for each inverse penalty C."""
    for c in cs:
        model = make(c).fit(cells.train.x_ng, cells.train.labels_n)

        def label(found: Cells, model: Any = model) -> Labels:
            predicted_n = np.asarray(model.predict(found.x_ng), np.int64)
            if not hasattr(model, "predict_proba"):
                return Labels(predicted_n, None)
            probabilities = model.predict_proba(found.x_ng)
            return Labels(predicted_n, spread(probabilities, model.classes_, cells.num_classes))

        def parameters(model: Any = model) -> int:
            return int(np.asarray(model.coef_).size + np.asarray(model.intercept_).size)

        yield Candidate({"C": c}, label, parameters)


def pca_knn(cells: BaselineCells, seed: int) -> Candidates:
    """Truncated SVD, then nearest neighbours weighted by distance."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.neighbors import KNeighborsClassifier

    num_components = max(1, min(50, cells.train.x_ng.shape[1] - 1, cells.train.x_ng.shape[0] - 1))
    svd = TruncatedSVD(num_components, random_state=seed).fit(cells.train.x_ng)
    train_nd = svd.transform(cells.train.x_ng)
    for neighbours in sorted({min(count, len(train_nd)) for count in (5, 15, 30)}):
        model = KNeighborsClassifier(neighbours, weights="distance").fit(train_nd, cells.train.labels_n)
        label = _by_probability(cells, model, lambda found: svd.transform(found.x_ng))
        yield Candidate({"neighbours": neighbours}, label, lambda: train_nd.size)


def gradient_boosting(cells: BaselineCells, seed: int) -> Candidates:
    """LightGBM on the 2,000 most variable genes."""
    columns = variable_genes(cells.train.x_ng, 2000)
    return _boosted(cells, seed, lambda found: sparse.csr_matrix(found.x_ng[:, columns]))


def gradient_boosting_panels(cells: BaselineCells, seed: int) -> Candidates:
    """LightGBM with the inputs of the additive encoder.

    The 1,024 genes that best distinguish types, values scaled by panel, and NaN for unmeasured genes.
    """
    labelled = Labelled(cells.train.cells.counts, cells.train.labels_n, cells.train.datasets_n)
    columns, reference_g = informative_genes(labelled, 1024), reference_profile(labelled)

    def cut(found: Cells) -> np.ndarray:
        values_ni = found.counts.normalised(reference_g)[:, columns].toarray()
        panels = found.counts.panels
        values_ni[~panels.measured_pg[:, columns][panels.panels_n]] = np.nan
        return values_ni

    return _boosted(cells, seed, cut)


def _boosted(cells: BaselineCells, seed: int, cut: Callable[[Cells], Any]) -> Candidates:
    """LightGBM with two sizes of trees; validation cells also choose the number of rounds."""
    import lightgbm

    chooser, known = cells.chooser, np.isin(cells.chooser.labels_n, cells.train.labels_n)
    per_type = len(cells.train.labels_n) // len(np.unique(cells.train.labels_n))
    train, val = cut(cells.train.cells), cut(chooser.cells)[known]
    for leaves in (7, 31):
        model = lightgbm.LGBMClassifier(
            n_estimators=150,
            num_leaves=leaves,
            learning_rate=0.1,
            class_weight="balanced",
            colsample_bytree=0.3,
            min_child_samples=min(20, max(1, per_type // 2)),  # with LightGBM's 20, few cells give no split
            random_state=seed,
            n_jobs=1,
            verbose=-1,
            deterministic=True,
            force_row_wise=True,
        )
        model.fit(
            train,
            cells.train.labels_n,
            eval_set=[(val, chooser.labels_n[known])],
            callbacks=[lightgbm.early_stopping(15, verbose=False)],
        )

        def parameters(model: Any = model) -> int:
            return sum(tree["num_leaves"] * 2 - 1 for tree in model.booster_.dump_model()["tree_info"])

        setting = {"num_leaves": leaves, "rounds": int(model.best_iteration_ or model.n_estimators)}
        yield Candidate(setting, _by_probability(cells, model, cut), parameters)


def mlp(cells: BaselineCells, seed: int) -> Candidates:
    """One hidden layer of 128 units; a candidate after each of its first twelve epochs."""
    from sklearn.neural_network import MLPClassifier

    classes = np.unique(cells.train.labels_n)
    model = MLPClassifier(
        hidden_layer_sizes=(128,),
        alpha=1e-4,
        batch_size=min(200, len(cells.train.labels_n)),
        random_state=seed,
    )
    for epoch in range(1, 13):
        model.partial_fit(cells.train.x_ng, cells.train.labels_n, classes=classes)
        kept = copy.deepcopy(model)

        def parameters(kept: Any = kept) -> int:
            return sum(weight.size for weight in (*kept.coefs_, *kept.intercepts_))

        yield Candidate({"epochs": epoch}, _by_probability(cells, kept), parameters)


def celltypist(cells: BaselineCells, seed: int) -> Candidates:
    """CellTypist trained on the fold as its authors recommend.

    SGD logistic regression, then again on the genes with the largest weights.
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

    expressed = len(np.unique(cells.train.x_ng.indices))
    for alpha in (1e-4, 1e-3):
        # No centring: the training cells stay sparse.
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

        def label(found: Cells, model: Any = model) -> Labels:
            """One-vs-rest scores, computed on a few dense cells at a time.

            CellTypist 1.7 fails on sparse cells unless they were centred.
            """
            x_ng = found.x_ng
            scores_nk = np.zeros((x_ng.shape[0], cells.num_classes), np.float32)
            for start in range(0, len(scores_nk), _CHUNK):
                rows = slice(start, start + _CHUNK)
                table = celltypist.annotate(data(x_ng[rows].toarray()), model=model).probability_matrix
                codes = [int(name.removeprefix("class")) for name in table.columns]
                scores_nk[rows, codes] = table.to_numpy()
            predicted_n = scores_nk.argmax(1)
            # Divided by their sum, they can be read as probabilities.
            scores_nk /= np.maximum(scores_nk.sum(1, keepdims=True), 1e-12)
            return Labels(predicted_n, scores_nk)

        def parameters(model: Any = model) -> int:
            return int(model.classifier.coef_.size)

        yield Candidate({"alpha": alpha}, label, parameters)


def spearman_centroid(cells: BaselineCells, seed: int) -> Candidates:
    """SingleR's idea: rank correlation with each type's mean, over genes that separate pairs of types."""
    classes = np.unique(cells.train.labels_n)
    mean_kg = np.stack(
        [np.asarray(cells.train.x_ng[cells.train.labels_n == code].mean(0)).ravel() for code in classes]
    )
    pairs = [(a, b) for a in range(len(classes)) for b in range(len(classes)) if a != b]

    def rank_rows(values: np.ndarray) -> np.ndarray:
        ranks = rankdata(values, axis=1)
        ranks -= ranks.mean(1, keepdims=True)
        return ranks / np.maximum(np.linalg.norm(ranks, axis=1, keepdims=True), 1e-12)

    for top in (10, 20, 50, 100):
        marked = [np.argsort(-(mean_kg[a] - mean_kg[b]), kind="stable")[:top] for a, b in pairs]
        columns = np.unique(np.concatenate(marked)) if marked else np.arange(mean_kg.shape[1])
        centroids_kg = rank_rows(mean_kg[:, columns])

        def label(
            found: Cells, columns: np.ndarray = columns, centroids_kg: np.ndarray = centroids_kg
        ) -> Labels:
            x_ng = found.x_ng
            chunks = [
                rank_rows(x_ng[start : start + _CHUNK][:, columns].toarray()) @ centroids_kg.T
                for start in range(0, x_ng.shape[0], _CHUNK)
            ]
            correlation_nk = np.concatenate(chunks) if chunks else np.zeros((0, len(classes)))
            return Labels(classes[correlation_nk.argmax(1)], None)

        def parameters(columns: np.ndarray = columns) -> int:
            return len(classes) * len(columns)

        yield Candidate({"markers_per_pair": top, "genes": len(columns)}, label, parameters)


def _by_probability(
    cells: BaselineCells, model: Any, prepare: Callable[[Cells], Any] = lambda found: found.x_ng
) -> Callable[[Cells], Labels]:
    """Label cells with a fitted scikit-learn classifier: the class with the largest probability."""

    def label(found: Cells) -> Labels:
        probabilities_nk = spread(model.predict_proba(prepare(found)), model.classes_, cells.num_classes)
        return Labels(probabilities_nk.argmax(1), probabilities_nk)

    return label
