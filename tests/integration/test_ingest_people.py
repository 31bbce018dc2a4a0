"""Real-world files: valid content is used, everything else is reported, nothing is lost silently."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_ingest import schema
from data_ingest.ingest import ingest
from data_ingest.ingest_obs import look_alikes
from data_ingest.ingest_options import IngestOptions
from data_ingest.measured import measured_by_cells
from helpers.cells import atlas_content, cells, ensembl, write
from screformer.answers import ANSWER_COLUMNS
from screformer.config import AtlasConfig

TERM = "cell_type_ontology_term_id"


def predicted(sample, *, keep_original: bool, record: bool):
    """A file as `annotate` writes it: our columns, and the author's term under another name."""
    if keep_original:
        sample.obs[f"{TERM}_original"] = sample.obs[TERM]
    for name in ANSWER_COLUMNS:
        sample.obs[name] = "CL:0000084" if name == TERM else "T cell"
    if record:
        sample.uns["screformer"] = {"columns": dict.fromkeys(ANSWER_COLUMNS, "fingerprint")}
    return sample


@pytest.mark.parametrize("record", [True, False])
def test_predictions_are_never_used_as_labels(tmp_path: Path, record: bool) -> None:
    report = ingest(
        [write(tmp_path / "a.h5ad", predicted(cells(), keep_original=True, record=record))],
        str(tmp_path / "kept"),
    )
    assert "has model predictions" in "\n".join(report.files[0].lines())
    obs = atlas_content(str(tmp_path / "kept"))[schema.OBS]
    assert obs[TERM].tolist() == cells().obs[TERM].tolist()
    ingest(
        [write(tmp_path / "b.h5ad", predicted(cells(terms=False), keep_original=False, record=record))],
        str(tmp_path / "none"),
    )
    assert set(atlas_content(str(tmp_path / "none"))[schema.OBS][TERM]) == {"unknown"}
    with pytest.raises(ValueError, match="has model predictions, not labels"):
        options = IngestOptions(obs_map={"cell_type": "predicted_labels"})
        ingest([tmp_path / "a.h5ad"], str(tmp_path / "c"), options)


def test_extra_spaces_are_removed_and_look_alikes_reported(tmp_path: Path) -> None:
    sample = cells()
    kinds = np.array(["NK cell", " NK  cell", "NK cells", "nk cell"])
    sample.obs["cell_type"] = kinds[np.arange(60) % 4]
    sample.obs[TERM] = np.where(np.arange(60) % 8 == 0, "CL:0000938", "CL:0000623")
    report = ingest([write(tmp_path / "a.h5ad", sample)], str(tmp_path / "atlas"))
    text = "\n".join(report.files[0].lines())
    assert "cell_type: 'NK cell', 'NK cells', 'nk cell' are different values" in text
    assert "cell_type 'NK cell' has several terms: CL:0000623 (22 cells), CL:0000938 (8 cells)" in text
    assert set(atlas_content(str(tmp_path / "atlas"))[schema.OBS]["cell_type"]) == {
        "NK cell",
        "NK cells",
        "nk cell",
    }


def test_values_that_differ_in_more_than_spelling_are_not_look_alikes() -> None:
    assert look_alikes(["CD4 T", "CD8 T", "B", "donor_1", "donor_2"]) == []
    assert len(look_alikes(["T-cell", "T cell", "B"])) == 1


def test_terms_that_are_newer_or_not_applicable_stay_unknown(tmp_path: Path) -> None:
    sample = cells()
    sample.obs[TERM] = np.array(["na", "CL:9999999", "CL:0000236"])[np.arange(60) % 3]
    report = ingest([write(tmp_path / "a.h5ad", sample)], str(tmp_path / "atlas"))
    assert report.files[0].unmapped == {"missing": {"T": 20}, "newer": {"B": 20}}
    obs = atlas_content(str(tmp_path / "atlas"))[schema.OBS]
    assert obs[TERM].tolist()[:3] == ["unknown", "CL:9999999", "CL:0000236"]


def test_empty_cells_are_counted_and_left_out(tmp_path: Path) -> None:
    sample = cells()
    dense = sample.X.toarray()
    dense[::6] = 0
    sample.X = sparse.csr_matrix(dense)
    path, uri = write(tmp_path / "a.h5ad", sample), str(tmp_path / "atlas")
    report = ingest([path], uri)
    assert (report.cells_added, report.files[0].empty_cells) == (50, 10)
    assert "10 cells have no counts and were left out" in "\n".join(report.files[0].lines())
    assert (atlas_content(uri)[schema.OBS]["raw_sum"] > 0).all()
    again = ingest([path], uri)
    assert again.cells_added == 0 and "50 of them already in the atlas" in again.files[0].lines()[0]


