# %% [markdown]
# # Label a file and look at the labels
#
# Set `H5AD` to a file of human blood cells with raw counts. Without one, the cells are simulated, which shows
# the steps but no biology.

# %%
import os
from pathlib import Path

import anndata
import scanpy as sc

import screformer
from data_ingest.simulate import simulate_h5ads

path = os.environ.get("H5AD")
if not path:
    Path("simulated").mkdir(exist_ok=True)
    path = simulate_h5ads(Path("simulated"), num_cells=300, seed=0)[0]
adata = anndata.read_h5ad(path)
adata

# %% [markdown]
# `annotate` returns a copy with new columns in `obs`, the model's embedding in `obsm["X_screformer"]` and a
# record of what it did in `uns["screformer"]`. The input keeps its own columns.

# %%
labelled = screformer.annotate(adata, probabilities=True)
labelled.obs["predicted_labels"].value_counts()

# %%
labelled.obs[["predicted_labels", "conf_score", "label_level", "unknown_reason"]].head()

# %% [markdown]
# The embedding replaces a PCA: neighbours, clusters and UMAP start from it.

# %%
sc.pp.neighbors(labelled, use_rep="X_screformer")
sc.tl.leiden(labelled, flavor="igraph", n_iterations=2)
sc.tl.umap(labelled)
sc.pl.umap(labelled, color=["predicted_labels", "conf_score", "leiden"], wspace=0.5)

# %% [markdown]
# A majority vote within clusters smooths the labels of single cells.

# %%
voted = screformer.annotate(labelled, majority_vote="leiden")
(voted.obs["majority_label"] != voted.obs["best_label"].astype(voted.obs["majority_label"].dtype)).mean()

# %% [markdown]
# Look at the cells that are `unknown` before you trust the others: they may be doublets, damaged cells, or a
# type that the model does not know.

# %%
labelled.obs["unknown_reason"].value_counts()
