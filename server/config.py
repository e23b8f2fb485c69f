"""The configuration of a run: one flat set of keys, validated once, the same words everywhere."""

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

import strategies
from fedmerge import data, models, running_average, running_averages
from fedmerge.align import ALIGNERS
from fedmerge.errors import ConfigError, FedmergeError, UnknownNameError
from fedmerge.merge import MERGERS, RunningAverage
from fedmerge.normalisation import REPAIRS
from fedmerge.registry import Registry
from fedmerge.tasks import ClientTask, Setup
from server import _private
from server._control import CONTROLS
from server._text import parse_options, read_toml, split_list

_CHOICES: Mapping[str, Collection[str]] = {
    "partition": data.PARTITIONS,
    "strategy": strategies.STRATEGIES,
    "aligner": ALIGNERS,
    "merger": MERGERS,
    "repair": REPAIRS,
    "retrain": strategies.RETRAININGS,
    "server_average": ("none", *running_averages()),
    "optimizer": models.OPTIMIZERS,
    "schedule": models.SCHEDULES,
}
_SEVERAL = ("default", "all", "none")
"""What stands for several controls at once."""
_RECIPE = tuple(f.name for f in fields(models.Recipe) if f.name != "epochs")

LABELS = ("name", "tags")
"""Keys that say what a run is called, and nothing about what it does."""


