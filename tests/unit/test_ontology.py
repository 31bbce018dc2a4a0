import pickle

import pandas as pd
import pytest

from data_ingest.ontology import MAJOR_TYPES, MajorType, MajorTypes


@pytest.mark.parametrize(
    ("cl_id", "major"),
    [
        ("CL:0000084", "T cell"),  # itself
        ("CL:0000895", "T cell"),  # naive CD4, deep below
        ("CL:0000814", "T cell"),  # NKT: not a natural killer cell
        ("CL:0000623", "natural killer cell"),  # also an innate lymphoid cell; the nearer one
        ("CL:0001071", "innate lymphoid cell"),  # group 3
        ("CL:0000786", "plasma cell"),
        ("CL:0002396", "monocyte"),
        ("CL:0000129", "microglial cell"),  # also a macrophage
        ("CL:0000233", "megakaryocyte/platelet"),  # by `also`
        ("CL:0000038", "erythroid lineage cell"),  # erythroid progenitor: by `before`
        ("CL:0000557", "hematopoietic precursor cell"),
        ("CL:0000681", "neural progenitor cell"),
        ("CL:0000312", "epithelial cell"),
        ("CL:0000173", "epithelial cell"),  # pancreatic D cell: under neuron too
    ],
)
def test_term_rolls_up_to_the_nearest_major_type(cl_id: str, major: str) -> None:
    found = MajorTypes().roll_up(cl_id)
    assert (found.name, found.outcome) == (major, "mapped")
    assert found.cl_id == next(kind.cl_id for kind in MAJOR_TYPES if kind.name == major)


@pytest.mark.parametrize(
    "cl_id", ["CL:0000738", "CL:0011026", "CL:0000000", "CL:0000763"]
)  # leukocyte, progenitor, cell, myeloid
def test_term_broader_than_all_is_unknown(cl_id: str) -> None:
    found = MajorTypes().roll_up(cl_id)
    assert (found.name, found.cl_id, found.outcome) == ("unknown", "unknown", "none")


def test_term_under_several_is_ambiguous_until_one_comes_first() -> None:
    epithelial, neuron = (
        MajorType(name="epithelial", cl_id="CL:0000066"),
        MajorType(name="neuron", cl_id="CL:0000540"),
    )
    found = MajorTypes([epithelial, neuron]).roll_up("CL:0000173")
    assert (found.name, found.outcome, found.candidates) == ("unknown", "ambiguous", ("epithelial", "neuron"))
    first = MajorType(name="epithelial", cl_id="CL:0000066", before=("neuron",))
    assert MajorTypes([first, neuron]).roll_up("CL:0000173").name == "epithelial"


@pytest.mark.parametrize("cl_id", ["", "unknown"])
def test_no_term_is_missing(cl_id: str) -> None:
    assert MajorTypes().roll_up(cl_id).outcome == "missing"


def test_obsolete_term_follows_its_replacement() -> None:
    assert MajorTypes([MajorType(name="cell", cl_id="CL:0000000")]).roll_up("CL:0000003").name == "cell"


def test_ancestors_stay_after_pickling() -> None:
    assert pickle.loads(pickle.dumps(MajorTypes())).roll_up("CL:0000895").name == "T cell"


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ([MajorType(name="x", cl_id="CL:9999999")], "'CL:9999999' is not a Cell Ontology term"),
        ([MajorType(name="x", cl_id="CL:0000084")] * 2, "'x' appears twice"),
        (
            [MajorType(name="x", cl_id="CL:0000084"), MajorType(name="y", cl_id="CL:0000084")],
            "in two major types, 'x' and 'y'",
        ),
    ],
)
def test_invalid_sets_are_rejected(types: list[MajorType], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MajorTypes(types)


def test_set_from_a_table(tmp_path) -> None:
    table = tmp_path / "major.tsv"
    table.write_text("name\tcl_id\talso\nlymphocyte\tCL:0000542\t\nmyeloid\tCL:0000763\tCL:0000451\n")
    majors = MajorTypes.from_table(table)
    assert majors.roll_up("CL:0000236").name == "lymphocyte"
    assert majors.roll_up("CL:0000451").name == "myeloid"


def test_roll_up_agrees_with_the_proposals_for_real_labels(real_data) -> None:
    table = pd.read_csv(real_data / "label_map.tsv", sep="\t", keep_default_na=False)
    blood = table[table["dataset"].isin(["zheng17_facs", "pbmc3k_10x", "kang18_ctrl_8donors"])]
    majors = MajorTypes()
    renamed = {"NK cell": "natural killer cell", "hematopoietic progenitor": "hematopoietic precursor cell"}
    for row in blood.itertuples():
        assert majors.roll_up(row.cl_id).name == renamed.get(row.major_proposal, row.major_proposal), (
            row.cell_type
        )
