# %% [markdown]
# # Which genes are behind a label
#
# Set `H5AD` to a file of human blood cells with raw counts; without one, the cells are simulated.

# %%
import json
import os
from pathlib import Path

import pandas as pd

from data_ingest.simulate import simulate_h5ads
from jobs import explain
from screformer.files import read_csv

path = os.environ.get("H5AD")
if not path:
    Path("simulated").mkdir(exist_ok=True)
    path = str(simulate_h5ads(Path("simulated"), num_cells=300, seed=0)[0])

# %% [markdown]
# Expected gradients of the logits of 20 cells against 20 background cells.

# %%
words = [
    "--model",
    "bundled:blood",
    "--h5ad",
    path,
    "--out",
    "explained",
    "--cells",
    "20",
    "--background",
    "20",
]
assert explain.main(words) == 0

# %%
read_csv(Path("explained") / "classes.csv")[["label", "cells", "top_genes", "markers"]]

# %% [markdown]
# The values of a cell must add up to its logit. If the median error is above 5 %, use more `--nodes`.

# %%
json.loads((Path("explained") / "summary.json").read_text())["additivity_error"]

# %% [markdown]
# All values, one row per class: the mean contribution of each gene.

# %%
means = pd.read_parquet(Path("explained") / "mean_by_class.parquet")
means.T.max(axis=1).sort_values(ascending=False).head(20)
