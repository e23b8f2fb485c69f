"""The stages of a round, in the order of the table, and what each row means."""

from fedmerge.merge import MERGERS
from strategies import STRATEGIES

TITLES = {
    "pretrained": ("Pretrained", "where all clients began: trained on the public split alone"),
    "client-mean": ("Mean client", "each client's own network, mean over clients"),
    "client-best": ("Best client", "the client that is best on val"),
    "ensemble": ("Ensemble of clients", "mean prediction of all clients; as many networks as clients"),
    "plain-average": ("Plain average", "mean of the clients' weights, without alignment"),
    "aggregated": ("Aggregate", "what this strategy makes of the clients"),
    "merged-paper-start": (
        "MergeMany, paper's start",
        "all clients aligned to each other from their own order",
    ),
    "merged": ("MergeMany, anchored", "all clients aligned to one client, then to each other"),
    "repaired": ("+ repair", "statistics of the merged network corrected on the public split"),
    "retrained": ("+ retrain", "trained further on the public split"),
    "averaged": ("Average over rounds", "the global network averaged over the rounds"),
    "plain-average-retrained": ("Plain average + retrain", "the same retraining from the plain average"),
    "client-best-retrained": ("Best client + retrain", "the same retraining from the best client"),
    "public-only": (
        "Public only",
        "trained on the public split alone, as long as a client and the server's own training",
    ),
    "public-only-n": ("Public only, all compute", "the same with the compute of all clients"),
    "centralised": ("Centralised", "trained on public and private images together"),
}


def title(stage: str, *, strategy: str, merger: str, init: str) -> tuple[str, str]:
    """Title and note of a stage in a run of that strategy, merger and initialisation."""
    name, note = TITLES[stage]
    entry = STRATEGIES[strategy]
    if stage == "aggregated" or (stage == "merged" and "merger" in entry.fixes):
        return f"{entry.title}, {init} init", note
    if stage == "merged" and merger != "merge-many":
        return MERGERS[merger].title, "what the merger makes of the clients"
    return name, note