class RunConfig(BaseModel):
    """Every key of one federated run. In TOML and on the command line, dashes stand for underscores.

    Some values stand for what the model or another key says: 0, ``""``, or -1 where 0 says something. :meth:`parse`
    puts what they stand for in their place: a configuration that was parsed holds none of them, nor does config.toml.
    """

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
    strategy: str = Field("merge-many", description="what the server does with the clients' networks")
    strategy_options: str = Field("", description="arguments of the strategy: 'server_momentum=0.9, ...'")
    aligner: str = Field("activation-matching", description="how one network is aligned to another")
    reference: str = Field("largest", description="whom all align to: largest, best (on val) or a client's number")
    restarts: int = Field(5, ge=1, description="climbs per alignment; the best is taken")
    merger: str = Field("merge-many", description="how the networks are combined")
    repair: str = Field("recompute", description="how the merged network's statistics are corrected")
    retrain: str = Field("both", description="on what the merged network is retrained")
    retrain_epochs: int = Field(0, ge=0, description="passes over the public split; 0 is local-epochs")
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

    @field_validator("model", *_CHOICES)
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        choices = _CHOICES.get(info.field_name)
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
        for name in split_list(value):
            if name in _SEVERAL:
                continue
            if not CONTROLS.knows(name):
                raise UnknownNameError("control", name, [*CONTROLS, *_SEVERAL])
            CONTROLS[name]  # or module:name, or of an installed package
        return value

    @field_validator("strategy_options", "server_average_options")
    @classmethod
    def _options(cls, value: str, info: Any) -> str:
        parse_options(value, info.field_name.replace("_", "-"))
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "configuration") -> Self:
        """Validate ``values`` (keys with dashes), and put what their defaults stand for in their place.

        Raises:
            ConfigError: Names ``source``, the key, what was given and what is possible.
        """
        known, values = {name.replace("_", "-") for name in cls.model_fields}, _private.with_defaults(values)
        for key in values:
            if key.replace("_", "-") not in known:
                raise ConfigError(f"{source}: {UnknownNameError('key', key, known)}")
        try:
            config = cls.model_validate(dict(values))
        except UnknownNameError as error:
            raise ConfigError(f"{source}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]).replace("_", "-")
            raise ConfigError(f"{source}: {key} = {first['input']!r}: {first['msg']}") from error
        try:
            config = config.resolved()
            strategies.check(
                config.strategy,
                config.pipeline(),
                options=config.options(),
                optimizer=config.optimizer,
                init=config.init,
                private=config.is_private,
            )
            _private.check(config)
        except FedmergeError as error:
            raise ConfigError(f"{source}: {error}") from error
        try:
            config.running_average()
        except ConfigError as error:
            raise ConfigError(f"{source}: server-average-options: {error}") from error
        named = config.reference.isascii() and config.reference.isdecimal() and int(config.reference) < config.clients
        if config.reference not in ("largest", "best") and not named:
            raise ConfigError(
                f"{source}: reference = {config.reference!r}: expected largest, best or a client, 0 to "
                f"{config.clients - 1}"
            )
        if config.min_replies > config.clients:
            raise ConfigError(
                f"{source}: min-replies = {config.min_replies} exceeds the number of clients, {config.clients}"
            )
        return config

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a TOML file.

        Raises:
            ConfigError: The file cannot be read, is no TOML, or holds a wrong key or value.
        """
        return cls.parse(read_toml(path), str(path))

    def flat(self) -> dict[str, Any]:
        """Every key with its value, with dashes."""
        return self.model_dump(by_alias=True)

    def differences(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """The keys, with dashes, in which ``other`` runs something else, with the values here and there."""
        here, there = self.flat(), other.flat()
        return {key: (here[key], there[key]) for key in here if here[key] != there[key] and key not in LABELS}

    def __eq__(self, other: object) -> bool:
        """Whether both run the same, whatever they are called."""
        return isinstance(other, RunConfig) and not self.differences(other)

    def __hash__(self) -> int:
        return hash(tuple(value for key, value in self.flat().items() if key not in LABELS))

    def to_toml(self) -> str:
        """The configuration as a TOML file."""
        return tomli_w.dumps(self.flat())

    def control_names(self) -> tuple[str, ...]:
        """The controls asked for, in the order of the table; those from outside last. ``all`` are fedmerge's own."""
        asked = dict.fromkeys(split_list(self.controls))
        several = CONTROLS if "all" in asked else self._usual() if "default" in asked else ()
        own = [name for name in CONTROLS if name in asked or name in several]
        return (*own, *(name for name in asked if name not in (*CONTROLS, *_SEVERAL)))

    def left_out(self) -> tuple[str, ...]:
        """The usual controls that are too long for so many clients, in a run that has just the others."""
        usual = [name for name, control in CONTROLS.items() if control.usual and control.applies(self)]
        left = tuple(name for name in usual if name not in self._usual())
        return left if self.control_names() == self._usual() else ()

    def _usual(self) -> tuple[str, ...]:
        return tuple(n for n, control in CONTROLS.items() if control.usual and self.clients <= control.most_clients)

    def options(self) -> dict[str, float | int]:
        """The parsed ``strategy_options``."""
        return parse_options(self.strategy_options)

    @property
    def is_fedavg(self) -> bool:
        """Whether the aggregate of this run is that of :meth:`fedavg`."""
        return self.strategy == "fedavg" and self.init != "independent"

    def fedavg(self) -> Self:
        """The run of FedAvg that this one is held against: equal in all that concerns clients, from one network.

        So data, local training, cohorts and rounds are the same, and a pretrained start; independent clients begin at
        a shared one. What the server does besides is as it is by default.
        """
        of_clients = {*ClientTask.__dataclass_fields__, *_RECIPE, "rounds", "fraction_train", "min_replies", "timeout"}
        same = {name: getattr(self, name) for name in type(self).model_fields if name in of_clients}
        start = {"init": "shared"} if self.init == "independent" else {"pretrain_epochs": self.pretrain_epochs}
        return type(self)(**same | {"strategy": "fedavg", "controls": "none"} | start)

    def running_average(self) -> RunningAverage | None:
        """A new, empty average over the rounds; None if there is to be none.

        Raises:
            ConfigError: Options that it does not have, or out of their range.
        """
        options = parse_options(self.server_average_options)
        if self.server_average != "none":
            return running_average(self.server_average, **options)
        if options:
            raise ConfigError(f"{self.server_average_options!r} is for no average; choose one with server-average")
        return None

    def setup(self) -> Setup:
        """What server and clients must agree on."""
        return Setup(**{name: getattr(self, name) for name in Setup.__dataclass_fields__})

    def recipe(self) -> models.Recipe:
        """How clients train and the server retrains: the model's recipe, changed by what is given here."""
        own = {name: type(self).model_fields[name].default for name in _RECIPE}
        given = {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}
        recipe = replace(models.recipe(self.model), **given)
        return replace(recipe, epochs=self.local_epochs or recipe.epochs)

    def resolved(self) -> Self:
        """This configuration without values that stand for what the model or another key says.

        Raises:
            ConfigError: The model's recipe cannot be changed so, or it lacks an option that is given.
        """
        models.check_options(self.model, width=self.width, kernel_size=self.kernel_size)
        flat = self.flat()
        own = {key: value for key, value in _own(flat).items() if flat[key] == _STANDS[key]}
        own["controls"] = ", ".join(self.control_names()) or "none"
        if self.secure and "min_replies" not in self.model_fields_set:
            own["min-replies"] = _private.threshold(self)
        found = self.model_validate(flat | own)
        found.recipe()
        if not found.is_private:
            return found
        _private.check_noise(found)
        return found.model_copy(update={"local_evaluation": False})  # what it finds is not blurred

    @property
    def is_private(self) -> bool:
        """Whether clients train under differential privacy."""
        return self.dp_epsilon != -1 or self.dp_noise != -1

    def epochs(self) -> int:
        """A client's passes over its images in a round."""
        return self.recipe().epochs

    def pretrain_passes(self) -> int:
        """The server's passes over the public split before round 1; 0 where nobody begins or aligns there."""
        anchor = self.secure and self.init == "independent" and strategies.aligns(self.strategy)
        return (self.pretrain_epochs or self.epochs()) if anchor or self.init == "pretrained" else 0

    def retrain_passes(self) -> int:
        """The server's passes over the public split."""
        return self.retrain_epochs or self.epochs()

    def pipeline(self) -> strategies.Pipeline:
        """Which method for which step, and those that the strategy fixes."""
        given = strategies.Pipeline(**{step: getattr(self, step) for step in strategies.STEPS})
        return strategies.preset(self.strategy, given)

    def client_task(self) -> ClientTask:
        """What each client is told."""
        told = strategies.STRATEGIES[self.strategy].told
        options: dict[str, Any] = {name: float(self.options().get(name, own)) for name, own in told.items()}
        return ClientTask(
            **vars(self.setup()),
            local_epochs=self.epochs(),
            training=self.recipe(),
            rounds=self.rounds if self.is_private else 1,  # else runs of any length ask the same
            **{name: getattr(self, name) for name in ("dp_epsilon", "dp_noise", "dp_clip", "dp_delta", "device")},
            **options,
        )


_STANDS = {name.replace("_", "-"): field.default for name, field in RunConfig.model_fields.items()}
"""The values of keys that stand for what the model says, where it says something: their defaults."""


def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``config`` (with dashes) without those that are as the model has them, written out or not."""
    own = _own(config)
    return {key: v for key, v in config.items() if key not in own or v not in (own[key], _STANDS[key])}


def changed(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``options`` in their place (keys with dashes).

    Where they choose another model, what ``config`` says as the model before has it is left to the new one: a width of
    128 units is no factor of 128.
    """
    kept = config if options.get("model") in (None, config.get("model")) else chosen(config)
    return {**kept, **options}


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the model and the epochs of ``config`` say about other keys; nothing of a model that is not known here."""
    model = str(config.get("model"))
    try:
        recipe, options = models.recipe(model), models.check_options(model)
    except FedmergeError:
        return {}
    own = {name: getattr(recipe, name) for name in _RECIPE} | {"local_epochs": recipe.epochs}
    own |= {name: options[name] for name in ("width", "kernel_size") if name in options}
    own |= dict.fromkeys(("pretrain_epochs", "retrain_epochs"), config.get("local-epochs") or recipe.epochs)
    return {name.replace("_", "-"): value for name, value in own.items()}


def choices(key: str) -> tuple[str, ...]:
    """The names that ``key`` (with underscores) may have; none where its values cannot be counted."""
    known = {"dataset": data.names(), "model": models.names(), "controls": (*CONTROLS, *_SEVERAL), **_CHOICES}
    literal = [value for value in get_args(RunConfig.model_fields[key].annotation) if isinstance(value, str) and value]
    return tuple(known.get(key, literal))
