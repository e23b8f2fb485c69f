"""The keys of a run: what each may be, what it is if nothing is said, and what it means."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

import strategies
from fedmerge import data, models, running_averages
from fedmerge.align import ALIGNERS
from fedmerge.errors import ConfigError, UnknownNameError
from fedmerge.merge import MERGERS
from fedmerge.normalisation import REPAIRS
from fedmerge.registry import Registry
from fedmerge.retraining import RETRAININGS
from fedmerge.teachers import TEACHERS
from server._control import CONTROLS
from server._text import parse_options, split_list

CHOICES: Mapping[str, Collection[str]] = {
    "partition": data.PARTITIONS,
    "strategy": strategies.STRATEGIES,
    "aligner": ALIGNERS,
    "merger": MERGERS,
    "repair": REPAIRS,
    "retrain": RETRAININGS,
    "teacher": TEACHERS,
    "server_average": ("none", *running_averages()),
    "optimizer": models.OPTIMIZERS,
    "schedule": models.SCHEDULES,
}
SEVERAL = ("default", "all", "none")
"""What stands for several controls at once."""


class Keys(BaseModel):
    """Every key with its type, its bounds, its default and what it means; which values there are to choose from."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        allow_inf_nan=False,
    )

    dataset: str = Field("digits", description="a folder of images or parquet files, or a data set by name")
    model: str = Field("mlp", description="a network by name, of torchvision or of fedmerge")
    width: float = Field(0, ge=0, description=f"the network's width, {models.width_units()}; 0 is its own")
    kernel_size: int = Field(
        0, ge=0, description="side of the kernels, where the network has that option; 0 is its own"
    )
    partition: str = Field("iid", description="how the private images are dealt to the clients")
    partition_alpha: float = Field(0.5, gt=0, description="concentration of the dirichlet partition")
    client_images: int = Field(0, ge=0, description="images a client on average; 0 deals all that there are")
    clients: int = Field(5, ge=1, description="number of clients")
    fraction_train: float = Field(1.0, gt=0, le=1, description="share of the clients asked in each round")
    min_replies: int = Field(1, ge=1, description="fewer usable replies than this fail a round")
    public_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images that is public")
    public_labels: int = Field(0, ge=0, description="so many public images keep their labels; 0 for all")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training images on which choices are made")
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="share cut out for testing where a data set has no test set"
    )
    init: Literal["independent", "shared", "pretrained"] = Field(
        "independent",
        description="where clients begin: each at a network of its own, all at one, or at one trained on public images",
    )
    pretrain_epochs: int = Field(
        0, ge=0, description="passes over the public split before round 1, if pretrained; 0 is local-epochs"
    )
    rounds: int = Field(1, ge=1, description="number of rounds")
    local_epochs: int = Field(0, ge=0, description="a client's passes over its images in a round; 0 is the model's own")
    batch_size: int = Field(0, ge=0, description="images a step; 0 is the model's own")
    lr: float = Field(0.0, ge=0, description="peak learning rate; 0 is the model's own")
    optimizer: str = Field("", description="how weights are moved")
    momentum: float = Field(-1.0, lt=1, description="of sgd; -1 is the model's own")
    nesterov: Literal["", True, False] = Field("", description="Nesterov's form of that momentum")
    weight_decay: float = Field(-1.0, description="share of each weight added to its gradient; -1 is the model's own")
    schedule: str = Field("", description="how the learning rate falls")
    warmup: float = Field(-1.0, lt=1, description="share of the steps over which it rises first; -1 is the model's own")
    label_smoothing: float = Field(
        -1.0, lt=1, description="share of the target spread over all classes; -1 is the model's own"
    )
    augment: Literal["", True, False] = Field("", description="are training images flipped and shifted at random?")
    channels_last: Literal["", True, False] = Field(
        "", description="do images and weights lie channels last in memory while they train? Faster for narrow networks"
    )
    frozen_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the weights that no client moves, so that units keep their places; 0 for none",
    )
    dp_epsilon: float = Field(
        -1.0,
        ge=-1,
        description="privacy that a client may spend in all rounds, by DP-SGD; -1 is without",
    )
    dp_noise: float = Field(
        -1.0, ge=-1, description="noise multiplier of DP-SGD, in place of dp-epsilon; -1 is what dp-epsilon needs"
    )
    dp_clip: float = Field(1.0, gt=0, description="norm to which DP-SGD clips the gradient of an image")
    dp_delta: float = Field(1e-5, gt=0, lt=1, description="probability with which that privacy may fail")
    secret_noise: bool = Field(False, description="is that noise drawn anew, and not from the seed, which all know?")
    strategy: str = Field("merge-many", description="what the server does with the clients' networks")
    strategy_options: str = Field("", description="arguments of the strategy: 'server_momentum=0.9, ...'")
    aligner: str = Field("activation-matching", description="how one network is aligned to another")
    reference: str = Field("largest", description="whom all align to: largest, best (on val) or a client's number")
    restarts: int = Field(5, ge=1, description="climbs per alignment; the best is taken")
    merger: str = Field("merge-many", description="how the networks are combined")
    repair: str = Field("recompute", description="how the merged network's statistics are corrected")
    retrain: str = Field("both", description="on what the merged network is retrained")
    teacher: str = Field("auto", description="how the clients' predictions on public images are made one")
    retrain_epochs: int = Field(0, ge=0, description="passes over the public split; 0 is local-epochs")
    head: Literal["auto", "none", "analytic"] = Field(
        "auto",
        description="analytic: last layer from sums of clients, if better; auto is that where networks are retrained",
    )
    hand_out: Literal["last", "best-on-val"] = Field(
        "last", description="the network a run ends with: the last, or the best on val of all stages and rounds"
    )
    server_average: str = Field("none", description="an average of the global network over the rounds")
    server_average_options: str = Field("", description="its arguments: 'decay=0.9' of ema, 'latest=5' of lawa")
    controls: str = Field(
        "default",
        description="what else to compute, names with commas between them; fedavg trains all clients once more",
    )
    local_evaluation: bool = Field(True, description="do clients evaluate the global network on their own images?")
    keep_clients: bool = Field(True, description="are the clients' last networks written?")
    secure: bool = Field(False, description="do only masked sums of the clients' networks leave them?")
    secure_sums: int = Field(2, ge=1, description="sums in such a round; before each but the first clients align anew")
    private: bool = Field(False, description="is everything refused that reads more than public data and such sums?")
    timeout: float = Field(3600.0, gt=0, description="seconds to wait for the replies of a round")
    seed: int = Field(0, ge=0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where networks are trained")
    name: str = Field("", description="what the run is called in reports; it changes nothing else")
    tags: str = Field("", description="words to find it by in reports, with commas between them")

    @field_validator("model", *CHOICES)
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        choices = CHOICES.get(info.field_name)
        if choices is None:
            models.recipe(value)  # one of torchvision's is as good
        elif isinstance(choices, Registry):
            choices[value]  # or module:name, or of an installed package
        elif value not in (*choices, cls.model_fields[info.field_name].default):
            raise UnknownNameError(info.field_name, value, choices)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: Any) -> Any:
        if cls.model_fields[info.field_name].annotation in (int, float):
            if isinstance(value, bool):
                raise PydanticCustomError("number", "Input should be a number")  # pydantic would take true as 1
            if isinstance(value, int) and value >= 2**63:
                raise PydanticCustomError("number", "Input should be less than 2**63")  # Flower's messages hold no more
        return value

    @field_validator("dataset")
    @classmethod
    def _data_set(cls, value: str) -> str:
        if not data.DATASETS.knows(value) and not Path(value).is_dir():
            raise UnknownNameError("dataset (or folder)", value, data.names())
        return value

    @field_validator("controls")
    @classmethod
    def _controls(cls, value: str) -> str:
        names = split_list(value)
        if "none" in names and set(names) != {"none"}:
            raise ConfigError(f"controls = {value!r} says two things; leave out 'none', or the others")
        for name in names:
            if name in SEVERAL:
                continue
            if not CONTROLS.knows(name):
                raise UnknownNameError("control", name, [*CONTROLS, *SEVERAL])
            CONTROLS[name]  # or module:name, or of an installed package
        return value

    @field_validator("strategy_options", "server_average_options")
    @classmethod
    def _options(cls, value: str, info: Any) -> str:
        parse_options(value, info.field_name.replace("_", "-"))
        return value
