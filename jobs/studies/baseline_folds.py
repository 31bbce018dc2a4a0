"""Fit the baselines of a study on its folds."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from jobs.studies.baselines import BASELINES
from jobs.studies.fold import read_baseline_cells, run_baseline_fold
from jobs.studies.layout import BASELINE_CPUS
from jobs.studies.study import Study


def run_baselines(study: Study, names: Sequence[str]) -> None:
    """Fit the baselines of all folds, one at a time.

    A fold's cells are read once and stay in the object store until its last baseline ends.
    """
    task = ray.remote(num_cpus=BASELINE_CPUS)(run_baseline_fold)
    shared = ray.put(study)
    failed = []
    for fold in range(len(study.folds)):
        missing = [
            name for name in names if not (study.baseline_folder(name) / f"fold-{fold}.json").is_file()
        ]
        if not missing:
            continue
        cells, joinids, labels, known = read_baseline_cells(study, fold)
        reference = ray.put(cells)
        del cells
        for name in missing:
            try:
                ray.get(task.remote(shared, name, fold, reference, joinids, labels, known))
                print(f"fold {study.folds.names[fold]}: {BASELINES[name].title}", flush=True)
            except ray.exceptions.RayTaskError as error:
                failed.append(f"{name} in fold {study.folds.names[fold]}: {error.cause or error}")
    if failed:
        raise RuntimeError(f"{len(failed)} baselines failed; the others' results are kept: {failed[0]}")
