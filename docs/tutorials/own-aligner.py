# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # An aligner of your own
#
# An aligner is a function of two state dicts and the symmetries of their network. It returns one permutation a group.
# This tutorial writes one, gives it a name, and measures it where the right answer is known.

# %%
import fedmerge as fm
import torch
from fedmerge.align import ALIGNERS, Aligner
from scipy.optimize import linear_sum_assignment
from torch import nn

# %% [markdown]
# ## The symmetries of a network
#
# `spec.sizes()` maps each group to its number of units, and `spec.occurrences(group)` says on which axis of which tensor
# these units stand.

# %%
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
)
spec = fm.perm_spec(model, torch.zeros(2, 6))
for group, size in spec.sizes().items():
    where = [(o.name, o.axis) for o in spec.occurrences(group)]
    print(group, size, where)

# %% [markdown]
# ## The method
#
# This one knows a unit by the sizes of its weights, in whatever order they come: for each tensor of a group the absolute
# weights of the unit, sorted. One assignment a group pairs the units of both networks.


# %%
def by_sizes(params, *, to, spec, rng, restarts=1):
    """Units with weights of similar sizes belong together; no group waits for another."""
    perms = {}
    for group in spec.groups:

        def profile(network, group=group):
            rows = []
            for o in spec.occurrences(group):
                units = (
                    network[o.name]
                    .movedim(o.axis, 0)
                    .reshape(spec.sizes()[group], -1)
                )
                rows.append(units.abs().sort(dim=1).values)
            return torch.cat(rows, dim=1).double()

        distance = torch.cdist(profile(to), profile(params))
        _, order = linear_sum_assignment(distance.numpy())
        perms[group] = torch.as_tensor(order)
    moved = fm.permute(params, perms, spec=spec)
    objective = sum(float((to[n] * moved[n]).sum()) for n in spec.parameters)
    return fm.Alignment(perms, objective, (objective,), 1, converged=True)


# %% [markdown]
# ## A name
#
# One entry makes it a method like any other: `fm.align(..., method="by-sizes")`, `--aligner by-sizes`, a row in
# `fedmerge list`. The registry refuses an entry in which something is missing.

# %%
ALIGNERS.add(
    Aligner("by-sizes", by_sizes, "units whose weights are of similar sizes")
)
print(fm.aligners()["by-sizes"])

# %% [markdown]
# ## Where the answer is known
#
# Reorder a network at random and add noise: the permutation to be found is then known. With little noise every method
# finds it; with more they part.

# %%
generator = torch.Generator().manual_seed(0)
weights = model.state_dict()
planted = spec.random(generator)
shuffled = fm.permute(weights, planted, spec=spec)
units = sum(spec.sizes().values())

for noise in (0.0, 0.02, 0.05, 0.1):
    noisy = {n: w + noise * torch.randn_like(w) for n, w in shuffled.items()}
    for method in ("by-sizes", "forward-greedy", "weight-matching"):
        found = fm.align(noisy, to=weights, spec=spec, method=method)
        right = sum(
            int((planted[g][found.perms[g]] == torch.arange(n)).sum())
            for g, n in spec.sizes().items()
        )
        print(f"noise {noise}: {method} finds {right} of {units} units")

# %% [markdown]
# Sizes alone are a poor guide, because they forget from where a weight comes. Every method is tested so, on planted
# permutations, and on whether the reordered network computes what it did.
