"""Register and resolve models, and move their aliases."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data_ingest
import screformer
from jobs.tracking.client import (
    existing_store,
    mlflow_client,
    mlflow_package,
    scratch_folder,
    store_address,
    tracking_uri,
)
from jobs.tracking.identity import package_version
from screformer import bundled
from screformer.config import TrackingConfig

logger = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases of the newest registered version and of the version in use. The latter is moved only by hand or by
`jobs.promote`."""


_WEIGHTS = "weights.safetensors"


MODEL_FOLDER = "model"


_LOADING_PACKAGES = (
    "mlflow",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "safetensors",
    "pyyaml",
    "anndata",
    "h5py",
)


_DESCRIPTION_CHARACTERS = 5000  # limit of MLflow's database


def register_model(
    tracking_uri: str, run_id: str, model_dir: str | Path, name: str, *, alias: str = CANDIDATE
) -> int:
    """Register a fine-tuned model directory as the next version of a model, and give it an alias.

    The version is an MLflow `pyfunc` model from code: the file `jobs/tracking/pyfunc.py`, copies of the
    `screformer` package and of the .h5ad reader, the model directory, and a model card that is also the
    version's description. It loads without this repository and without Ray, and contains no pickle.

    Args:
        tracking_uri: The run's store, from `TrackedRun`.
        run_id: The run that produced the model.
        model_dir: Directory written by `screformer.checkpoint.save_model`, with labels.
        name: Registered model; created if missing.
        alias: Alias to move to the new version; empty moves none.

    Returns:
        The version number.

    Raises:
        ValueError: The directory is not a model, or has no classification head.
    """
    from jobs.tracking import pyfunc
    from jobs.tracking.model_card import model_card
    from jobs.tracking.pyfunc import signature_and_example

    client, mlflow = mlflow_client(tracking_uri), mlflow_package()
    model_dir = _model_directory(Path(model_dir), str(model_dir))
    signature, example = signature_and_example(model_dir)
    card = model_card(model_dir, name=name, run_id=run_id)
    experiment_id = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment_id, name=MODEL_FOLDER, source_run_id=run_id, model_type="cell-type-classifier"
    )
    with tempfile.TemporaryDirectory() as scratch:
        # MLflow names an artifact's folder after its source. A fixed name makes versions identical wherever
        # they were trained.
        source = Path(scratch) / "source" / MODEL_FOLDER
        shutil.copytree(model_dir, source)
        package = Path(scratch) / "source" / "screformer"
        shutil.copytree(
            Path(screformer.__file__).parent,
            package,
            ignore=shutil.ignore_patterns("__pycache__", "pretrained"),
        )
        reader = Path(scratch) / "source" / "data_ingest"
        reader.mkdir()
        for module in ("__init__.py", "h5ad.py", "cells.py", "foreign_files.py"):
            shutil.copyfile(Path(data_ingest.__file__).parent / module, reader / module)
        target = Path(scratch) / "pyfunc"
        mlflow.pyfunc.save_model(
            str(target),
            python_model=pyfunc.__file__,
            artifacts={MODEL_FOLDER: str(source)},
            code_paths=[str(package), str(reader)],
            pip_requirements=[
                f"{package_name}=={package_version(package_name).partition('+')[0]}"
                for package_name in _LOADING_PACKAGES
            ],
            signature=signature,
            input_example=example,
            model_config={pyfunc.FILES_ROOT: ""},
            mlflow_model=mlflow.models.Model(run_id=run_id, model_id=logged.model_id),
        )
        (target / "MODEL_CARD.md").write_text(card)
        client.log_model_artifacts(logged.model_id, str(target))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except mlflow_package().exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A database store resolves `models:/` sources through the global tracking URI, which may differ. A server
    # accepts no other source.
    source_uri = f"models:/{logged.model_id}" if tracking_uri.startswith("http") else logged.artifact_location
    short = card
    if len(card) > _DESCRIPTION_CHARACTERS:
        short = f"{card[: _DESCRIPTION_CHARACTERS - 60]}\n\n... more in MODEL_CARD.md\n"
    version = client.create_model_version(
        name, source_uri, run_id, model_id=logged.model_id, description=short
    )
    if alias:
        client.set_registered_model_alias(name, alias, version.version)
    logger.info("registered %s version %s%s", name, version.version, f" as {alias}" if alias else "")
    return int(version.version)


def model_aliases(name: str, tracking: TrackingConfig | None = None) -> dict[str, int]:
    """The aliases of a registered model, with their version numbers.

    Raises:
        ValueError: The model does not exist.
    """
    store = existing_store(tracking or TrackingConfig())
    client = mlflow_client(store)
    try:
        aliases = client.get_registered_model(name).aliases
    except mlflow_package().exceptions.MlflowException as error:
        raise ValueError(f"no registered model {name!r} in {store}: {error.message}") from error
    return {alias: int(version) for alias, version in aliases.items()}


