"""A client's part in masked sums. What it must remember between messages lies in its node's Flower context."""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from torch import nn

from fedmerge.align import needs_images
from fedmerge.align.traces import Traces, sharing
from fedmerge.errors import ParamsError, RoundError
from fedmerge.models import MODELS
from fedmerge.secure import KEYS, PARTIES, SHARES, WORDS, Party, Terms, Total, encode, to_anchor, to_others
from fedmerge.spec import PermSpec, permute
from fedmerge.streams import numpy_stream
from fedmerge.tasks import ARRAYS, CONFIG, ClientTask, Setup, device_of
from fedmerge.training import Training
from fedmerge.types import Params

_NETWORK, _PARTY, _HEAD = "network", "party", "head"


def begin(
    context: Context, client: int, task: ClientTask, terms: Terms, anchor: Params, trained: Training, examples: int
) -> ConfigRecord:
    """Align what was trained to the anchor, keep it, and take part in a sum: its public keys."""
    params = dict(trained.params)
    if terms.aligner:
        model, spec, traces = _architecture(task)
        images = {"model": model, "data": task.split().public_images, "device": device_of(task.device)}
        with sharing(traces):
            order = to_anchor(
                params, anchor, spec=spec, rng=numpy_stream(task.seed, "anchor", task.server_round, client),
                aligner=terms.aligner, restarts=terms.restarts,
                aligner_options=images if needs_images(terms.aligner) else None,
            )  # fmt: skip
        params = permute(params, order, spec=spec)
    last = {"loss": trained.losses, "accuracy": trained.accuracies}
    said = not task.is_private  # as without masks: what is not blurred is not said
    params |= {f"/{name}": torch.tensor(float(of[-1]) if said and len(of) else 0.0) for name, of in last.items()}
    context.state[_NETWORK] = ArrayRecord(params)
    return _join(context, Party(client, terms.threshold), examples, ())


def realign(content: RecordDict, context: Context, client: int) -> ConfigRecord:
    """Align the network that was summed to the sum less its own, and take part in a sum of the same clients."""
    told: Any = content[CONFIG]
    task, terms = ClientTask.from_config(told), Terms.from_config(told)
    before, kept = _kept(context)
    if terms is None or not kept["opened"] or kept["head"]:
        raise RoundError(f"client {client} has no part in a sum that this one could follow")
    mean, kept_params = _tensors(content[ARRAYS]), _network(context)
    params = {name: kept_params[name] for name in mean}
    rng = numpy_stream(task.seed, "others", task.server_round, client)
    (_, spec, _), examples = _architecture(task), int(kept["examples"])
    order = to_others(params, Total(mean, int(told["masked-weight"])), examples, spec=spec, rng=rng)
    context.state[_NETWORK] = ArrayRecord({**kept_params, **permute(params, order, spec=spec)})
    stayed = list(kept["stayed"])
    # Of two sums of nearly the same networks, the one with a client less would tell that client's network.
    return _join(context, Party(client, max(before.threshold, len(stayed))), examples, stayed)


def head(content: RecordDict, context: Context, client: int) -> ConfigRecord:
    """Add up what the last layer of the network sent can be made of, and take part in a sum of that.

    Sums of other clients than the last one of this kind are refused: of two, the difference is a client's.
    """
    told: Any = content[CONFIG]
    task, terms = ClientTask.from_config(told), Terms.from_config(told)
    if terms is None:
        raise RoundError(f"client {client} was asked for a masked sum without its terms")
    sums = task.head_sums(client, _tensors(content[ARRAYS]))
    context.state[_NETWORK] = ArrayRecord({"gram": sums.gram, "cross": sums.cross})
    last: Any = context.state.get(_HEAD)
    among = [] if last is None else list(last[PARTIES])
    return _join(context, Party(client, max(terms.threshold, len(among))), 1, among, head=True)


def share(content: RecordDict, context: Context) -> ConfigRecord:
    """Send each client its shares of this one's seeds, sealed."""
    party, kept = _kept(context)
    told: Any = content[CONFIG]
    if kept["among"] and set(told[PARTIES]) != set(kept["among"]):
        raise RoundError("a second sum is of all clients of the first, or of none")
    party, sent = party.share(dict(zip(told[PARTIES], told[KEYS], strict=True)))
    _keep(context, party, kept)
    return ConfigRecord({PARTIES: list(sent), SHARES: list(sent.values())})


def mask(content: RecordDict, context: Context) -> ArrayRecord:
    """Send the words of the network under all masks."""
    party, kept = _kept(context)
    told: Any = content[CONFIG]
    try:
        words = encode(_network(context), int(kept["examples"]), len(party.roster))
    except ParamsError:  # which says how large the own numbers are: nobody else's business
        raise RoundError("its network holds numbers for which a masked sum has no room") from None
    party, masked = party.mask(words, dict(zip(told[PARTIES], told[SHARES], strict=True)))
    _keep(context, party, kept)
    return ArrayRecord({WORDS: Array(masked)})


def unmask(content: RecordDict, context: Context) -> ConfigRecord:
    """Give the shares that unmask the sum, and nothing but the sum."""
    party, kept = _kept(context)
    told: Any = content[CONFIG]
    party, opened = party.open(told[PARTIES])
    _keep(context, party, {**kept, "stayed": list(told[PARTIES])})
    if kept["head"]:
        context.state[_HEAD] = ConfigRecord({PARTIES: list(told[PARTIES])})
    return ConfigRecord({PARTIES: list(opened), SHARES: list(opened.values())})


@lru_cache(maxsize=4)
def _known(setup: Setup, make: object) -> tuple[nn.Module, PermSpec, Traces]:
    """The architecture that ``make`` gives today, its symmetries, and what it was traced to."""
    network = setup.network()
    return network, setup.spec(network), Traces()


def _architecture(task: ClientTask) -> tuple[nn.Module, PermSpec, Traces]:
    setup = Setup(**{name: getattr(task, name) for name in Setup.__dataclass_fields__})
    return _known(setup, getattr(MODELS.get(task.model), "make", None))


def _join(context: Context, party: Party, examples: int, among: Collection[int], *, head: bool = False) -> ConfigRecord:
    _keep(context, party, {"examples": examples, "among": list(among), "stayed": [], "head": head})
    return ConfigRecord({KEYS: party.keys})


def _keep(context: Context, party: Party, more: Mapping[str, Any]) -> None:
    """The state of a party as a record that Flower carries."""
    flat: dict[str, Any] = dict(more)
    for name, value in vars(party).items():
        if isinstance(value, Mapping):
            flat |= {f"{name}-of": list(value), name: list(value.values())}
        else:
            flat[name] = value
    context.state[_PARTY] = ConfigRecord(flat)


def _kept(context: Context) -> tuple[Party, dict[str, Any]]:
    record: Any = context.state.get(_PARTY)
    if record is None:
        raise RoundError("this client takes part in no masked sum; its node was started anew, or asked out of turn")
    fields: dict[str, Any] = {name: record[name] for name in Party.__dataclass_fields__}
    for name in ("roster", "sealed"):
        fields[name] = dict(zip(record[f"{name}-of"], record[name], strict=True))
    return Party(**fields), {name: record[name] for name in ("examples", "among", "stayed", "opened", "head")}


def _network(context: Context) -> Params:
    return _tensors(context.state[_NETWORK])


def _tensors(record: Any) -> dict[str, torch.Tensor]:
    return dict(record.to_torch_state_dict())
