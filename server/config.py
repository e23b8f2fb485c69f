"""The configuration of a run: one flat set of keys, validated once, the same words everywhere."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self, get_args

import tomli_w
from pydantic import ValidationError

import strategies
from fedmerge import data, models, running_average
from fedmerge.errors import ConfigError, FedmergeError, UnknownNameError
from fedmerge.merge import RunningAverage
from fedmerge.pipeline import STEPS, Pipeline
from fedmerge.tasks import ClientTask, Setup
from server import _private
from server._control import CONTROLS
from server._keys import CHOICES, SEVERAL, Keys
from server._text import parse_options, read_toml, split_list

_RECIPE = tuple(f.name for f in fields(models.Recipe) if f.name != "epochs")

_CLIENTS = ("frozen_share", "dp_epsilon", "dp_noise", "dp_clip", "dp_delta", "secret_noise", "device")
"""Keys that clients are told beside what is agreed on and how a model is trained."""

LABELS = ("name", "tags")
"""Keys that say what a run is called, and nothing about what it does."""


class RunConfig(Keys):
    """Every key of one federated run, validated. In TOML and on the command line, dashes stand for underscores.

    Some values stand for what the model or another key says: 0, ``""``, or -1 where 0 says something. :meth:`parse`
    puts what they stand for in their place: a configuration that was parsed holds none of them, nor does config.toml.
    """

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
        except FedmergeError as error:
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
            _private.check(config, config.pipeline(), config.control_names())
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
        if config.frozen_share and config.init == "independent":
            raise ConfigError(
                f"{source}: frozen-share = {config.frozen_share:g} leaves weights where all clients began, and with "
                "init = 'independent' each begins elsewhere; use --init shared or pretrained"
            )
        if config.min_replies > config.clients:
            raise ConfigError(
                f"{source}: min-replies = {config.min_replies} exceeds the number of clients, {config.clients}"
            )
        if (asked := _private.cohort(config)) < config.clients:
            of = f"a round asks {asked} of {config.clients} clients (fraction-train = {config.fraction_train:g})"
            if config.min_replies > asked:
                raise ConfigError(f"{source}: min-replies = {config.min_replies}, and {of}; lower it, or ask more")
            if named and "reference" in strategies.uses(config.strategy, config.pipeline()):
                raise ConfigError(
                    f"{source}: reference = {config.reference!r}, and {of}, not always that one; take largest or best, "
                    "or ask all"
                )
        return config

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a TOML file.

        Raises:
            ConfigError: The file cannot be read, is no TOML, or holds a wrong key or value.
        """
        return cls.parse(read_toml(Path(path)), str(path))

    def flat(self) -> dict[str, Any]:
        """Every key with its value, with dashes."""
        return self.model_dump(by_alias=True)

    def differences(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """The keys, with dashes, in which ``other`` runs something else, with the values here and there.

        Those last whose values may have followed from others.
        """
        here, there = self.flat(), other.flat()
        differ = [key for key in here if here[key] != there[key] and key not in LABELS]
        return {key: (here[key], there[key]) for key in sorted(differ, key=lambda key: key in _DECIDE)}

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
        return (*own, *(name for name in asked if name not in (*CONTROLS, *SEVERAL)))

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
        start = {"pretrain_epochs": self.pretrain_epochs} if self.init == "pretrained" else {"init": "shared"}
        return type(self)(**same | {"strategy": "fedavg", "controls": "none", "head": "none"} | start)

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
        own = {key: value for key, value in _own(flat).items() if flat[key] == STANDS[key]}
        own["controls"] = ", ".join(self.control_names()) or "none"
        if self.secure and "min_replies" not in self.model_fields_set:
            own["min-replies"] = _private.threshold(self)
        found = self.model_validate(flat | own)
        found.recipe()
        if found.is_private or strategies.STRATEGIES[found.strategy].central:
            _private.check_told(found, counts=found.client_task().label_counts)
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
        anchor = self.secure and self.init == "independent" and strategies.STRATEGIES[self.strategy].aligns
        return (self.pretrain_epochs or self.epochs()) if anchor or self.init == "pretrained" else 0

    def retrain_passes(self) -> int:
        """The server's passes over the public split."""
        return self.retrain_epochs or self.epochs()

    def pipeline(self) -> Pipeline:
        """Which method for which step, and those that the strategy fixes."""
        given = Pipeline(**{step: getattr(self, step) for step in STEPS})
        return strategies.preset(self.strategy, given)

    def _reads_counts(self) -> bool:
        """Whether the strategy or a control has a teacher that asks how many images of each class the clients have."""
        pipeline = self.pipeline()
        taught = "teacher" in strategies.uses(self.strategy, pipeline)
        taught = taught or any(CONTROLS[name].of_clients for name in self.control_names())
        return taught and pipeline.counts_labels

    def client_task(self) -> ClientTask:
        """What each client is told."""
        told = strategies.STRATEGIES[self.strategy].told
        options: dict[str, Any] = {name: float(self.options().get(name, own)) for name, own in told.items()}
        return ClientTask(
            **vars(self.setup()),
            local_epochs=self.epochs(),
            training=self.recipe(),
            label_counts=self._reads_counts(),
            rounds=self.rounds if self.is_private else 1,  # else runs of any length ask the same
            **{name: getattr(self, name) for name in _CLIENTS},
            **options,
        )


STANDS = {name.replace("_", "-"): field.default for name, field in RunConfig.model_fields.items()}
"""The values of keys that stand for what the model says, where it says something: their defaults."""


def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``config`` (with dashes) without those that are as the model has them, written out or not."""
    own = _own(config)
    return {key: v for key, v in config.items() if key not in own or v not in (own[key], STANDS[key])}


def changed(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``options`` in their place (keys with dashes).

    Where they choose another model, what ``config`` says as the model before has it is left to the new one: a width of
    128 units is no factor of 128. So is what ``config`` has by default where they choose what decides it: the head, the
    server's epochs, how many replies masked sums need, the controls.
    """
    kept = dict(config if options.get("model") in (None, config.get("model")) else chosen(config))
    new = {key for key, value in options.items() if config.get(key) != value}
    for key in _followers(config):
        if new & _DECIDE[key]:
            kept.pop(key, None)
    return {**kept, **options}


def _followers(config: Mapping[str, Any]) -> set[str]:
    """The keys of ``config`` whose values followed from others when it was written."""
    found = {"head", "pretrain-epochs", "retrain-epochs"} - chosen(config).keys()
    with suppress(FedmergeError):
        was = RunConfig.parse(config)
        if was.secure and was.min_replies == _private.threshold(was):
            found.add("min-replies")
        if was.control_names() == was._usual():
            found.add("controls")
    return found


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config`` says about other keys by its model, epochs and strategy; nothing of what is not known here."""
    if "model" not in config:
        return {}
    model = str(config["model"])
    try:
        recipe, options = models.recipe(model), models.check_options(model)
    except FedmergeError:
        return {}
    own = {name: getattr(recipe, name) for name in _RECIPE} | {"local_epochs": recipe.epochs}
    own |= {name: options[name] for name in ("width", "kernel_size") if name in options}
    own |= _head(config)
    own |= dict.fromkeys(("pretrain_epochs", "retrain_epochs"), config.get("local-epochs") or recipe.epochs)
    return {name.replace("_", "-"): value for name, value in own.items()}


_DECIDE = {
    "head": {"strategy", "retrain", "dp-epsilon", "dp-noise"},
    "pretrain-epochs": {"local-epochs"},
    "retrain-epochs": {"local-epochs"},
    "min-replies": {"clients", "fraction-train", "secure", "private"},
    "controls": {"clients"},
}
"""Key -> those that it follows from, unless it is given."""


def _head(config: Mapping[str, Any]) -> dict[str, str]:
    """Which head ``config`` has by default: one from sums where clients may tell them, and networks are retrained."""
    try:
        strategy = strategies.STRATEGIES[str(config.get("strategy"))]
    except FedmergeError:
        return {}
    blurred = config.get("dp-epsilon", -1) != -1 or config.get("dp-noise", -1) != -1
    retrains = "retrain" in strategy.reads - strategy.fixes.keys() and config.get("retrain") != "none"
    return {"head": "analytic" if retrains and not blurred and not strategy.central else "none"}


def choices(key: str) -> tuple[str, ...]:
    """The names that ``key`` (with underscores) may have; none where its values cannot be counted."""
    known = {"dataset": data.names(), "model": models.names(), "controls": (*CONTROLS, *SEVERAL), **CHOICES}
    literal = [value for value in get_args(RunConfig.model_fields[key].annotation) if isinstance(value, str) and value]
    return tuple(known.get(key, literal))
