# %% [markdown]
# # Train a model and compare it
#
# Set `H5AD` to labelled files, separated by spaces, with donors in `obs["donor_id"]`. Without them, the cells
# are simulated. `recipe` is `smoke` here, which trains for seconds; use `blood` for real cells.

# %%
import json
import os
from pathlib import Path

import pandas as pd

from data_ingest.simulate import simulate_h5ads
from jobs import crossval, finetune, ingest

recipe = os.environ.get("RECIPE", "smoke")
files = os.environ.get("H5AD", "").split()
if not files:
    Path("simulated").mkdir(exist_ok=True)
    files = [str(file) for file in simulate_h5ads(Path("simulated"), num_cells=900, seed=0)]

# %% [markdown]
# Each command is also a Python function that takes the words of the command line and returns its exit status.

# %%
assert ingest.main(["--h5ad", *files, "--atlas", "atlas"]) == 0

# %%
assert finetune.main(["--config", recipe, "atlas.uri=atlas"]) == 0

# %% [markdown]
# One split says little. `crossval` leaves each fold of donors out once, and tunes baselines on the same
# cells.

# %%
words = ["atlas.uri=atlas", "crossval.num_folds=2", "crossval.baselines=[majority, logistic_l2]"]
assert crossval.main(["--config", recipe, *words, "cluster.storage_path=studies"]) == 0

# %% [markdown]
# The folder of the study has `report.html` and the same numbers as `report.json`.

# %%
(folder,) = Path("studies").glob("crossval-*")
methods = json.loads((folder / "report.json").read_text())["methods"]
scores = ("macro_f1", "accuracy", "ece")
pd.DataFrame(
    {name: {key: method["metrics"][key]["mean"] for key in scores} for name, method in methods.items()}
).T
