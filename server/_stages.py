"""The stages of a round, in the order of the table, and what each row means."""

from collections.abc import Iterable

from fedmerge.merge import MERGERS
from server._control import CONTROLS
from strategies import STRATEGIES

_BEFORE = {
    "pretrained": ("Pretrained", "where all clients began: trained on the public split alone"),
    "client-mean": ("Mean client", "each client's own network, mean over clients"),
    "client-best": ("Best client", "the client that is best on val"),
}
_SERVER = {
    "aggregated": ("Aggregate", "what this strategy makes of the clients"),
    "merged": ("MergeMany, anchored", "all clients aligned to one client, then to each other"),
    "repaired": ("+ repair", "statistics of the merged network corrected on the public split"),
    "retrained": ("+ retrain", "trained further on the public split"),
    "chosen": ("Best on val", "of all networks that the server made in all rounds the one that is best on val"),
    "head": ("+ head", "its last layer from sums over the clients' private images, if that is better on val"),
    "averaged": ("Average over rounds", "the global network averaged over the rounds"),
}
_AFTER = {
    "ensemble-taught": (
        "Ensemble, as the teacher",
        "all clients made one as the teacher is; as many networks as clients",
    ),
    "fedavg-recomputed": ("FedAvg, recomputed", "the same network with its statistics measured on the public split"),
}

_MASKED = {
    "pretrained": ("Public anchor", "trained on the public split alone; clients align themselves to it"),
    "merged": ("Masked sum", "clients aligned to the public anchor, then to each other's sum; no network was seen"),
}


def in_order(found: Iterable[str] = ()) -> list[str]:
    """All known stages in the order of the table.

    Stages of ``found`` that nobody has named are the strategy's: what is made of its network follows them.
    """
    controls = CONTROLS.seen()
    untrained = [control.stage for control in controls if control.of_clients and not control.retrains]
    known = [*_BEFORE, *untrained, *_SERVER, *(c.stage for c in controls if c.stage not in untrained), *_AFTER]
    own = [stage for stage in found if stage not in known]
    last = known.index("chosen")
    return [*known[:last], *own, *known[last:]]


def title(
    stage: str, *, strategy: str, merger: str, init: str, rounds: int, secure: bool = False, headed: bool = False,
    chosen: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Title and note of a stage in a run of that strategy, merger and initialisation, after so many rounds.

    ``secure`` says that the server sees masked sums; ``headed`` that networks get a new head, ``chosen`` that what is
    handed out is chosen on val: controls that go through all that the merge goes through get both too.
    """
    if secure and (stage == "merged" or (stage == "pretrained" and init == "independent")):
        return _MASKED[stage]
    of_controls = {
        c.stage: (
            c.title + " + head" * (headed and c.follows),
            c.note
            + ", if better on val than without" * (chosen and c.follows)
            + ", and its head in the same way" * (headed and c.follows),
        )
        for c in CONTROLS.seen()
    }
    name, note = (_BEFORE | _SERVER | _AFTER | of_controls).get(stage, (stage, ""))
    entry = STRATEGIES[strategy]
    if stage == "aggregated" or (stage == "merged" and "merger" in entry.fixes):
        return f"{entry.title}, {init} init", note
    if stage == "merged" and merger != "merge-many":
        return MERGERS[merger].title, "what the merger makes of the clients"
    if stage == "fedavg":
        best = ", best on val" * chosen
        return f"{name}, {rounds} round{'s' if rounds > 1 else ''}{best}", note
    return name, note
