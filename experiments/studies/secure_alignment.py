"""What it costs that the server sees masked sums and no client's network."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from flwr.app import Error, Message
from matplotlib.figure import Figure

from experiments.benchmarks.in_process import InProcess
from experiments.report.theme import SERIES, styled
from experiments.studies.page import mean_sd, table
from experiments.studies.study import Cell, Config, Study, Work, each
from server import Run, RunConfig, RunDirectory

_PLAIN, _TWO, _GONE, _EIGHT = "sees everything", "two sums", "two sums, one client gone", "eight sums"
_SERVERS: Mapping[str, Mapping[str, object]] = {
    _PLAIN: {
        "retrain": "labels", "controls": "plain-average, public-only", "keep-clients": False, "local-evaluation": False,
    },
    _TWO: {"secure": True, "controls": "none"},
    _GONE: {"secure": True, "controls": "none"},
    _EIGHT: {"secure": True, "controls": "none", "secure-sums": 8},
}  # fmt: skip
_STAGES = ("client-mean", "plain-average", "public-only", "pretrained", "merged", "retrained")


@dataclass(frozen=True)
class SecureAlignment(Config):
    """``clients``: how many owners; ``client_images`` of each and ``public_fraction``, of ``dataset`` and of digits.

    ``client_images`` 0 deals all images of a data set.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: str = "mnist"
    clients: tuple[int, ...] = (5, 12)
    client_images: tuple[int, int] = (500, 0)
    public_fraction: tuple[float, float] = (0.01, 0.1)
    local_epochs: int = 0


class _Dropping(InProcess):
    """A grid on which the client with the highest number ends when it should send its masked network."""

    def _answer(self, message: Message) -> Message:
        last = self.partition[message.metadata.dst_node_id] == len(self.partition) - 1
        if last and message.metadata.message_type == "query.masked_words":
            return Message(Error(code=0, reason="its process was ended"), reply_to=message)
        return super()._answer(message)


def cells(config: SecureAlignment, work: Work) -> Iterator[Cell]:
    """A run each of every data set, number of owners, seed and server."""
    datasets = list(dict.fromkeys([config.dataset, "digits"]))

    def measure(dataset: str, clients: int, seed: int, server: str) -> dict[str, object]:
        images, public = config.client_images, config.public_fraction
        place = datasets.index(dataset)
        keys = {
            "dataset": dataset, "clients": clients, "seed": seed, "client-images": images[place],
            "public-fraction": public[place], "val-fraction": public[place], "local-epochs": config.local_epochs,
            **_SERVERS[server],
        }  # fmt: skip
        return _measured(keys, server)

    return each(measure, dataset=datasets, clients=config.clients, seed=config.seeds, server=_SERVERS)


def _measured(keys: Mapping[str, object], server: str) -> dict[str, object]:
    """A run of fedmerge over real messages: its stages, bytes and seconds."""
    config = RunConfig.parse(keys)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        grid = (_Dropping if server == _GONE else InProcess)(config.clients)
        Run(config, RunDirectory.open(path, config)).execute(grid)
        summary, env = (json.loads((path / name).read_text()) for name in ("summary.json", "env.json"))
    found = {stage["stage"]: round(stage["accuracy"], 4) for stage in summary["stages"]}
    sums = next(climb["objective"] for climb in summary["merges"])
    return {
        **{stage: found.get(stage, "") for stage in _STAGES},
        "objective": round(max(sums), 4),
        "answered": summary["answered"],
        "bytes_up": summary["sizes"]["bytes_up"],
        "bytes_down": summary["sizes"]["bytes_down"],
        "server_seconds": round(env["server_seconds"], 3),
    }


def _groups(rows: pd.DataFrame) -> Iterator[tuple[str, int, dict[str, pd.DataFrame]]]:
    for (dataset, clients), group in rows.groupby(["dataset", "clients"], sort=False):
        yield str(dataset), int(clients), {str(server): part for server, part in group.groupby("server", sort=False)}


def _ours(rows: pd.DataFrame) -> str:
    head = [
        "data", "clients", "server", "merged", "retrained", "share of the objective", "KB up", "KB down", "CPU s"
    ]  # fmt: skip
    found, beside = [], []
    for dataset, clients, servers in _groups(rows):
        plain = servers[_PLAIN]
        for server, part in servers.items():
            share = f"{part['objective'].mean() / plain['objective'].mean():.2f}" if server != _GONE else "–"
            up, down = (part[name].mean() / clients / 1000 for name in ("bytes_up", "bytes_down"))
            found.append(
                [dataset, clients, server, mean_sd(part["merged"]), mean_sd(part["retrained"]), share,
                 f"{up:.0f}", f"{down:.0f}", f"{part['cpu_seconds'].mean():.1f}"]
            )  # fmt: skip
        anchor = servers[_TWO]["pretrained"]
        controls = [mean_sd(plain[stage]) for stage in ("client-mean", "plain-average", "public-only")]
        beside.append([dataset, clients, *controls, mean_sd(anchor)])
    columns = ["data", "clients", "mean client", "plain average", "public only", "the anchor"]
    return "\n\n".join(
        [
            "Accuracy on the test set in percent, mean ± deviation over seeds; bytes are those of one client. "
            "The objective of fewer clients is another, so it is not held against that of all.",
            table(head, found),
            "Beside them, where nothing is masked:",
            table(columns, beside),
        ]
    )


