"""``fedmerge audit``: attacks on the networks of finished runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.audit.attacking import LEAST, Trial, rows
from experiments.audit.federations import Arena, Indices, aggregated, check, headed, local, start
from experiments.audit.gauge import CLIENT, ENSEMBLE, Gauge
from experiments.audit.risk import guesses, guessing
from experiments.records.audits import FILE, AttackRow, Audit, Curve, RiskRow, SourceRow, best
from experiments.records.keys import differing_keys, spelt
from experiments.records.runs import Run
from fedmerge.data import label_counts
from fedmerge.errors import ConfigError, DataError, RunDirectoryError
from fedmerge.merge import average
from fedmerge.pipeline import Params
from fedmerge.privacy import ATTACKS, Flags, RiskChange, Seen, others, risk_change, source_rate
from fedmerge.progress import steps
from fedmerge.provenance import made_of
from fedmerge.streams import numpy_stream
from server import RunConfig, RunDirectory, read_model
from strategies import STRATEGIES, ClientResult

_TITLES = {CLIENT: "Single client", ENSEMBLE: "Ensemble of clients", "plain-average": "Plain average"}
AVERAGE, LESS_OWN, HEAD = "plain-average", "merged-less-own", "head"
_MEANS = frozenset({"average", "merge-many", "merge-many-paper"})


@dataclass(frozen=True, eq=False)
class Attacked:
    """A run under attack.

    Attributes:
        run: The run.
        trials: Stage -> its networks and their shadows.
        accuracy: Stage -> mean test accuracy of its networks.
        titles: Stage -> what tables call it.
        guesses: Of each audited member its owner, and who it is laid to by the clients' networks and by classes alone.
        target: What its networks predict.
        clients: Whose networks of the last round it has.
    """

    run: Run
    trials: dict[str, Trial]
    accuracy: dict[str, float]
    titles: dict[str, str]
    guesses: tuple[Indices, Indices, Indices]
    target: Gauge
    clients: Sequence[int]


def check_shadows(config: RunConfig, shadows: int) -> None:
    """Refuse an audit that could not be made of a run of ``config``.

    Raises:
        ConfigError: Too few shadows, or a run that cannot be carried out again.
    """
    if shadows < LEAST:
        raise ConfigError(f"{shadows} shadow federations are too few; an attack needs at least {LEAST}")
    if not config.keep_clients:
        raise ConfigError("keep-clients = false: an audit attacks the clients' networks; set keep-clients = true")
    check(config)


def attacked(run: Run, *, shadows: int) -> Attacked:
    """Train the shadows of a run and look at its networks and theirs.

    Raises:
        RunDirectoryError: The run did not finish, or left no networks of its clients.
        DataError: Its images are not what they were.
        ConfigError: Too few shadows, or a strategy that cannot be carried out here.
    """
    config = _checked(run, shadows)
    results = _results(run, config)
    arena = _arena(run, config)
    held, tries = arena.world.split.clients, _failed(run, config)
    target = Gauge(arena, held, [i for i, failed in tries.items() if len(failed - {config.rounds}) < config.rounds - 1])
    stages: list[tuple[str, Params]] = []
    begin = start(arena.world)
    aggregated(arena.world, begin, results, config.rounds, lambda stage, params: stages.append((stage, params)))
    last = read_model(run.path / "model.safetensors")
    if config.head == "analytic":
        stages.append((HEAD, last))
    else:
        stages[-1] = stages[-1][0], last
    kept = {result.client for result in results}
    _look(target, results, stages, [i for i, failed in tries.items() if i in kept or len(failed) < config.rounds])
    seen = [shadow(arena, k, begin).seen for k in steps(f"shadow federations of {run.name}", range(shadows))]
    trials = {
        stage: Trial(mine, Seen.stack([one[stage] for one in seen]), arena.labels)
        for stage, mine in target.seen.items()
    }
    own = {stage.stage: stage.title for stage in run.stages}
    titles = {stage: _TITLES.get(stage) or own.get(stage, stage) for stage in trials}
    titles[LESS_OWN] = f"Merged, less client {results[0].client}'s own"
    told = guesses(arena, target.seen[CLIENT], [held[r.client] for r in results])
    return Attacked(run, trials, target.accuracy, titles, told, target, [result.client for result in results])


def _checked(run: Run, shadows: int) -> RunConfig:
    """The configuration of a run of which an audit can be made."""
    if not run.finished:
        raise RunDirectoryError(f"{run.path} {run.problem}; an audit needs a finished run")
    config = RunConfig.parse(run.config, str(run.path / "config.toml"))
    try:
        check_shadows(config, shadows)
    except ConfigError as error:
        raise ConfigError(f"{run.path}: {error}") from error
    return config


def shadow(arena: Arena, number: int, begin: Params) -> Gauge:
    """A shadow federation from its first round to its last."""
    c, held = arena.config, arena.dealt(number)
    gauge, params = Gauge(arena, held, range(len(held)) if c.rounds > 1 else ()), begin
    stages: list[tuple[str, Params]] = []
    for r in range(1, c.rounds + 1):
        first = arena.first_client(number)
        results = [local(arena, first, i, part, params, server_round=r) for i, part in enumerate(held)]
        stages.clear()
        params = aggregated(arena.world, params, results, r, lambda stage, made: stages.append((stage, made)))
    if c.head == "analytic":
        stages.append((HEAD, headed(arena.world, params, held)))
    _look(gauge, results, stages, range(len(held)))
    return gauge


def _look(
    gauge: Gauge, results: Sequence[ClientResult], stages: Sequence[tuple[str, Params]], owners: Sequence[int]
) -> None:
    """The clients, what is made of them without the server, and the server's stages of the last round.

    ``owners`` are the clients whose images are in them, by this round or one before it.
    """
    world = gauge.arena.world
    gauge.clients(results, owners)
    models, weights = [r.params for r in results], [float(r.examples) for r in results]
    if STRATEGIES[world.config.strategy].aligns:
        gauge.network(AVERAGE, average(models, weights), owners)
    for stage, params in stages:
        gauge.network(stage, params, owners)
        if stage == "merged" and world.pipeline.merger in _MEANS and len(results) > 1:
            rng = numpy_stream(world.config.seed, "less-own")
            share = weights[0] / sum(weights)
            rest = others(params, models[0], share=share, spec=world.spec, rng=rng)
            first = results[0].client
            gauge.network(LESS_OWN, rest, [i for i in owners if i != first], attacker=first)


def _results(run: Run, config: RunConfig) -> list[ClientResult]:
    """The clients' networks of the last round, from the files of the run."""
    files = {i: run.path / "clients" / f"round-{config.rounds}-client-{i}.safetensors" for i in range(config.clients)}
    found = {i: read_model(file) for i, file in files.items() if file.is_file()}
    if not found or not (run.path / "model.safetensors").is_file():
        raise RunDirectoryError(
            f"{run.path} keeps no networks of its clients of round {config.rounds}; run it again with "
            "keep-clients = true"
        )
    lost = {failure.client for failure in run.failures if failure.round == config.rounds}
    if None not in lost and (missing := sorted(set(range(config.clients)) - set(found) - lost)):
        raise RunDirectoryError(
            f"{run.path} keeps no network of client {missing[0]} of round {config.rounds}, whose reply did not fail; "
            "restore clients/, or run it again"
        )
    counts = {i: tuple(run.labels.get(f"client {i}", ())) for i in sorted(found)}
    return [ClientResult(i, found[i], sum(held), label_counts=held) for i, held in counts.items()]


