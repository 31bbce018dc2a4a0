"""Settings: rejected values and their messages, overrides, and round trips through files and processes."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from screformer.config import WITHOUT_EFFECT, ExperimentConfig, sections, touching
from screformer.settings import TOUCHES

BASE = ExperimentConfig()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.n_hashs=8", "unknown setting model.n_hashs; did you mean model.n_hashes?"),
        ("modle.dim=8", "unknown setting modle; did you mean model?"),
        ("model.qqq=8", "unknown setting model.qqq; known are encoder, input_genes"),
        ("model=8", "override 'model' must read section.field"),
        ("model.dim", "override 'model.dim' must read section.field=value"),
        ("model.dim=wide", "model.dim='wide' must be of type int"),
        ("model.dim=64.5", "model.dim=64.5 must be of type int"),
        ("model.dim=true", "model.dim=True must be of type int"),
        ("model.dim=130", "model.dim=130 is not a multiple of model.heads=4; try model.dim=132"),
        ("model.depth=0", "model.depth=0 must be at least 1"),
        (
            "model.attention=flash",
            "model.attention='flash' must be one of auto, lsh, full, local, random, none",
        ),
        ("model.dropout=1", r"model.dropout=1.0 must be in \[0, 1\)"),
        ("model.reversible=1", "model.reversible=1 must be of type bool"),
        ("model.dim.x=1", "model.dim is not a mapping, so 'model.dim.x' is not a setting"),
        ("query.min_measured=1.1", r"query.min_measured=1.1 must be in \[0, 1\]"),
        ("tokens.max_genes=0", "tokens.max_genes=0 must be at least 1"),
        ("tokens.num_bins=1", r"tokens.num_bins=1 must be in \[2, 1024\]; bin 0 means not detected"),
        ("train.lr=fast", "train.lr='fast' must be a number"),
        ("train.lr=0", "train.lr=0.0 must be positive"),
        ("train.mask_rate=1", r"train.mask_rate=1.0 must be in \[0, 1\)"),
        ("train.weight_decay=-1", "train.weight_decay=-1.0 must not be negative"),
        ("train.max_steps=0", "train.max_steps=0 must be at least 1"),
        (
            "train.global_batch_size=40",
            r"global_batch_size=40 is not a multiple of .* \(16 x 1 = 16\); try 32 or 48",
        ),
        ("train.global_batch_size=8", r"global_batch_size=8 is not a multiple of .*; try 16$"),
        ("split.test_fraction=1.0", r"split.test_fraction=1.0 must be in \[0, 1\)"),
        ("split.test_groups=A", r"split.test_groups='A' must be a list, for example \[A, B\]"),
        ("stream.run_length=0", "stream.run_length=0 must be at least 1"),
        ("stream.cells_per_task=32", "stream.cells_per_task=32 must be at least stream.run_length=64"),
        ("labels.min_cells=0", "labels.min_cells=0 must be at least 1"),
        ("zero.stage=4", "zero.stage=4 must be one of 0, 1, 2, 3"),
        ("zero.offload_optimizer=cpu", "zero.offload_optimizer='cpu' needs zero.stage >= 1, not 0"),
        ("cluster.num_workers=0", "cluster.num_workers=0 must be at least 1"),
        (
            "cluster.num_workers=3",
            r"global_batch_size=64 is not a multiple of .* \(16 x 3 = 48\); try 48 or 96",
        ),
        ("cluster.cpus_per_worker=0", "cluster.cpus_per_worker=0.0 must be positive"),
        ("cluster.max_failures=-2", "cluster.max_failures=-2 must be -1 or more"),
        ("tracking.model_name=team/blood", "tracking.model_name='team/blood' must be a name without '/'"),
        ("train.checkpoint_every_minutes=-1", "train.checkpoint_every_minutes=-1.0 must not be negative"),
        ("atlas.tiledb_config=x", "atlas.tiledb_config='x' must be a mapping"),
    ],
)
def test_bad_setting_is_named_with_its_rule(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BASE.merge([overrides])


def test_fields_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"query.file='q.json' already has filters; drop query.obs_filter"):
        BASE.merge(["query.file=q.json", "query.obs_filter=sex == 'male'"])
    with pytest.raises(
        ValueError, match=r"stream.cells_per_task=64 must be at least train.global_batch_size=128"
    ):
        BASE.merge(["stream.cells_per_task=64", "train.global_batch_size=128"])


def test_overrides_are_yaml_and_leave_the_rest() -> None:
    merged = BASE.merge(
        [
            "model.dim=64",
            "train.lr=3e-4",
            "split.test_groups=[A, 7]",
            "zero.stage=2",
            "query.obs_filter=tissue == 'blood'",
        ]
    )
    assert merged.model.dim == 64
    assert merged.train.lr == 3e-4
    assert merged.split.test_groups == ("A", "7")
    assert merged.query.obs_filter == "tissue == 'blood'"
    assert (
        merged.merge(
            {
                "model.dim": 128,
                "train.lr": 1e-3,
                "split.test_groups": [],
                "zero.stage": 0,
                "query.obs_filter": "",
            }
        )
        == BASE
    )


def test_the_rest_of_a_mappings_name_is_its_key() -> None:
    merged = BASE.merge(
        [
            "atlas.tiledb_config.vfs.s3.region=eu-west-1",
            "atlas.tiledb_config.vfs.s3.use_virtual_addressing=false",
        ]
    )
    assert dict(merged.atlas.tiledb_config) == {
        "vfs.s3.region": "eu-west-1",
        "vfs.s3.use_virtual_addressing": "false",
    }
    more = merged.merge({"atlas.tiledb_config.vfs.s3.scheme": "http"})
    assert len(more.atlas.tiledb_config) == 3
    assert len(BASE.atlas.tiledb_config) == 0


def test_round_trip_through_json_and_yaml(tmp_path) -> None:
    config = BASE.merge(
        ["model.attention=full", "split.test_groups=[A, B]", "atlas.tiledb_config.vfs.s3.scheme=http"]
    )
    assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert ExperimentConfig.from_file(path) == config


def test_a_file_that_is_not_a_recipe(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- model\n")
    with pytest.raises(ValueError, match=r"recipe.yaml is a list, not the sections \['atlas'"):
        ExperimentConfig.from_file(path)
    path.write_text("model: 8\n")
    with pytest.raises(ValueError, match=r"model=8 must be a section of \['encoder'"):
        ExperimentConfig.from_file(path)
    path.write_text("model: {bucketsize: 8}\n")
    with pytest.raises(
        ValueError, match=r"unknown setting model.bucketsize; did you mean model.bucket_size\?"
    ):
        ExperimentConfig.from_file(path)


def test_accumulation_fills_the_global_batch() -> None:
    config = BASE.merge(["train.global_batch_size=96", "train.micro_batch_size=8"])
    assert [config.grad_accum_steps(world_size) for world_size in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="try 80 or 120"):
        config.grad_accum_steps(5)


@pytest.mark.parametrize("name", ["smoke", "base", "quickstart", "paper-like"])
def test_recipes_differ_from_the_defaults_only_where_they_say_so(name: str) -> None:
    path = Path(__file__).parents[2] / "jobs" / "recipes" / f"{name}.yaml"
    tree = yaml.safe_load(path.read_text()) or {}
    ExperimentConfig.from_file(path)
    for section, fields in tree.items():
        for field, value in fields.items():
            assert getattr(getattr(BASE, section), field) != value, f"{section}.{field} is the default"


def test_every_setting_declares_what_it_affects() -> None:
    for section, cls in sections().items():
        for item in dataclasses.fields(cls):
            assert "touches" in item.metadata, f"{section}.{item.name}: declare it with setting(...)"
            assert set(item.metadata["touches"]) <= set(TOUCHES), f"{section}.{item.name}"


def test_what_settings_affect() -> None:
    cells, pretraining, weights = (set(touching(touch)) for touch in TOUCHES)
    assert {"query.obs_filter", "labels.column", "crossval.num_folds", "crossval.max_cells"} <= cells
    assert weights == {
        *(f"model.{name}" for name in ("encoder", "input_genes", "dim", "depth", "heads", "attention")),
        *(f"model.{name}" for name in ("ff_mult", "pooling")),
        *(f"tokens.{name}" for name in ("expression", "num_bins")),
    }
    assert weights | {"train.seed", "train.mask_rate", "crossval.pretrain_steps"} <= pretraining
    unread = {"train.max_steps", "train.class_weighting", "train.freeze_encoder", "model.linear_skip"}
    assert not unread & pretraining
    assert not any(name.startswith(("cluster.", "tracking.", "zero.")) for name in cells | pretraining)


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        (
            "crossval",
            "split.val_fraction=0.2",
            r"val_fraction has no effect in crossval.*crossval.group_by",
        ),
        ("ablate", "split.test_groups=[a]", "split.test_groups has no effect in ablate"),
        (
            "ablate",
            "search.space.train.lr=[1, 2]",
            "search.space.train.lr has no effect in ablate",
        ),
        ("ablate", "crossval.register=true", "crossval.register has no effect in ablate"),
        ("crossval", "ablation.num_seeds=2", "ablation.num_seeds has no effect in crossval"),
        ("finetune", "crossval.num_folds=3", "crossval.num_folds has no effect in finetune"),
        ("pretrain", "search.num_samples=3", "search.num_samples has no effect in pretrain"),
    ],
)
def test_a_setting_without_effect_is_refused(command, override, message, tmp_path) -> None:
    name, value = override.split("=")
    section, _, field = name.partition(".")
    with pytest.raises(ValueError, match=message):
        BASE.merge([override], command=command)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({section: {field.partition(".")[0]: yaml.safe_load(value)}}))
    with pytest.raises(ValueError, match=message.partition(".train")[0]):
        ExperimentConfig.from_file(path, command=command)
    assert section not in BASE.to_dict(command) or field not in BASE.to_dict(command)[section]


def test_commands_accept_the_settings_that_they_use() -> None:
    for command, unused in WITHOUT_EFFECT.items():
        used = {name for name in sections() if name not in unused}
        assert {"atlas", "query", "model", "train", "cluster"} <= used
        assert ExperimentConfig.from_dict(BASE.to_dict(command)) == BASE


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("crossval.split=dataset", "crossval.split is called crossval.group_by now"),
        (
            "crossval.group_by=random",
            "'random' is not a column; write crossval.group_by=none",
        ),
        ("split.group_by=donor", "split.group_by='donor' is not a column; write split.group_by=donor_id"),
        ("search.concurrent_trials=2", "search.concurrent_trials is called crossval.concurrent_trials now"),
        ("train.min_lr_ratio=0", "train.min_lr_ratio is no longer a setting; it is always 0.05"),
        ("stream.prefetch_batches=2", "stream.prefetch_batches is no longer a setting$"),
    ],
)
def test_values_of_earlier_versions_name_their_replacement(override, message) -> None:
    with pytest.raises(ValueError, match=message):
        BASE.merge([override])
    name, value = override.split("=")
    section, field = name.split(".")
    with pytest.raises(ValueError, match=message):
        ExperimentConfig.from_dict({section: {field: yaml.safe_load(value)}})


def test_settings_saved_by_an_earlier_version_are_read() -> None:
    old = BASE.to_dict("finetune")
    old["atlas"] |= {"measurement": "RNA", "x_layer": "raw"}
    old["stream"]["prefetch_batches"] = 2
    old["train"] |= {"min_lr_ratio": 0.05, "gene_dropout": 0.2}
    old["zero"]["stage3_param_persistence_threshold"] = 0
    assert ExperimentConfig.from_saved(old) == BASE
    with pytest.raises(ValueError, match="train.gene_dropout=0.2 of this run is always 0.0 now; resume"):
        ExperimentConfig.from_saved(old, resume=True)
    old["train"]["gene_dropout"] = 0.0
    assert ExperimentConfig.from_saved(old, resume=True) == BASE


def test_nested_values_stay_as_they_are() -> None:
    space = {"model.depth": [1, 2], "train.lr": "loguniform(1e-4, 1e-2)", "model.linear_skip": [True, False]}
    config = BASE.merge({"search.space": space, "ablation.axes": {"size": ["model.dim=64 model.depth=1"]}})
    assert config.search.space == space
    assert ExperimentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.merge(["search.space.model.heads=[2, 4]"]).search.space["model.heads"] == [2, 4]
    with pytest.raises(ValueError, match="ablation.axes.size=model.dim=64 must be a list such as"):
        BASE.merge({"ablation.axes": {"size": "model.dim=64"}})


def test_differences_name_what_changed() -> None:
    changed = BASE.merge({"model.dim": 64, "train.seed": 0, "search.space": {"train.lr": [1e-3]}})
    assert changed.differences(BASE) == {"model.dim": 64, "search.space": {"train.lr": [1e-3]}}
    assert BASE.differences(BASE) == {}
