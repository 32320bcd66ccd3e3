"""The arithmetic of sliding windows: output sizes and receptive fields, along one axis.

Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016); Araujo, Norris and
Sim, "Computing Receptive Fields of Convolutional Neural Networks" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def extent(kernel: int, dilation: int = 1) -> int:
    """Return how many pixels a kernel spans."""
    return (kernel - 1) * dilation + 1


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Return ``N = (W - F + 2P) / S + 1``, rounded down.

    Args:
        size: Input size W in pixels.
        kernel: Kernel size; F is its `extent`.
        stride: S.
        padding: 2P, the sum of both sides' padding, which may differ (AlexNet's [1, 2] makes 3).
        dilation: Distance between the kernel's taps.
    """
    return (size - extent(kernel, dilation) + padding) // stride + 1


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Return the padding before and after that makes ``ceil(W / S)`` outputs, as Keras' 'same'."""
    total = max(0, (-(-size // stride) - 1) * stride + extent(kernel, dilation) - size)
    return total // 2, total - total // 2


def receptive_field(windows: Sequence[tuple[int, int]]) -> int:
    """Return the receptive field of a stack, by ``F(i) = (F(i + 1) - 1) * stride + kernel``.

    Args:
        windows: ``(kernel, stride)`` of each layer, from the input on.
    """
    field = 1
    for kernel, stride in reversed(windows):
        field = (field - 1) * stride + kernel
    return field


@dataclass(frozen=True)
class Span:
    """The input pixels that the outputs of a layer depend on, along one axis.

    Output ``i`` depends on the pixels ``begin + i * jump`` up to ``begin + i * jump + size``, of
    which some lie in the padding. Knowing `begin` is what makes branches and slices come out right.

    Attributes:
        begin: First pixel that output 0 depends on; negative in the padding.
        size: The receptive field in pixels.
        jump: Input pixels from one output to the next: the product of the strides so far.
    """

    begin: int = 0
    size: int = 1
    jump: int = 1

    def through(self, kernel: int, stride: int, before: int = 0, dilation: int = 1) -> Span:
        """Return the span after a window with ``before`` pixels of padding on the left or top."""
        return Span(
            begin=self.begin - before * self.jump,
            size=self.size + (extent(kernel, dilation) - 1) * self.jump,
            jump=self.jump * stride,
        )

    def joined(self, other: Span) -> Span:
        """Return the span of what depends on both; centred branches have the larger one's."""
        begin = min(self.begin, other.begin)
        end = max(self.begin + self.size, other.begin + other.size)
        return Span(begin, end - begin, max(self.jump, other.jump))


# Along height and along width; None once every output depends on the whole input.
Field = tuple[Span, Span] | None


def join(fields: Sequence[Field]) -> Field:
    """Return the field of a layer that takes several inputs position by position."""
    joined = fields[0]
    for field in fields[1:]:
        if joined is None or field is None:
            return None
        joined = (joined[0].joined(field[0]), joined[1].joined(field[1]))
    return joined