def _failed(run: Run, config: RunConfig) -> dict[int, set[int]]:
    """Client -> the rounds in which its reply failed."""
    return {i: {f.round for f in run.failures if f.client == i} for i in range(config.clients)}


def _arena(run: Run, config: RunConfig) -> Arena:
    """The images of the run, as its seed deals them."""
    try:
        arena = Arena(config)
        now = {holder: tuple(counts) for holder, counts in label_counts(arena.world.split).items()}
    except DataError as error:
        raise DataError(
            f"{run.path}: the images of its split cannot be had, so there is nothing to ask for: {error}"
        ) from error
    begun = (run.env or {}).get("made_of", {})
    if any(begun.get(part, digest) != digest for part, digest in made_of(config.setup()).items()):
        raise DataError(
            f"{run.path}: {config.dataset} is not what the run was trained on (other images, or dealt otherwise); an "
            "audit needs the same images"
        )
    if now != dict(run.labels):
        raise DataError(
            f"{run.path}: {config.dataset} is not what the run was trained on (other numbers of images of a class); an "
            "audit needs the same images"
        )
    return arena


def audit(runs: Sequence[Run], *, shadows: int, probabilities: bool = False) -> Audit:
    """Attack every run, write what was found into its folder, and pool the runs of a setup.

    Args:
        runs: The runs, of which those that did not finish are passed over as long as one did.
        shadows: Shadow federations of each.
        probabilities: Whether what each network predicts is written too, a CSV file a network.

    Returns:
        The rows of all runs together: those that differ in nothing but their seed are pooled, each seed once.

    Raises:
        FedmergeError: As :func:`attacked`.
    """
    began, finished = time.time(), [run for run in runs if run.finished] or list(runs[:1])
    keys, found = differing_keys(finished), list[Attacked]()
    for run in finished:  # before any shadow is trained
        _checked(run, shadows)
    for run in steps("runs audited", finished):
        at = time.time()
        found.append(attacked(run, shadows=shadows))
        write(run.path, _pooled([found[-1]], [""], shadows, time.time() - at))
        if probabilities:
            _write_probabilities(run.path, found[-1].target, found[-1].clients)
    setups = [spelt(run.config, keys) for run in finished]
    # A run that was carried out twice is one run: of equal seeds the last counts, as in reports.
    last = {(setup, run.seed): k for k, (setup, run) in enumerate(zip(setups, finished, strict=True))}
    counted = sorted(last.values())
    return _pooled([found[k] for k in counted], [setups[k] for k in counted], shadows, time.time() - began)


