"""The result document as types: what comparing, tables and the page go by; docs/benchmark.md.

It may come from another machine or another release, so nothing in it is taken on trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from cnnedge.benchmark.accuracy import unpack
from cnnedge.comparison import Comparison
from cnnedge.documents import Amount, Count, Finite, Points, Positive, Share

Ms = Positive | None
Interval = tuple[Finite, Finite]
Whole = Annotated[int, Meta(ge=1, le=2**31)]
Factor = Annotated[float, Meta(gt=0, le=1e12)]
_Block = Annotated[list[Positive], Meta(min_length=1)]
_Round = Annotated[list[_Block], Meta(min_length=1)]


class Against(Struct, kw_only=True):
    """How many times faster than the baseline."""

    name: str
    ratio: Factor
    interval: tuple[Amount, Amount]


class SingleStream(Struct, kw_only=True):
    """One image after the other."""

    samples_ms: Annotated[list[_Round], Meta(min_length=1)]
    p50_ms: Positive
    stable: bool
    p90_ms: Ms = None
    p99_ms: Ms = None
    notes: list[str]
    against: Against | None = None
    gpu: dict[str, Finite] | None = None


class Offline(Struct, kw_only=True):
    """A batch size."""

    batch: Whole
    images_per_second: Positive
    samples_ms: Annotated[list[_Block], Meta(min_length=1)]
    p50_ms: Ms = None


class MultiStream(Struct, kw_only=True):
    """A number of clients."""

    clients: Whole
    images_per_second: Positive
    p50_ms: Positive
    p90_ms: Ms = None
    p99_ms: Ms = None


class Server(Struct, kw_only=True):
    """A load."""

    load: Annotated[float, Meta(gt=0, le=100)]
    p50_ms: Positive
    p90_ms: Ms
    p99_ms: Ms = None
    offered_per_second: Amount | None = None


class ColdStart(Struct, kw_only=True):
    """From nothing to the first answer."""

    total_ms: Positive
    import_ms: Amount | None = None
    load_ms: Amount | None = None
    first_ms: Amount | None = None


class Memory(Struct, kw_only=True):
    """Of the process."""

    peak_mib: Amount
    before_mib: Amount | None = None


class Window(Struct, kw_only=True):
    """A few seconds of `Sustained`."""

    at_s: Amount
    p50_ms: Positive
    clock_mhz: Amount | None = None
    temperature_c: Finite | None = None
    throttled: Count | None = None


class Sustained(Struct, kw_only=True):
    """Minutes on end."""

    seconds: Amount
    windows: Annotated[list[Window], Meta(min_length=1)]
    drift_percent: Finite
    interval: Interval | None
    notes: list[str]


class DutyCycle(Struct, kw_only=True):
    """The first answer after a pause."""

    idle_s: Amount
    first_p50_ms: Positive
    steady_p50_ms: Ms
    first_ms: list[Positive] = field(default_factory=list)


class Picture(Struct, kw_only=True):
    """The file that a waterfall begins with."""

    width: Whole
    height: Whole
    format: str | None
    bytes: Count = 0


class Stage(Struct, kw_only=True):
    """A stage of a waterfall."""

    name: str
    p50_ms: Amount


class Waterfall(Struct, kw_only=True):
    """From a file to a label."""

    stages: Annotated[list[Stage], Meta(min_length=1)]
    whole_p50_ms: Positive
    file: Picture
    app_p50_ms: Ms


class Layer(Struct, kw_only=True):
    """What a layer takes."""

    name: str
    ms: Amount
    kind: str | None = None
    precision: str | None = None
    macs: Count | None = None
    bound_ms: Amount | None = None
    fraction: Amount | None = None


class Roofline(Struct, kw_only=True):
    """The least that the network could take here."""

    fraction: Amount | None = None
    why: str | None = None


class Confused(Struct, kw_only=True):
    """A common mistake."""

    truth: str
    answer: str
    count: Count


class Flip(Struct, kw_only=True):
    """An image whose first answer is not the reference's."""

    image: Count
    reference: str
    answer: str
    reference_probability: Share | None = None
    probability: Share | None = None


