"""Every kind of reply that the tests send to every strategy: what one client does to its good reply, and what comes of it.

``TRAINING`` and ``EVALUATION`` are the broken kinds: name -> a change and a pattern of the reason that is reported.
``HARMLESS`` are kinds that look odd and are used as if they did not. ``QUERY`` are answers to the question who a node is.
"""

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedmerge.tasks import ARRAYS, METRICS

WEIGHT, COUNTER, VARIANCE = "fc1.weight", "norm.num_batches_tracked", "norm.running_var"

Change = Callable[[Message], Message | list[Message]]


@dataclass(frozen=True)
class Kind:
    """A change of a good reply; a list stands for several replies, an empty one for silence."""

    change: Change
    reason: str = ""
    by_reach: bool = False  # wrong only where strategies ask how far steps reach


def npy(array: np.ndarray, *, version: tuple[int, int] | None = None, pickled: bool = False) -> bytes:
    """The bytes of a ``.npy`` file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version, allow_pickle=pickled)
    return stream.getvalue()


def headed(header: str, data: bytes = b"", version: int = 1) -> bytes:
    """A ``.npy`` file with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def _data(make: Callable[[np.ndarray], bytes], name: str = WEIGHT) -> Change:
    """Other bytes for one tensor, under its true name, shape and dtype."""

    def change(reply: Message) -> Message:
        array = reply.content[ARRAYS][name]
        record = Array(array.dtype, array.shape, array.stype, make(array.numpy()))
        reply.content[ARRAYS][name] = record
        return reply

    return change


def _values(make: Callable[[np.ndarray], np.ndarray], name: str = WEIGHT) -> Change:
    """Another array for one tensor, well serialised."""

    def change(reply: Message) -> Message:
        reply.content[ARRAYS][name] = Array(np.asarray(make(reply.content[ARRAYS][name].numpy())))
        return reply

    return change