def write(folder: Path, found: Audit) -> None:
    """``audit.json`` and ``audit.csv``."""
    directory = RunDirectory(folder)
    directory.write_text(FILE, found.to_json())
    directory.write_text("audit.csv", found.table().to_csv(index=False))


def _write_probabilities(folder: Path, target: Gauge, clients: Sequence[int]) -> None:
    """What each network predicts of each audited image, as other tools read it: ``probabilities-STAGE.csv``.

    Images that are neither members nor outsiders of a network are left out.
    """
    arena = target.arena
    names = {stage: [stage] for stage in target.probabilities} | {CLIENT: [f"{CLIENT}-{i}" for i in clients]}
    for stage, networks in target.probabilities.items():
        for k, (called, chances) in enumerate(zip(names[stage], networks, strict=True)):
            members, outside = target.seen[stage].members[k], target.seen[stage].outside[k]
            known = {"image": arena.audited, "member": members, "label": arena.labels}
            table = pd.DataFrame(known | dict(zip(arena.images.classes, chances.T.numpy(), strict=True)))
            RunDirectory(folder).write_text(f"probabilities-{called}.csv", table[members | outside].to_csv(index=False))


def _pooled(found: Sequence[Attacked], setups: Sequence[str], shadows: int, seconds: float) -> Audit:
    """The runs of each setup together."""
    made: list[AttackRow] = []
    curves: list[Curve] = []
    sources: list[SourceRow] = []
    risks: list[RiskRow] = []
    for setup in dict.fromkeys(setups):
        same = [one for one, of in zip(found, setups, strict=True) if of == setup]
        # A run of one reply has no stage that is less somebody's own.
        most = max(same, key=lambda one: len(one.trials))
        trials = {stage: [one.trials[stage] for one in same if stage in one.trials] for stage in most.trials}
        accuracy = {s: float(np.mean([one.accuracy[s] for one in same if s in one.trials])) for s in trials}
        of_setup, drawn = rows(trials, most.titles, accuracy, setup)
        made += of_setup
        curves += drawn
        sources += _sources(same, setup)
        risks += _risks(same, most, setup)
    return Audit(
        sentence=sentence(made, risks), shadows=shadows, seconds=round(seconds, 1), rows=tuple(made),
        sources=tuple(sources), curves=tuple(curves), runs=tuple(one.run.name for one in found), risks=tuple(risks),
    )  # fmt: skip