class Contestant(Struct, kw_only=True):
    """A variant on a runtime."""

    name: str
    title: str
    runtime: str
    precision: str | None
    provider: str | None = None
    peer: bool
    bytes: Count | None
    notes: dict[str, str]
    error: str | None = None
    accuracy: Comparison | None
    accuracy_note: str | None = None
    right: str | None = None
    confusion: list[list[Count]] | None = None
    confused: list[Confused] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    flipped: Count | None = None
    single_stream: SingleStream | None
    offline: list[Offline]
    multi_stream: list[MultiStream]
    server: list[Server]
    cold_start: ColdStart | None = None
    memory: Memory | None = None
    sustained: Sustained | None
    duty_cycle: DutyCycle | None
    waterfall: Waterfall | None
    layers: list[Layer] = field(default_factory=list)
    roofline: Roofline | None = None

    def __post_init__(self) -> None:
        if any(len(row) != len(self.confusion or ()) for row in self.confusion or ()):
            raise ValueError("its confusion has other numbers of rows and columns")


class Because(Struct, kw_only=True):
    """Somebody, and why not."""

    name: str
    why: str
    title: str | None = None


class Pick(Struct, kw_only=True):
    """Which to run."""

    why: str
    name: str | None
    title: str | None
    how: str | None
    runners_up: list[Because]


class Data(Struct, kw_only=True):
    """What accuracy was measured on."""

    source: str
    images: Annotated[int, Meta(ge=1, le=10**9)]
    sha256: str
    reference: str


class Image(Struct, kw_only=True):
    """Of an image contract, what is told."""

    height: Whole
    width: Whole
    channels: Literal[1, 3] = 3
    resize: str | None = None


class Examples(Struct, kw_only=True):
    """The images that are shown."""

    truth: dict[str, str | Count] = field(default_factory=dict)
    thumbnails: dict[str, str] = field(default_factory=dict)


class Model(Struct, kw_only=True):
    """One bundle."""

    name: str
    layout: str
    pick: Pick
    contestants: list[Contestant]
    weights: str | None
    labels: list[str] = field(default_factory=list)
    image: Image | None = None
    macs: Count | None = None
    max_drop: Points
    data: Data | None
    baseline: str | None = None
    left_out: list[Because]
    examples: Examples | None = None

    def __post_init__(self) -> None:
        _refuse_doubles("contestants", [one.name for one in self.contestants])
        for one in self.contestants:
            if self.data is not None and one.right is not None:
                unpack(one.right, self.data.images)
            for what, values in (
                ("batch", [point.batch for point in one.offline]),
                ("clients", [point.clients for point in one.multi_stream]),
                ("load", [point.load for point in one.server]),
            ):
                _refuse_doubles(f"points of {one.name[:40]}", [f"{what} {v}" for v in values])


class Machine(Struct, kw_only=True):
    """Where it was measured."""

    cpu: str | None
    cores: Count | None = None
    isa: list[str] = field(default_factory=list)
    memory_gib: Amount | None = None
    system: str | None = None


class Conditions(Struct, kw_only=True):
    """How it was there."""

    governor: str | None = None
    clock_mhz: Any = None
    virtual: str | None = None
    cpu_limit: Amount | None = None
    load: Any = None
    steal: Share | None = None


class Gpu(Struct, kw_only=True):
    """The GPU."""

    name: str


class Environment(Struct, kw_only=True):
    """Where, when and with what it was measured."""

    machine: Machine
    threads: Count | None
    timed: str
    batch: Count = 1
    conditions: Conditions | None = None
    gpu: Gpu | None = None
    tools: dict[str, str] = field(default_factory=dict)


class Peak(Struct, kw_only=True):
    """An arithmetic peak."""

    giga_per_second: Positive
    by: str | None = None
    samples: list[Positive] = field(default_factory=list)


class Bandwidth(Struct, kw_only=True):
    """How fast the memory is read."""

    gigabytes_per_second: Positive
    samples: list[Positive] = field(default_factory=list)


class Peaks(Struct, kw_only=True):
    """What the machine was seen to reach."""

    bandwidth: Bandwidth
    fp32: Peak | None = None
    int8: Peak | None = None


class Named(Struct, kw_only=True):
    """The suite."""

    name: str | None = None


class Result(Struct, kw_only=True):
    """The whole document."""

    models: list[Model]
    environment: Environment
    created: str | None = None
    suite: Named | None = None
    peaks: Peaks | None = None

    def __post_init__(self) -> None:
        _refuse_doubles("models", [model.name for model in self.models])


def _refuse_doubles(what: str, names: Sequence[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"two {what} are called {twice[0][:80]!r}")