def _all(make: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Other numbers for every floating tensor."""

    def change(reply: Message) -> Message:
        for name, array in reply.content[ARRAYS].items():
            values = array.numpy()
            if values.dtype.kind == "f":
                reply.content[ARRAYS][name] = Array(np.asarray(make(values)))
        return reply

    return change


def _one(value: float, name: str = WEIGHT) -> Change:
    """One number of one tensor."""

    def make(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return _values(make, name)


def _raw(key: str, value: Any, record: str = METRICS) -> Change:
    """Any value in a record, past Flower's checks as a foreign client may send it; ``...`` takes the key out."""

    def change(reply: Message) -> Message:
        data = reply.content[record].__dict__["_data"]
        if value is ...:
            del data[key]
        else:
            data[key] = value
        return reply

    return change


def _records(make: Callable[[RecordDict], dict[str, Any]]) -> Change:
    def change(reply: Message) -> Message:
        reply.content = RecordDict(make(reply.content))
        return reply

    return change


def _announced(**fields: Any) -> Change:
    """Another field of the record around the bytes."""

    def change(reply: Message) -> Message:
        reply.content[ARRAYS][WEIGHT].__dict__.update(fields)
        return reply

    return change


def _metadata(**fields: Any) -> Change:
    def change(reply: Message) -> Message:
        reply.metadata.__dict__.update({f"_{key}": value for key, value in fields.items()})
        return reply

    return change


def copied(reply: Message) -> Message:
    """The same reply once more."""
    return pickle.loads(pickle.dumps(reply))


def _error(reason: Any) -> Change:
    def change(reply: Message) -> Message:
        reply.__dict__.update(_content=None, _error=Error(code=0, reason=reason))
        return reply

    return change


def _renamed(reply: Message) -> Message:
    record = reply.content[ARRAYS]
    record["fc1.kernel"] = record[WEIGHT]
    del record[WEIGHT]
    return reply


def _without(key: str, record: str | None = None) -> Change:
    def change(reply: Message) -> Message:
        del (reply.content if record is None else reply.content[record])[key]
        return reply

    return change


def _two(reply: Message) -> list[Message]:
    return [reply, _one(0.5)(copied(reply))]


def _no_content(reply: Message) -> Message:
    reply.__dict__["_content"] = None
    return reply


def _foreign_content(reply: Message) -> Message:
    reply.__dict__["_content"] = {"arrays": "all of them"}
    return reply


def _torch_file(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    torch.save(torch.from_numpy(array), stream)
    return stream.getvalue()


def _npz(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, array)
    return stream.getvalue()


class _Bomb:
    """Ends the test if it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a reply was unpickled')",))


_HEAD = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
_F4 = "'<f4'"


def _header(shape: str, descr: str = _F4) -> Change:
    return _data(lambda a: headed(_HEAD.format(descr, shape), a.tobytes()))


_ARRAYS: dict[str, Kind] = {
    "bytes that are garbage": Kind(_data(lambda a: b"\x00\x01garbage" * 50), "no array in numpy's format"),
    "no bytes": Kind(_data(lambda a: b""), "no array in numpy's format"),
    "cut off in the numbers": Kind(_data(lambda a: npy(a)[:-7]), "holds 377 bytes, expected 384"),
    "cut off in the header": Kind(_data(lambda a: npy(a)[:20]), "no array in numpy's format"),
    "more bytes than numbers": Kind(_data(lambda a: npy(a) + b"1234"), "holds 388 bytes, expected 384"),
    "megabytes of bytes": Kind(_data(lambda a: npy(a) + bytes(2**21)), "too many for shape"),
    "a pickled array": Kind(
        _data(lambda a: npy(np.array([_Bomb()], dtype=object), pickled=True)), r"has shape \(1,\), expected \(6, 16\)"
    ),
    "a pickled array of the right shape": Kind(
        _data(lambda a: headed(_HEAD.format("'|O'", "(6, 16)"), pickle.dumps(_Bomb()))), "is object, expected float32"
    ),
    "a pickle": Kind(_data(lambda a: pickle.dumps(_Bomb())), "no array in numpy's format"),
    "an .npz file": Kind(_data(_npz), "no array in numpy's format"),
    "a file of torch.save": Kind(_data(_torch_file), "no array in numpy's format"),
    "a header of 3.6 TiB": Kind(_header("(1000000, 1000000)"), r"has shape \(1000000, 1000000\), expected \(6, 16\)"),
    "a header beyond 2**64": Kind(_header(f"({2**70},)"), "has shape"),
    "a negative shape": Kind(_header("(-6, -16)"), r"has shape \(-6, -16\)"),
    "a shape of fractions": Kind(_header("(6.0, 16)"), "no array in numpy's format"),
    "a shape of booleans": Kind(_header("(True, 96)"), "has shape"),
    "a shape that is a string": Kind(_header("'66'"), "no array in numpy's format"),
    "a header without a shape": Kind(
        _data(lambda a: headed("{'descr': '<f4', 'fortran_order': False}")), "no array in numpy's format"
    ),
    "a header that is code": Kind(
        _data(lambda a: headed("__import__('os').abort()")), "no array in numpy's format"
    ),
    "a header of many brackets": Kind(_data(lambda a: headed("(" * 9000)), "too many bytes|no array in numpy's format"),
    "a header of 60 KiB": Kind(
        _data(lambda a: headed(_HEAD.format(_F4, "(6, 16)") + " " * 60000, a.tobytes())), "too many for shape"
    ),
    "a version of the format that is none": Kind(
        _data(lambda a: headed(_HEAD.format(_F4, "(6, 16)"), a.tobytes(), version=9)), "no array in numpy's format"
    ),
    "another serialisation": Kind(_announced(stype="torch.tensor"), "is serialised as 'torch.tensor'"),
    "a serialisation that is no text": Kind(_announced(stype=None), "is serialised as 'None'"),
    "bytes that are none": Kind(_announced(data=None), "holds a NoneType, expected bytes"),
    "bytes that are text": Kind(_announced(data="abc"), "holds a str, expected bytes"),
    "an announced shape that is negative": Kind(_announced(shape=(-1,)), r"has shape \(-1,\), expected \(6, 16\)"),
    "an announced shape that is enormous": Kind(_announced(shape=(10**12,)), "has shape"),
    "an announced shape that is none": Kind(_announced(shape=None), "cannot be read"),
    "a tensor that is no array": Kind(_raw(WEIGHT, "much", ARRAYS), "is a str, expected an array"),
    "long double": Kind(_values(lambda a: a.astype(np.longdouble)), f"is {np.dtype(np.longdouble)}, expected float32"),
    "complex": Kind(_values(lambda a: a.astype(np.complex64)), "is complex64, expected float32"),
    "integers for weights": Kind(_values(lambda a: a.astype(np.int32)), "is int32, expected float32"),
    "booleans for weights": Kind(_values(lambda a: a > 0), "is bool, expected float32"),
    "dates for weights": Kind(_values(lambda a: np.zeros(a.shape, "M8[s]")), "is datetime64"),
    "strings for weights": Kind(_values(lambda a: np.full(a.shape, "w")), "is <U1, expected float32"),
    "records for weights": Kind(_values(lambda a: np.zeros(a.shape, [("x", "f4")])), "expected float32"),
    "arrays for weights": Kind(_header("(6, 16)", "('<f4', (2,))"), "expected float32"),
    "float64 beyond float32": Kind(_values(lambda a: a.astype(np.float64) * 1e300), "does not fit float32"),
    "NaN": Kind(_one(np.nan), f"{WEIGHT!r} holds NaN or infinite values"),
    "all NaN": Kind(_all(lambda a: a * np.nan), "holds NaN or infinite values"),
    "infinity": Kind(_one(-np.inf), "holds NaN or infinite values"),
    "infinite float16": Kind(_values(lambda a: np.full(a.shape, np.inf, np.float16)), "holds NaN or infinite"),
    "NaN in a statistic": Kind(_one(np.nan, VARIANCE), "running_var' holds NaN or infinite values"),
    "a counter that is a fraction": Kind(_values(lambda a: a + 0.5, COUNTER), "is float64, expected int64"),
    "a counter below zero": Kind(_values(lambda a: a * 0 - 1, COUNTER), "holds -1; expected 0 to"),
    "a counter at its end": Kind(_values(lambda a: a * 0 + (2**63 - 1), COUNTER), "holds 9223372036854775807"),
    "a counter that is unsigned": Kind(_values(lambda a: a.astype(np.uint64), COUNTER), "is uint64, expected int64"),
    "a missing tensor": Kind(_without(WEIGHT, ARRAYS), f"{WEIGHT!r} is missing"),
    "an extra tensor": Kind(_raw("x", Array(np.zeros(2)), ARRAYS), "tensor 'x' is not known"),
    "a renamed tensor": Kind(_renamed, f"{WEIGHT!r} is missing"),
    "a name that is no text": Kind(_raw(3, Array(np.zeros(2)), ARRAYS), "is not known"),
    "no tensors": Kind(_records(lambda c: {**c, ARRAYS: ArrayRecord()}), "is missing"),
    "transposed": Kind(_values(lambda a: a.T.copy()), r"has shape \(16, 6\), expected \(6, 16\)"),
    "as many numbers in another shape": Kind(_values(lambda a: a.reshape(-1)), r"has shape \(96,\)"),
    "an axis more": Kind(_values(lambda a: a[None]), r"has shape \(1, 6, 16\)"),
    "one number": Kind(_values(lambda a: np.float32(1)), r"has shape \(\), expected \(6, 16\)"),
    "no numbers": Kind(_values(lambda a: a[:0]), r"has shape \(0, 16\)"),
    "1e38 in one weight": Kind(_one(1e38), r"holds 1e\+38; expected at most 1e\+03"),
    "1e38 in every number": Kind(_all(lambda a: np.full_like(a, 1e38)), r"holds 1e\+38; expected at most"),
    "weights a million times as large": Kind(_all(lambda a: a * np.float32(1e6)), "expected at most"),
    "weights a thousand times as large": Kind(
        _values(lambda a: a * np.float32(1e3)), "root mean square of its weights is|expected at most"
    ),
    "1e38 in a statistic": Kind(_one(1e38, VARIANCE), r"running_var' holds 1e\+38; expected at most 1e\+12"),
    "a negative variance": Kind(_one(-1.0, VARIANCE), "layer 'norm' of its network has a negative variance"),
    "a variance that cancels what is added to it": Kind(
        _values(lambda a: np.full_like(a, -1e-5 + 1e-28), VARIANCE), "layer 'norm' of its network has a negative variance"
    ),
}  # fmt: skip

_CONTENT: dict[str, Kind] = {
    "no content": Kind(_no_content, "the reply has no content"),
    "content of another type": Kind(_foreign_content, "the reply has no content"),
    "no records": Kind(_records(lambda c: {}), "lacks the record 'metrics'"),
    "no metrics": Kind(_without(METRICS), "lacks the record 'metrics'"),
    "metrics in a record of another type": Kind(
        _records(lambda c: {**c, METRICS: ConfigRecord(dict(c[METRICS]))}), "lacks the record 'metrics'"
    ),
    "empty metrics": Kind(_records(lambda c: {**c, METRICS: MetricRecord()}), "lacks the metric 'client'"),
    "two records of metrics": Kind(
        _records(lambda c: {**c, "more": c[METRICS]}), "holds a second MetricRecord, 'more', beside 'metrics'"
    ),
    "an error": Kind(_error('Traceback:\n  File "x"\nValueError: boom\n'), "^(evaluation: )?error: ValueError: boom$"),
    "an error without a reason": Kind(_error(None), "error: unknown"),
    "an error that is no text": Kind(_error(b"\xff"), r"error: b'\\xff'"),
    "an error of a megabyte": Kind(_error("x" * 2**20), "^.{0,320}$"),
    "an error that would paint the terminal": Kind(_error("\x1b[31m[/red]\ud800\x00"), r"error: .*\[31m\[/red\]"),
    "silence": Kind(lambda reply: [], "no reply in time"),
    "two different replies": Kind(lambda reply: [reply, _raw("num-examples", 1)(copied(reply))], "2 different replies"),
    "a reply and an error": Kind(lambda reply: [reply, _error("late")(copied(reply))], "2 different replies"),
    "a reply to a message of another round": Kind(_metadata(reply_to_message_id="gone"), "to a message of another time"),
    "a reply to no message": Kind(_metadata(reply_to_message_id=""), "to a message of another time"),
    "a reply from a node that was not asked": Kind(_metadata(src_node_id=4711), "comes from another node, 4711"),
}  # fmt: skip

_RECORDS: dict[str, Kind] = {
    "no arrays": Kind(_without(ARRAYS), "lacks the record 'arrays'"),
    "arrays in a record of another type": Kind(
        _records(lambda c: {**c, ARRAYS: MetricRecord()}), "holds a second MetricRecord|lacks the record 'arrays'"
    ),
    "two records of arrays": Kind(
        _records(lambda c: {**c, "more": c[ARRAYS]}), "holds a second ArrayRecord, 'more', beside 'arrays'"
    ),
    "two different networks": Kind(_two, "2 different replies to one message"),
}


def _values_of(key: str, wrong: dict[str, Any]) -> dict[str, Kind]:
    """The metric ``key`` absent and with each of ``wrong``."""
    kinds = {f"{key} absent": Kind(_raw(key, ...), f"lacks the metric '{key}'")}
    return kinds | {
        f"{key} {name}": Kind(_raw(key, value), f"metric '{key}' is .*expected") for name, value in wrong.items()
    }


_NO_NUMBER: dict[str, Any] = {
    "as text": "12", "as bytes": b"12", "as a list": [1, 2], "None": None, "true": True, "NaN": float("nan"),
    "infinite": float("inf"), "negative": -1, "complex": 1j,
}  # fmt: skip
_COUNTS = {"a fraction": 1.5, "a whole float": 4.0, "of 5000 digits": 10**5000}

_METRICS = {
    **_values_of("num-examples", {**_NO_NUMBER, **_COUNTS, "zero": 0, "10**30": 10**30, "one too many": 41}),
    **_values_of("client", {**_NO_NUMBER, **_COUNTS}),
    "client another's": Kind(_raw("client", 1), "says that it is of client 1"),
    "client nobody's": Kind(_raw("client", 99), "says that it is of client 99"),
    **_values_of("seconds", _NO_NUMBER),
    "an unknown metric NaN": Kind(_raw("mood", float("nan")), "metric 'mood' is not finite"),
    "an unknown metric with infinity": Kind(_raw("mood", [1.0, float("inf")]), "metric 'mood' is not finite"),
}  # fmt: skip
_RATES = {**_NO_NUMBER, "above 1": 1.01}

TRAINING: dict[str, Kind] = {
    **_CONTENT, **_RECORDS, **_ARRAYS, **_METRICS,
    **_values_of("train-loss", {**_NO_NUMBER, "absurd": 1e300}), **_values_of("train-accuracy", _RATES),
    **{
        name: Kind(kind.change, kind.reason, by_reach=True)
        for name, kind in _values_of("reach", {**_NO_NUMBER, "zero": 0.0, "tiny": 1e-300, "enormous": 1e300}).items()
        if name not in ("reach NaN", "reach infinite")
    },
    "reach NaN": Kind(_raw("reach", float("nan")), "metric 'reach' is"),
    "reach infinite": Kind(_raw("reach", float("inf")), "metric 'reach' is"),
}  # fmt: skip
"""Broken answers to a training message."""

EVALUATION: dict[str, Kind] = {
    **_CONTENT, **_METRICS,
    **_values_of("loss", {**_NO_NUMBER, "absurd": 1e300}), **_values_of("accuracy", _RATES),
}  # fmt: skip
"""Broken answers to an evaluation message."""

HARMLESS: dict[str, Kind] = {
    "as it should be": Kind(lambda reply: reply),
    "big-endian": Kind(_all(lambda a: a.astype(">f4"))),
    "float64": Kind(_all(lambda a: a.astype(np.float64))),
    "int32 for a counter": Kind(_values(lambda a: a.astype(np.int32), COUNTER)),
    "Fortran order": Kind(_all(np.asfortranarray)),
    "the second version of the format": Kind(_data(lambda a: npy(a, version=(2, 0)))),
    "tensors in another order": Kind(
        _records(lambda c: {**c, ARRAYS: ArrayRecord(dict(reversed(list(c[ARRAYS].items()))))})
    ),
    "an unknown metric": Kind(_raw("mood", 3)),
    "an unknown metric that is text": Kind(_raw("mood", "good")),
    "a record of its own": Kind(_records(lambda c: {**c, "own": ConfigRecord({"a": 1})})),
    "the same reply twice": Kind(lambda reply: [reply, copied(reply)]),
    "an error from a stranger beside it": Kind(lambda reply: [reply, _metadata(src_node_id=4711)(copied(reply))]),
    "a reply to another round beside it": Kind(
        lambda reply: [reply, _metadata(reply_to_message_id="gone")(copied(reply))]
    ),
}
"""Odd answers that are used."""

QUERY: dict[str, Kind] = {
    **dict(_CONTENT.items()),
    **{name: kind for name, kind in _METRICS.items() if "another's" not in name and "nobody's" not in name},
}
del QUERY["num-examples absent"], QUERY["num-examples one too many"]
for _name in [name for name in QUERY if name.startswith("seconds")]:
    del QUERY[_name]
"""Broken answers to the question who a node is."""
