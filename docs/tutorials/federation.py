# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # A federation
#
# This tutorial runs a whole federation: clients with different data train at the same time, a server merges their
# networks, and the run says what that was worth. The clients are [Flower](https://flower.ai) apps on
# [Ray](https://ray.io); on one machine that needs no set-up.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp())


def fedmerge(*arguments: str) -> None:
    """What `fedmerge ...` prints in a terminal."""
    command = [sys.executable, "-m", "fedmerge", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    print(ended.stdout + ended.stderr[-2000:])
    ended.check_returncode()


# %% [markdown]
# ## Run it
#
# Four clients hold the digits of a Dirichlet partition with alpha 0.3, so each sees some classes often and others hardly.
# They begin at networks of their own (`--init independent`, the default), train, and send their networks once.

# %%
fedmerge(
    *"run --clients 4 --partition dirichlet --partition-alpha 0.3 --local-epochs 10 --seed 1 --out mine".split()
)

# %% [markdown]
# ## What the folder holds
#
# `config.toml` is every key as it was used, `metrics.jsonl` a line per round, stage and client, `summary.json` the table,
# `model.safetensors` the network that the server hands out. `report.html` opens in a browser without a server.

# %%
for path in sorted((folder / "mine").iterdir()):
    print(path.name)

# %% [markdown]
# ## Read it
#
# Every file is plain. Which rows of the table beat the best client with the same retraining?

# %%
import json

import pandas as pd

summary = json.loads((folder / "mine" / "summary.json").read_text())
stages = pd.DataFrame(summary["stages"]).set_index("title")[
    ["accuracy", "loss"]
]
print(stages.round(3))

# %% [markdown]
# One run is one draw of data and initialisation. A *grid* repeats a run over seeds and settings and compares them, paired
# by seed: `fedmerge bench demo` runs one that is shipped, and `fedmerge list` names what can stand in a grid.