def _sources(found: Sequence[Attacked], setup: str) -> list[SourceRow]:
    owners, networks, classes = (np.concatenate(parts) for parts in zip(*(one.guesses for one in found), strict=True))
    chance = guessing([one.guesses[0] for one in found])
    views = {"each client's own network": networks, "the class alone": classes}
    made = []
    for view, guessed in views.items():
        r = source_rate(guessed, owners)
        made.append(SourceRow(setup=setup, view=view, value=r.value, low=r.low, high=r.high, of=r.of, chance=chance))
    return made


def _risks(found: Sequence[Attacked], most: Attacked, setup: str) -> list[RiskRow]:
    """Of each stage the members of all runs, beside the clients' own networks; none where shadows are too few."""
    made = []
    for stage in list(most.trials)[1:]:
        try:
            changed = RiskChange.stack([_changed(one, stage) for one in found if stage in one.trials])
        except ConfigError:
            continue
        up = changed.rises()
        made.append(
            RiskRow(
                setup=setup, stage=stage, title=most.titles[stage], before=float(changed.before.mean()),
                after=float(changed.after.mean()), rises=up.value, rises_low=up.low, rises_high=up.high,
                surely_rises=changed.surely().value, surely_falls=changed.surely(falls=True).value, of=up.of,
            )
        )  # fmt: skip
    return made


def _changed(one: Attacked, stage: str) -> RiskChange:
    alone, there = (Seen.stack([one.trials[s].target, one.trials[s].shadows]) for s in (CLIENT, stage))
    members: Flags = np.any(one.trials[CLIENT].target.members, axis=0)
    return risk_change(alone, there, members, labels=one.trials[CLIENT].labels)


def sentence(found: Sequence[AttackRow], risks: Sequence[RiskRow] = ()) -> str:
    """What the networks that runs end with leak, beside single clients': the answer of an audit, a sentence a setup."""
    said = []
    for setup in dict.fromkeys(row.setup for row in found):
        last = [row.stage for row in found if row.setup == setup and row.stage != LESS_OWN][-1]
        ends, single = best(found, setup, last), best(found, setup, CLIENT)
        chance = " (no better than guessing)" if ends.auc_low <= 0.5 else ""
        said.append(
            f"{setup + ': ' if setup else ''}the best of {len(ATTACKS)} attacks on the final network ({ends.title}) "
            f"tells a member from another image of its class in {_share(ends)} of pairs{chance}, on a single client's "
            f"network in {_share(single)}; at 1 % false alarms it finds {_found(ends)} of the members, and there "
            f"{_found(single)}."
        )
        said += [_told(risk) for risk in risks if (risk.setup, risk.stage) == (setup, last)]
    return " ".join(line[0].upper() + line[1:] for line in said)


def _told(risk: RiskRow) -> str:
    shares = f"{100 * risk.rises:.0f} % of the members ({100 * risk.rises_low:.0f} to {100 * risk.rises_high:.0f})"
    return (
        f"Beside its owner's network the final one raises the risk of {shares}, where half would seem to if nothing "
        f"changed; beyond chance it raises that of {100 * risk.surely_rises:.1f} % and lowers that of "
        f"{100 * risk.surely_falls:.1f} %."
    )


def _share(row: AttackRow) -> str:
    return f"{100 * row.auc:.1f} % ({100 * row.auc_low:.1f} to {100 * row.auc_high:.1f})"


def _found(row: AttackRow) -> str:
    marked = "" if row.enough_1 else f", of {row.outsiders} non-members too few to say"
    return f"{100 * row.tpr_1:.1f} % ({100 * row.tpr_1_low:.1f} to {100 * row.tpr_1_high:.1f}{marked})"
