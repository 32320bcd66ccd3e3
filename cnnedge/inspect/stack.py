"""A stack of small kernels against the single kernel that sees as much."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from cnnedge.errors import CnnEdgeError
from cnnedge.inspect.formulas import receptive_field

_EXAMPLE = "write kernels like 3x3,3x3,3x3"
_LARGEST = 1024


@dataclass(frozen=True)
class StackComparison:
    """Simonyan and Zisserman's argument (2014, section 2.3), for any stack at stride 1.

    Every layer has C input and C output channels and no bias.

    Attributes:
        kernels: ``(height, width)`` of each kernel.
        receptive_field: ``(height, width)`` in pixels of the stack, and so of the single kernel.
        channels: C, or None where the weights are left as factors of C².
        stack_weights: Weights of the stack, or their factor of C².
        single_weights: Weights of the single kernel, or their factor of C².
        ratio: The stack's weights, and so its multiply-accumulates, over the single kernel's.
        nonlinearities: Activations in the stack; the single kernel has one.
    """

    kernels: tuple[tuple[int, int], ...]
    receptive_field: tuple[int, int]
    channels: int | None
    stack_weights: int
    single_weights: int
    ratio: float
    nonlinearities: int

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        return asdict(self)

    def __str__(self) -> str:
        unit = "" if self.channels else "C²"
        height, width = self.receptive_field
        return (
            f"{len(self.kernels)} kernels: receptive field {height}x{width}, "
            f"{self.stack_weights:,}{unit} weights, {self.nonlinearities} nonlinearities; "
            f"one {height}x{width} kernel: {self.single_weights:,}{unit} weights, "
            f"1 nonlinearity; ratio {self.ratio:.3f}"
        )


def compare_stack(spec: str, channels: int | None = None) -> StackComparison:
    """Compare a stack of kernels with the single kernel of the same receptive field.

    Args:
        spec: Kernels separated by commas, such as "3x3,3x3,3x3" or "1x7,7x1"; "3" is "3x3".
        channels: Input and output channels C of every layer.

    Raises:
        CnnEdgeError: ``spec`` or ``channels`` is not of that form.
    """
    kernels = tuple(_kernel(part.strip(), spec) for part in spec.split(","))
    if channels is not None and channels < 1:
        raise CnnEdgeError(f"{channels} channels make no layer", fix="pass 1 or more")
    height = receptive_field([(kernel[0], 1) for kernel in kernels])
    width = receptive_field([(kernel[1], 1) for kernel in kernels])
    stack, single = sum(h * w for h, w in kernels), height * width
    factor = 1 if channels is None else channels**2
    return StackComparison(
        kernels=kernels,
        receptive_field=(height, width),
        channels=channels,
        stack_weights=stack * factor,
        single_weights=single * factor,
        ratio=stack / single,
        nonlinearities=len(kernels),
    )


def _kernel(part: str, spec: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})(?:[x×](\d{1,4}))?", part, re.IGNORECASE)
    sizes = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(1 <= size <= _LARGEST for size in sizes):
        raise CnnEdgeError(f"{part!r} in the stack {spec!r} is no kernel", fix=_EXAMPLE)
    return sizes
