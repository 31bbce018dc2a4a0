"""Where a study stores its results, and which studies it resumes."""

import json
from pathlib import Path

import pytest

from jobs.studies.opening import STUDY, read_study
from jobs.studies.study import Study
from jobs.studies.variants import REFERENCE, by_folds, variants
from screformer.config import ExperimentConfig


def make_study(**overrides):
    return Study(
        config=ExperimentConfig().merge(overrides),
        query=None,
        folds=None,
        label_names=("a", "b"),
        label_cl_ids=("", ""),
        labels_n=None,
        run_dir=Path("study"),
        run=None,
    )  # type: ignore[arg-type]


def test_a_trial_folder_depends_on_what_differs_from_the_recipe():
    study = make_study(**{"model.dim": 64})
    assert study.trial_folder({}) == study.trial_folder({"model.dim": 64, "train.seed": 0})
    assert study.trial_folder({"train.seed": 1}) != study.trial_folder({})
    assert study.trial_folder({"crossval.pretrain": "none"}) != study.trial_folder({})
    assert make_study().trial_folder({"train.lr": 0.1}) == study.trial_folder({"train.lr": 0.1})


def test_configurations_with_equal_pretraining_share_it():
    study = make_study()
    for name, value in (
        ("train.max_steps", 7),
        ("train.class_weighting", "none"),
        ("train.freeze_encoder", True),
        ("model.linear_skip", False),
        ("cluster.num_workers", 2),
        ("labels.min_cells", 2),
    ):
        assert study.pretrained_folder({name: value}, 0) == study.pretrained_folder({}, 0), name
    for name, value in (("train.seed", 1), ("model.depth", 1), ("crossval.pretrain_steps", 7)):
        assert study.pretrained_folder({name: value}, 0) != study.pretrained_folder({}, 0), name
    assert study.pretrained_folder({}, 1) != study.pretrained_folder({}, 0)
    once = {"crossval.pretrain": "once"}
    assert study.pretrained_folder(once, 1) == study.pretrained_folder(once, 0)


def test_variants_that_change_cells_labels_or_folds_have_their_own_folds():
    axes = {
        "attention": ["model.attention=none"],
        "level": ["labels.column=cell_type crossval.pretrain=none", "labels.column=cell_type"],
        "folds": ["crossval.group_by=none", "atlas.tiledb_config.vfs.s3.region=x"],
    }
    listed = variants(ExperimentConfig().merge({"ablation.axes": axes}))
    groups = [(changed, [variant.name for variant in group]) for changed, group in by_folds(listed)]
    assert groups == [
        ({}, [REFERENCE, "model.attention=none"]),
        ({"labels.column": "cell_type"}, axes["level"]),
        ({"crossval.group_by": "none"}, axes["folds"][:1]),
        ({"atlas.tiledb_config.vfs.s3.region": "x"}, axes["folds"][1:]),
    ]
    for axis, message in (
        (["model.dims=8"], "did you mean model.dim"),
        (["split.test_fraction=0"], "split.test_fraction has no effect in ablate"),
    ):
        with pytest.raises(ValueError, match=f"ablation.axes.bad: .*{message}"):
            variants(ExperimentConfig().merge({"ablation.axes": {"bad": axis}}))


def test_a_study_of_an_earlier_version_names_the_version_that_resumes_it(tmp_path):
    (tmp_path / STUDY).write_text(json.dumps({"config": {}, "job": "crossval"}))
    with pytest.raises(
        ValueError, match=r"format is 1, this version resumes 2; resume it with git commit 2dc0365"
    ):
        read_study(str(tmp_path))
    (tmp_path / STUDY).write_text(json.dumps({"format": 3, "code": {"git": "abc"}}))
    with pytest.raises(ValueError, match=r"resume it with git abc, or start a new study .* --folds"):
        read_study(str(tmp_path))