def _lost(rows: pd.DataFrame, server: str, stage: str) -> Iterable[float]:
    for _, _, servers in _groups(rows):
        plain, masked = (pd.to_numeric(servers[name][stage]).mean() for name in (_PLAIN, server))
        yield 100 * (plain - masked)


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.1f} to {found[-1]:.1f}"


def _answer(rows: pd.DataFrame) -> str:
    two, eight = (
        max(servers[name]["bytes_up"].mean() / servers[_PLAIN]["bytes_up"].mean() for _, _, servers in _groups(rows))
        for name in (_TWO, _EIGHT)
    )
    return f"""
A server that sees two masked sums and no network reaches a merged network that is {_range(_lost(rows, _TWO, "merged"))}
points below that of one that sees everything, and {_range(_lost(rows, _TWO, "retrained"))} points below after the same
retraining on public labels; with eight sums {_range(_lost(rows, _EIGHT, "merged"))} and
{_range(_lost(rows, _EIGHT, "retrained"))}. The masks cost nothing of this, for their sums are exact: what is lost is
that clients align to a public network first and all move at one time. A client sends {two:.1f}
times as many bytes with two sums, {eight:.1f} times with eight, and one that drops out is left out without a trace."""


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    groups = list(_groups(rows))
    fig = Figure(figsize=(8, 3.6), layout="constrained")
    for ax, stage in zip(fig.subplots(1, 2, sharey=True), ("merged", "retrained"), strict=True):
        for k, server in enumerate(_SERVERS):
            at = [i + (k - 1.5) / 5 for i in range(len(groups))]
            values = [100 * pd.to_numeric(servers[server][stage]) for _, _, servers in groups]
            ax.bar(at, [v.mean() for v in values], 0.18, color=SERIES[k], label=server if stage == "merged" else None)
            for x, points in zip(at, values, strict=True):
                ax.plot([x] * len(points), points, ".", color="black", markersize=3)
        ax.set_xticks(range(len(groups)), [f"{dataset}\n{clients} clients" for dataset, clients, _ in groups])
        ax.set(title=stage, ylim=(max(0, 100 * pd.to_numeric(rows["merged"]).min() - 15), 100))
    fig.axes[0].set_ylabel("test accuracy [%]")
    fig.legend(loc="outside lower center", ncols=4)
    return fig


STUDY = Study(
    "secure-alignment",
    cells,
    "merging by masked sums alone, beside a server that sees every network",
    title="Aligning and merging without seeing a network",
    source="ours; masks by Bonawitz et al., Practical Secure Aggregation, CCS 2017",
    question="""
Clients align themselves to a public network and to the mean of the others, and only masked sums leave them. What does
the merged network lose against one that is made by a server that sees every client's network?""",
    cost="some ten minutes on two cores",
    sizes={
        "quick": SecureAlignment(
            seeds=(0,),
            dataset="digits",
            clients=(3,),
            client_images=(100, 0),
            public_fraction=(0.1, 0.1),
            local_epochs=4,
        ),
        "default": SecureAlignment(),
    },
    answer=_answer,
    theirs="""
None that we know of: permutation alignment under secure aggregation has not been published. On planted federations
(permuted copies of one residual network plus noise) two sums reach the objective of the true orders with 12 clients,
also where the public network is worse than the clients are; a test holds that.""",
    ours=_ours,
    explains="""
The sums themselves are exact, integers modulo 2^64, and equal those without masks. Three things differ from the server
that sees everything. The first order comes from a public network trained on few images, and not from the best of the
clients' own. Afterwards all clients move at one time, each to the mean of the others as it was, where MergeMany moves
one after the other until nothing moves: more sums close most of that gap, and each costs another masked network. And
retraining is on labels alone for both, because the clients' ensemble is what only a server has that sees them.

A run in one process (real apps and messages, no sockets), so the seconds hold the work and no latency: a sum is four
exchanges. Public images are few by design; where there are more, training on them alone is a better anchor and a
stronger rival.""",
    draw=_draw,
)
