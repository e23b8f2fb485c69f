"""The stages of a round, in the order of the table, and what each row means."""

TITLES = {
    "client-mean": ("Mean client", "each client's own network, mean over clients"),
    "client-best": ("Best client", "the client that is best on val"),
    "ensemble": ("Ensemble of clients", "mean prediction of all clients; as many networks as clients"),
    "plain-average": ("Plain average", "mean of the clients' weights, without alignment"),
    "merged-paper-start": (
        "MergeMany, paper's start",
        "all clients aligned to each other from their own order",
    ),
    "merged": ("MergeMany, anchored", "all clients aligned to one client, then to each other"),
    "repaired": ("+ repair", "statistics of the merged network corrected on the public split"),
    "retrained": ("+ retrain", "trained further on the public split"),
    "plain-average-retrained": ("Plain average + retrain", "the same retraining from the plain average"),
    "client-best-retrained": ("Best client + retrain", "the same retraining from the best client"),
    "public-only": (
        "Public only",
        "trained on the public split alone, as long as a client and the retraining",
    ),
    "public-only-n": ("Public only, all compute", "the same with the compute of all clients"),
    "centralised": ("Centralised", "trained on public and private images together"),
    **{
        name: (name_shown, "what this strategy makes of the clients")
        for name, name_shown in {
            "fedavg": "FedAvg",
            "fedprox": "FedProx",
            "fedavgm": "FedAvgM",
            "fedadam": "FedAdam",
            "fedyogi": "FedYogi",
            "fedadagrad": "FedAdagrad",
            "fedmedian": "FedMedian",
            "fedtrimmedavg": "FedTrimmedAvg",
            "krum": "Krum",
            "multikrum": "MultiKrum",
            "bulyan": "Bulyan",
        }.items()
    },
    "fedavg-retrained": ("FedAvg + retrain", "FedAvg, then trained further on the public split"),
}
MERGER_TITLES = {
    "merge-many": "MergeMany, anchored",
    "merge-many-paper": "MergeMany, paper's start",
    "average": "Plain average",
}


def stage_of(step: str, strategy: str) -> str:
    """The stage that a strategy's step (``"aggregated"``, ``"merged"``, ``"repaired"``, ``"retrained"``) is."""
    name = "fedavg" if strategy == "fedavg-retrain" else strategy
    return name if step == "aggregated" else f"{name}-retrained" if name == "fedavg" else step


def title(stage: str, *, merger: str, init: str) -> tuple[str, str]:
    """Title and note of a stage in a run of that merger and initialisation."""
    name, note = TITLES[stage]
    if stage == "merged" and merger != "merge-many":
        return MERGER_TITLES.get(merger, merger), "what the merger makes of the clients"
    return (f"{name}, {init} init", note) if name.startswith("Fed") and init == "shared" else (name, note)
