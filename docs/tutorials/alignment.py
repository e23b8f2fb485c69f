# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Networks aligned and merged
#
# Networks that were trained from different initialisations compute similar things with different units: unit 7 of one
# is not unit 7 of the other. Their plain average is useless. This tutorial finds the permutations that bring the units
# of five networks into one order, and shows what that changes. It takes some seconds and no download.

# %%
import fedmerge as fm
import matplotlib.pyplot as plt
import numpy as np
import torch

torch.set_num_threads(1)
digits = fm.data.load("digits")
print(f"{len(digits.classes)} classes of images of shape {digits.shape}")

# %% [markdown]
# ## Train five networks on different images
#
# `fm.data.split` deals the images out: a public part that a server may use, a part to choose on, a part to test on,
# and one private part a client.

# %%
shares = fm.data.split(digits, clients=5, rng=np.random.default_rng(0))
test = shares.test_images
form = {"classes": len(digits.classes), "in_shape": digits.shape}


def client(i: int) -> dict[str, torch.Tensor]:
    network = fm.models.build("mlp", seed=i, **form)
    trained = fm.train(
        network,
        network.state_dict(),
        shares.client(i),
        recipe=fm.models.recipe("mlp"),
        epochs=20,
        generator=torch.Generator().manual_seed(i),
    )
    return trained.params


networks = [client(i) for i in range(5)]
model = fm.models.build("mlp", seed=0, **form)


def accuracy(params: dict[str, torch.Tensor]) -> str:
    return f"{fm.evaluate(model, params, test).accuracy:.3f}"


print("each:", *map(accuracy, networks))
print("their plain average:", accuracy(fm.average(networks)))

# %% [markdown]
# ## What may be reordered
#
# `perm_spec` traces the network and finds the groups of units that can change places without changing what the network
# computes. It proves that on a randomised copy before it returns. Any module that `torch.export` follows will do.

# %%
spec = fm.perm_spec(model, test.normalise(test.images[:2]))
print(spec)

# %% [markdown]
# ## Align
#
# `align` returns one permutation a group. A reordered network computes exactly what it did before; only the names of
# its units have changed.

# %%
first, second = networks[:2]
found = fm.align(second, to=first, spec=spec)
moved = fm.permute(second, found.perms, spec=spec)
print("the second network:", accuracy(second), "reordered:", accuracy(moved))

# %% [markdown]
# The straight line between two networks shows what that is good for: the loss rises in the middle before alignment, and
# not after it. The *barrier* is how far it rises above its chord.

# %%
for other, label in ((second, "as they are"), (moved, "aligned")):
    curve = fm.interpolate(model, first, other, test)
    plt.plot(
        curve.alphas,
        curve.losses,
        label=f"{label}: barrier {fm.barrier(curve).loss:.2f}",
    )
plt.xlabel("from the first network (0) to the second (1)")
plt.ylabel("test loss")
plt.legend()
plt.show()

# %% [markdown]
# ## Merge
#
# `merge_many` aligns any number of networks to one another and averages them. `fm.mergers()` lists the other ways to
# merge, and `fm.aligners()` the other ways to find the permutations.

# %%
merged = fm.merge_many(networks, spec=spec)
print("merged:", accuracy(merged.params))
for name, summary in fm.aligners().items():
    print(f"{name}: {summary}")

# %% [markdown]
# Here merging costs little. That is not always so: narrow networks with BatchNorm lose much in one round
# ([the benchmark](../results/benchmark.md) says how much), and clients that begin at one network need no alignment.
