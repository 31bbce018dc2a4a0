"""Train the model bundled with screformer from public files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata

from cluster.connect import connect
from data_ingest.ingest import ingest
from data_ingest.ingest_options import IngestOptions
from jobs.tracking.identity import package_version
from jobs.tracking.model_card import model_card
from jobs.training.run import run_training
from screformer import reference
from screformer.checkpoint import load_model, save_model
from screformer.config import ClusterConfig, ExperimentConfig, TrackingConfig
from screformer.settings import plain

SETS = (
    "pbmc3k_10x",
    "zheng17_facs",
    "zheng17_68k_scanpy700",
    "kang18_ctrl_8donors",
    "onek1k_14types_100genes",
    "onek1k_4types",
    "onek1k_bcells",
)
"""Labelled data sets of human blood cells. Cells marked as copies by `duplicate_of` are excluded."""
CARD = "MODEL_CARD.md"
LIMITS = (
    "Other cell types: progenitors, red blood cells, granulocytes, mast cells, innate lymphoid cells and"
    " tumour cells were not in the training sets. Some are flagged as unknown, others get a wrong label.",
    "Tissues other than blood, and other species.",
    "Plasma cells in other assays: those in the training sets come from one panel of 100 genes.",
    "Subtypes like CD4 and CD8 T cells: the labels are major types.",
)


def train_bundled(config: ExperimentConfig, data: Path, scratch: Path, out: Path) -> dict[str, Any]:
    """Train on all donors of the labelled sets, and write the model directory with its card.

    Args:
        config: The recipe's settings.
        data: Folder with the files and their label table `label_map.tsv`.
        scratch: Folder for the atlas, checkpoints and runs.
        out: The model directory to write.

    Returns:
        Folder, size and scores of the model.

    Raises:
        ValueError: A file is missing or cannot be used.
    """
    files = [data / f"{name}.h5ad" for name in SETS]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"--data {data} has no {', '.join(missing)}")
    atlas = scratch / "atlas"
    connect(num_cpus=2)
    options = IngestOptions(
        constants={"tissue_general": "blood"}, labels=data / "label_map.tsv", duplicate_genes="sum"
    )
    ingest([str(path) for path in files], str(atlas), options)
    done = run_training(
        config.merge(
            {
                "atlas.uri": str(atlas.resolve()),
                "split.test_fraction": 0.0,
                "cluster.storage_path": str(scratch.resolve() / "runs"),
                "tracking.uri": f"sqlite:///{scratch.resolve() / 'mlflow.db'}",
                "tracking.model_name": "blood",
            }
        ),
        "finetune",
    )
    write_bundled(Path(done.model_dir), out, [_source(path) for path in files])
    return {
        "model": str(out),
        "megabytes": round(sum(path.stat().st_size for path in out.iterdir()) / 1e6, 2),
        "scores": done.metrics,
    }


def write_bundled(model_dir: Path, out: Path, sources: Sequence[Mapping[str, str]]) -> None:
    """Write a trained model without machine-specific settings, and its card."""
    loaded = load_model(model_dir)
    neutral = {
        "atlas": {"uri": "", "timestamp_ms": 0},
        "cluster": plain(ClusterConfig()),
        "tracking": plain(TrackingConfig()),
    }
    config = ExperimentConfig.from_dict({**loaded.config.to_dict(), **neutral})
    kept = {name: loaded.meta[name] for name in ("task", "split", "notes", "metrics", "best_step")}
    meta = {
        **kept,
        "code": {"screformer": package_version("screformer"), "git": loaded.meta["code"].get("git")},
        "sources": [dict(source) for source in sources],
    }
    save_model(out, loaded.model, config, loaded.vocabulary, loaded.labels, meta, loaded.calibration)
    shutil.copyfile(model_dir / reference.FILE, out / reference.FILE)
    (out / CARD).write_text(_card(out, sources))


def _source(path: Path) -> dict[str, str]:
    """Origin and licence of a file."""
    adata = anndata.read_h5ad(path, backed="r")
    source = {name: str(value) for name, value in adata.uns["source"].items()}
    adata.file.close()
    words = {name: source.get(name, "") for name in ("original_study", "repo", "license")}
    return {"file": path.stem, **words}


def _card(model_dir: Path, sources: Sequence[Mapping[str, str]]) -> str:
    table = [
        "| data set | study | source | licence |",
        "|---|---|---|---|",
        *(f"| {s['file']} | {s['original_study']} | {s['repo']} | {s['license']} |" for s in sources),
        "",
        "The model contains no counts of these data sets, only embeddings of some of their cells. To retrain",
        "it, run `screformer train_bundled`.",
    ]
    about = [
        "Major types of human blood cells. The scores below are for validation cells; docs/results.md has",
        "scores on unseen donors and data sets.",
    ]
    return model_card(
        model_dir,
        name="screformer: blood",
        about=about,
        more={"Sources": table, "Not covered": [f"- {limit}" for limit in LIMITS]},
    )