def move_alias(
    name: str, alias: str, version: int, *, reason: Mapping[str, Any], tracking: TrackingConfig | None = None
) -> None:
    """Move an alias to another version and store the reason in its tag `promotion.ALIAS`."""
    client = mlflow_client(tracking_uri(tracking or TrackingConfig()))
    client.set_model_version_tag(
        name, str(version), f"promotion.{alias}", json.dumps(dict(reason), default=str)[:5000]
    )
    client.set_registered_model_alias(name, alias, str(version))


def pinned_model(uri: str, tracking: TrackingConfig | None = None) -> str:
    """The model URI with its alias replaced by the current version number.

    Any other URI or path is returned unchanged.

    Raises:
        ValueError: The model, alias or version does not exist; the message lists the existing ones.
    """
    if not uri.startswith("models:/"):
        return uri
    store = existing_store(tracking or TrackingConfig())
    name, version = _registered(uri, store)
    return f"models:/{name}/{version.version}"


def resolve_model(uri: str, tracking: TrackingConfig | None = None) -> Path:
    """Return a local model directory; download it if needed.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/RUN_ID` (the model that the run logged), a
            bare run id, `bundled:NAME`, a model directory, or a checkpoint directory with a model in it.
        tracking: Where models are kept; defaults to the configuration's default.

    Returns:
        Directory with weights, configuration, vocabulary and labels. A downloaded one is deleted when this
        process ends.

    Raises:
        ValueError: Nothing has that name, or it contains no model.
        ConnectionError: The tracking server does not answer.
    """
    if uri.startswith(bundled.PREFIX):
        return bundled.bundled_model(uri)
    is_run = uri.startswith("runs:/") or re.fullmatch(r"[0-9a-f]{32}", uri)
    if not uri.startswith("models:/") and not is_run:
        return _model_directory(Path(uri.removeprefix("file://")), uri)
    store = existing_store(tracking or TrackingConfig())
    location = _run_model(uri.removeprefix("runs:/"), store) if is_run else _version_location(uri, store)
    target: str | None = None
    if not location.startswith(("/", "file:")):  # local files are read in place
        target = scratch_folder()
    return _model_directory(
        Path(
            mlflow_package().artifacts.download_artifacts(
                artifact_uri=location, dst_path=target, tracking_uri=store_address(store)
            )
        ),
        uri,
    )


def _registered(uri: str, store: str) -> tuple[str, Any]:
    """Name and MLflow version entity of a `models:/` URI."""
    client = mlflow_client(store)
    found = re.fullmatch(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))", uri)
    if found is None:
        raise ValueError(f"model {uri!r} must be models:/NAME@ALIAS or models:/NAME/VERSION")
    name = found["name"]
    try:
        if found["alias"]:
            return name, client.get_model_version_by_alias(name, found["alias"])
        return name, client.get_model_version(name, found["version"])
    except mlflow_package().exceptions.MlflowException as error:
        models = {model.name: model for model in client.search_registered_models()}
        if name not in models:
            known = f"it has {', '.join(sorted(models))}" if models else "it has no models yet"
            raise ValueError(f"model {uri!r}: no registered model {name!r} in {store}; {known}") from error
        versions = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
        aliases = ", ".join(
            f"{alias} -> {version}"
            for alias, version in sorted(client.get_registered_model(name).aliases.items())
        )
        raise ValueError(
            f"model {uri!r} is not in {store}; {name} has versions {', '.join(map(str, versions)) or 'none'}"
            f" and aliases {aliases or 'none'}"
        ) from error


def _version_location(uri: str, store: str) -> str:
    name, version = _registered(uri, store)
    return str(mlflow_client(store).get_model_version_download_uri(name, version.version))


def _run_model(run_id: str, store: str) -> str:
    """Location of a run's model: the registered one, else `model` among the run's artifacts."""
    client = mlflow_client(store)
    try:
        run = client.get_run(run_id)
    except mlflow_package().exceptions.MlflowException as error:
        raise ValueError(f"run {run_id!r} is not in {store}: {error.message}") from error
    models = run.outputs.model_outputs if run.outputs else []
    if models:
        return str(client.get_logged_model(models[-1].model_id).artifact_location)
    if not any(entry.path == MODEL_FOLDER for entry in client.list_artifacts(run_id)):
        raise ValueError(
            f"run {run_id} ({run.info.status}) logged no model; give a pretrain or finetune run that finished"
        )
    return f"{run.info.artifact_uri.rstrip('/')}/{MODEL_FOLDER}"


def _model_directory(directory: Path, uri: str) -> Path:
    for candidate in (directory, directory / MODEL_FOLDER, directory / "artifacts" / MODEL_FOLDER):
        if (candidate / _WEIGHTS).is_file():
            return candidate
    what = "has no" if directory.is_dir() else "is not a directory with"
    raise ValueError(
        f"model {uri!r} {what} {_WEIGHTS}; give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID or a"
        f" model directory"
    )
