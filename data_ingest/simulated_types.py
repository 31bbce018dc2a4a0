"""Cell types of simulated data sets and the marker genes they express."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MARKERS: Mapping[str, Mapping[str, str]] = {
    "T cell": {
        "CD3D": "ENSG00000167286",
        "CD3E": "ENSG00000198851",
        "CD3G": "ENSG00000160654",
        "CD2": "ENSG00000116824",
        "TRAC": "ENSG00000277734",
        "BCL11B": "ENSG00000127152",
        "LCK": "ENSG00000182866",
    },
    "CD4 T": {
        "CD4": "ENSG00000010610",
        "IL7R": "ENSG00000168685",
        "LTB": "ENSG00000227507",
        "CCR7": "ENSG00000126353",
        "TCF7": "ENSG00000081059",
        "LEF1": "ENSG00000138795",
        "MAL": "ENSG00000172005",
    },
    "CD8 T": {
        "CD8A": "ENSG00000153563",
        "CD8B": "ENSG00000172116",
        "GZMK": "ENSG00000113088",
        "GZMH": "ENSG00000100450",
    },
    "cytotoxic": {
        "CCL5": "ENSG00000271503",
        "CST7": "ENSG00000077984",
        "NKG7": "ENSG00000105374",
        "PRF1": "ENSG00000180644",
    },
    "NK": {
        "GNLY": "ENSG00000115523",
        "KLRD1": "ENSG00000134539",
        "KLRF1": "ENSG00000150045",
        "NCAM1": "ENSG00000149294",
        "FGFBP2": "ENSG00000137441",
        "SPON2": "ENSG00000159674",
    },
    "B": {
        "MS4A1": "ENSG00000156738",
        "CD79A": "ENSG00000105369",
        "CD79B": "ENSG00000007312",
        "CD19": "ENSG00000177455",
        "BANK1": "ENSG00000153064",
        "CD22": "ENSG00000012124",
        "PAX5": "ENSG00000196092",
        "VPREB3": "ENSG00000128218",
    },
    "plasma": {
        "MZB1": "ENSG00000170476",
        "JCHAIN": "ENSG00000132465",
        "SDC1": "ENSG00000115884",
        "XBP1": "ENSG00000100219",
        "DERL3": "ENSG00000099958",
        "TNFRSF17": "ENSG00000048462",
        "IGHG1": "ENSG00000211896",
        "IGKC": "ENSG00000211592",
    },
    "myeloid": {
        "LYZ": "ENSG00000090382",
        "FCN1": "ENSG00000085265",
        "CTSS": "ENSG00000163131",
        "TYROBP": "ENSG00000011600",
        "AIF1": "ENSG00000204472",
    },
    "CD14 monocyte": {
        "CD14": "ENSG00000170458",
        "S100A8": "ENSG00000143546",
        "S100A9": "ENSG00000163220",
        "S100A12": "ENSG00000163221",
        "VCAN": "ENSG00000038427",
        "CSF3R": "ENSG00000119535",
    },
    "CD16 monocyte": {
        "FCGR3A": "ENSG00000203747",
        "MS4A7": "ENSG00000166927",
        "CDKN1C": "ENSG00000129757",
        "RHOC": "ENSG00000155366",
        "TCF7L2": "ENSG00000148737",
        "LILRB2": "ENSG00000131042",
    },
    "conventional DC": {
        "FCER1A": "ENSG00000179639",
        "CD1C": "ENSG00000158481",
        "CLEC10A": "ENSG00000132514",
        "HLA-DQA1": "ENSG00000196735",
        "CLEC9A": "ENSG00000197992",
        "ENHO": "ENSG00000168913",
    },
    "plasmacytoid DC": {
        "LILRA4": "ENSG00000239961",
        "CLEC4C": "ENSG00000198178",
        "IL3RA": "ENSG00000185291",
        "IRF7": "ENSG00000185507",
        "TCF4": "ENSG00000196628",
        "SERPINF1": "ENSG00000132386",
        "PLD4": "ENSG00000166428",
    },
    "platelet": {
        "PPBP": "ENSG00000163736",
        "PF4": "ENSG00000163737",
        "GP9": "ENSG00000169704",
        "ITGA2B": "ENSG00000005961",
        "TUBB1": "ENSG00000101162",
        "GNG11": "ENSG00000127920",
        "CAVIN2": "ENSG00000168497",
    },
    "endothelial": {
        "PECAM1": "ENSG00000261371",
        "VWF": "ENSG00000110799",
        "CDH5": "ENSG00000179776",
        "CLDN5": "ENSG00000184113",
        "KDR": "ENSG00000128052",
        "EGFL7": "ENSG00000172889",
        "ESAM": "ENSG00000149564",
        "RAMP2": "ENSG00000131477",
    },
    "fibroblast": {
        "COL1A1": "ENSG00000108821",
        "COL1A2": "ENSG00000164692",
        "DCN": "ENSG00000011465",
        "LUM": "ENSG00000139329",
        "PDGFRA": "ENSG00000134853",
        "COL3A1": "ENSG00000168542",
        "FBLN1": "ENSG00000077942",
    },
    "epithelial": {
        "EPCAM": "ENSG00000119888",
        "KRT8": "ENSG00000170421",
        "KRT18": "ENSG00000111057",
        "KRT19": "ENSG00000171345",
        "CDH1": "ENSG00000039068",
        "KRT7": "ENSG00000135480",
        "ELF3": "ENSG00000163435",
        "MUC1": "ENSG00000185499",
    },
}
"""Gene programs: marker symbol to Ensembl gene id (HGNC's current symbols)."""


@dataclass(frozen=True, kw_only=True)
class CellType:
    """A simulated cell type: its Cell Ontology term and the gene programs in `MARKERS` that it expresses."""

    cl_id: str
    name: str
    """The term's label."""
    programs: tuple[str, ...]


CELL_TYPES: Mapping[str, CellType] = {
    "CD4 T": CellType(
        cl_id="CL:0000624", name="CD4-positive, alpha-beta T cell", programs=("T cell", "CD4 T")
    ),
    "CD8 T": CellType(
        cl_id="CL:0000625", name="CD8-positive, alpha-beta T cell", programs=("T cell", "CD8 T", "cytotoxic")
    ),
    "NK": CellType(cl_id="CL:0000623", name="natural killer cell", programs=("NK", "cytotoxic")),
    "B": CellType(cl_id="CL:0000236", name="B cell", programs=("B",)),
    "plasma": CellType(cl_id="CL:0000786", name="plasma cell", programs=("plasma",)),
    "CD14 monocyte": CellType(
        cl_id="CL:0001054", name="CD14-positive monocyte", programs=("myeloid", "CD14 monocyte")
    ),
    "CD16 monocyte": CellType(
        cl_id="CL:0002396", name="CD14-low, CD16-positive monocyte", programs=("myeloid", "CD16 monocyte")
    ),
    "conventional DC": CellType(
        cl_id="CL:0000990", name="conventional dendritic cell", programs=("myeloid", "conventional DC")
    ),
    "plasmacytoid DC": CellType(
        cl_id="CL:0000784", name="plasmacytoid dendritic cell", programs=("plasmacytoid DC",)
    ),
    "platelet": CellType(cl_id="CL:0000233", name="platelet", programs=("platelet",)),
    "endothelial": CellType(cl_id="CL:0000115", name="endothelial cell", programs=("endothelial",)),
    "fibroblast": CellType(cl_id="CL:0000057", name="fibroblast", programs=("fibroblast",)),
    "epithelial": CellType(cl_id="CL:0000066", name="epithelial cell", programs=("epithelial",)),
}
