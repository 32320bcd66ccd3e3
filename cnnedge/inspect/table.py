"""The rows that describe a network, and their totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from cnnedge.inspect.formulas import Field

FLOAT32 = 4

COLUMNS = (
    *("layer", "kind", "window", "output", "params", "MACs"),
    *("activation bytes", "stride", "receptive field"),
)


@dataclass(frozen=True)
class LayerRow:
    """One layer, for a batch of one image.

    Attributes:
        name: The layer's name; a path where models are nested.
        kind: The Keras class or the ONNX operation.
        window: Kernel and stride such as "11x11/4", or "" for a layer without a window.
        output: Size of the output without the batch: ``(height, width, channels)`` for a feature
            map, whatever the layout of the file, and ``(length,)`` for a vector.
        params: Parameters, whether trained or not. Shared ones count in the first row that uses
            them.
        macs: Multiply-accumulates of convolutions and matrix products; biases, activations,
            normalisations and pooling count none.
        activation_bytes: Size of the output as float32; 0 where inference makes no new tensor
            (Flatten, Reshape, Dropout).
        stride: Input pixels between neighbouring outputs, ``(vertical, horizontal)``: the product
            of the strides so far. None as below.
        receptive_field: Input pixels that an output depends on, ``(height, width)``, padding
            included. None where that is the whole input, from Flatten or global pooling on, or
            where a note says that it could not be followed.
    """

    name: str
    kind: str
    window: str
    output: tuple[int, ...]
    params: int
    macs: int
    activation_bytes: int
    stride: tuple[int, int] | None
    receptive_field: tuple[int, int] | None

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, a cell for each of `COLUMNS`."""
        return (
            self.name,
            self.kind,
            self.window,
            "x".join(map(str, self.output)),
            f"{self.params:,}",
            f"{self.macs:,}",
            f"{self.activation_bytes:,}",
            "" if self.stride is None else sides(self.stride),
            "all" if self.receptive_field is None else sides(self.receptive_field),
        )


@dataclass(frozen=True)
class Inspection:
    """A network layer by layer, for a batch of one image.

    Attributes:
        name: The model's name.
        source: "built-in", a file, or the name of the model that was passed.
        layers: The rows, in the order of execution; the first is the input.
        params: Total parameters.
        macs: Total multiply-accumulates.
        activation_bytes: Total of the rows: what training would keep.
        peak_bytes: The most float32 activations that live at once when every layer frees what
            nobody needs any more: a floor for the memory of an inference beyond the weights.
        notes: What could not be followed, or did not come out as the formulas say.
    """

    name: str
    source: str
    layers: tuple[LayerRow, ...]
    params: int
    macs: int
    activation_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """Return the table as text: `COLUMNS`, then every layer, then the total."""
        totals = [f"{total:,}" for total in (self.params, self.macs, self.activation_bytes)]
        total = ("total", "", "", "", *totals, "", "")
        return (COLUMNS, *(layer.cells() for layer in self.layers), total)

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        return asdict(self)


@dataclass
class Reading:
    """The rows of a network while its graph is being walked.

    Attributes:
        rows: The rows so far.
        inputs: For each row, the indices of the rows whose outputs it reads.
        notes: What could not be followed.
    """

    rows: list[LayerRow] = field(default_factory=list)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        kind: str,
        output: tuple[int, ...],
        reach: Field,
        inputs: Sequence[int] = (),
        *,
        window: str = "",
        params: int = 0,
        macs: int = 0,
        view: bool = False,
    ) -> int:
        """Append a row and return its index; a ``view`` makes no new tensor."""
        self.rows.append(
            LayerRow(
                name=name,
                kind=kind,
                window=window,
                output=output,
                params=params,
                macs=macs,
                activation_bytes=0 if view else FLOAT32 * prod(output),
                stride=None if reach is None else (reach[0].jump, reach[1].jump),
                receptive_field=None if reach is None else (reach[0].size, reach[1].size),
            )
        )
        self.inputs.append(tuple(inputs))
        return len(self.rows) - 1

    def finish(self, name: str, source: str) -> Inspection:
        """Add up the rows."""
        return Inspection(
            name=name,
            source=source,
            layers=tuple(self.rows),
            params=sum(row.params for row in self.rows),
            macs=sum(row.macs for row in self.rows),
            activation_bytes=sum(row.activation_bytes for row in self.rows),
            peak_bytes=peak([row.activation_bytes for row in self.rows], self.inputs),
            notes=tuple(dict.fromkeys(self.notes)),
        )


def peak(sizes: Sequence[int], inputs: Sequence[tuple[int, ...]]) -> int:
    """Return the most bytes that live at once.

    Args:
        sizes: Bytes of each row's output; 0 for a view, which keeps its input alive instead.
        inputs: For each row, the rows that it reads.
    """
    owners: list[int] = []
    last_use: dict[int, int] = {}
    for index, read in enumerate(inputs):
        view = not sizes[index] and read
        owners.append(owners[read[0]] if view else index)
        for owner in [owners[i] for i in (*read, index)]:
            last_use[owner] = index
    live = highest = 0
    for index, size in enumerate(sizes):
        live += size
        highest = max(highest, live)
        live -= sum(sizes[owner] for owner, last in last_use.items() if last == index)
    return highest


def sides(pair: tuple[int, int]) -> str:
    """Return "11", or "1x7" where height and width differ."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def window_text(kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> str:
    """Return "11x11/4", with "d2" after it where the kernel is dilated."""
    dilated = "" if dilation == (1, 1) else f" d{sides(dilation)}"
    return f"{kernel[0]}x{kernel[1]}/{sides(stride)}{dilated}"