def test_genes_of_a_virus_and_spike_ins_are_left_out(tmp_path: Path) -> None:
    sample = cells()
    var = pd.concat(
        [sample.var, pd.DataFrame({"feature_id": ["ENSSASG00005000002", "ERCC-00002"], "gene_symbol": "x"})]
    )
    sample = type(sample)(
        sparse.csr_matrix(sparse.hstack([sample.X, np.ones((60, 2))]), dtype=np.float32),
        obs=sample.obs,
        var=var,
    )
    sample.var_names = [*cells().var_names, "virus", "spike"]
    report = ingest([write(tmp_path / "a.h5ad", sample)], str(tmp_path / "atlas"))
    assert (report.genes_total, report.files[0].genes_joined) == (30, 30)


@pytest.mark.parametrize("names", ["barcodes", "numbers"])
def test_a_second_sample_with_the_same_names_is_not_dropped(tmp_path: Path, names: str) -> None:
    uri = str(tmp_path / "atlas")
    for k in (1, 2):
        sample = cells(60, seed=k)
        sample.obs = sample.obs.drop(columns="dataset")
        if names == "numbers":
            sample.obs_names = [str(i) for i in range(60)]
        elif k == 2:
            sample.obs_names = [name if i < 6 else f"other_{i}" for i, name in enumerate(sample.obs_names)]
        (tmp_path / str(k)).mkdir()
        write(tmp_path / str(k) / "matrix.h5ad", sample)
    ingest([tmp_path / "1" / "matrix.h5ad"], uri)
    with pytest.raises(
        ValueError, match="same names as cells of dataset 'matrix' in the atlas, but different counts"
    ):
        ingest([tmp_path / "2" / "matrix.h5ad"], uri)
    options = IngestOptions(constants={"dataset_id": "second"})
    assert ingest([tmp_path / "2" / "matrix.h5ad"], uri, options).cells_total == 120


def test_the_same_cells_are_known_with_other_genes_and_other_labels(tmp_path: Path) -> None:
    uri, again = str(tmp_path / "atlas"), cells(80, range(90, 125))
    again.obs["cell_type"] = "relabelled"
    ingest([write(tmp_path / "a.h5ad", cells())], uri)
    assert ingest([write(tmp_path / "b.h5ad", again)], uri).files[0].new_cells == 20


def test_genes_missing_from_a_file_are_unknown_even_if_its_dataset_has_them(tmp_path: Path) -> None:
    uri = str(tmp_path / "atlas")
    parts = [
        (range(100, 130), 0),
        (range(110, 150), 100),
        (range(100, 130), 200),
        (range(110, 150), 300),
    ]
    for genes, first in parts:
        ingest([write(tmp_path / f"{first}.h5ad", cells(20, genes, first=first))], uri)
    ingest([write(tmp_path / "other.h5ad", cells(20, range(105, 135), dataset="other"))], uri)
    atlas = AtlasConfig(uri=uri)
    obs = atlas_content(uri)[schema.OBS]
    var = atlas_content(uri)[schema.VAR]
    number_n, measured_dg = measured_by_cells(atlas, obs["dataset_id"], obs["soma_joinid"].to_numpy())
    assert len(measured_dg) == 3
    expected = [*parts, (range(105, 135), 400)]
    for start, (genes, _) in zip(range(0, 100, 20), expected, strict=True):
        found = set(var["feature_id"][measured_dg[number_n[start]]])
        assert found == set(ensembl(genes)) and len(set(number_n[start : start + 20])) == 1


def test_values_are_compared_with_those_of_the_atlas(tmp_path: Path) -> None:
    uri, other = str(tmp_path / "atlas"), cells(20, dataset="other")
    other.obs["donor_id"] = "Donor-A"
    assert ingest([write(tmp_path / "a.h5ad", cells())], uri).notes == ()
    notes = ingest([write(tmp_path / "b.h5ad", other)], uri).notes
    assert notes == (
        "donor_id: 'Donor-A', 'donor_a' are different values; if they mean the same, use one spelling",
    )
