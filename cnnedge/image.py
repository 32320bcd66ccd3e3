"""Image file → uint8 tensor: ONE definition, for training, calibration, verification, runtime.

An exported model that answers differently in the app was most often fed differently there. So
whatever reads an image in cnnedge reads it here.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from cnnedge.documents import hold
from cnnedge.errors import ImageError, first_line
from cnnedge.files import what_is_special
from cnnedge.formats import FORMATS, HEAD, plugin_of
from cnnedge.kind import kind_of
from cnnedge.pixels import ORIENTATION, decoding_bytes, require_memory, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | PillowImage"

# A file that declares more pixels than this is refused before any of them is allocated.
MOST_PIXELS = 89_478_485  # Pillow's own limit, a quarter of a GiB of RGB
RESIZES = ("stretch", "crop", "letterbox")
_GREY = "L"  # ITU-R 601-2 luma, as Pillow defines it


@dataclass(frozen=True)
class ImageContract:
    """What an image must become before the network sees it.

    Attributes:
        height: Pixels.
        width: Pixels.
        channels: 3 for RGB, 1 for grey.
        resize: "stretch" to the size; "crop": the largest centred part of the right shape;
            "letterbox": the whole image, centred on black. All by Pillow's antialiased bilinear.

    Examples:
        >>> cnnedge.ImageContract(height=224, width=224, resize="crop").shape
        (224, 224, 3)
    """

    height: int
    width: int
    channels: int = 3
    resize: str = "stretch"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or self.channels not in (1, 3):
            raise ValueError(f"no image has the shape {self.height}×{self.width}×{self.channels}")
        if self.height * self.width > MOST_PIXELS:
            raise ValueError(f"an image of {self.height}×{self.width} is larger than any is read")
        if self.resize not in RESIZES:
            raise ValueError(f"resize is {self.resize!r}, not one of {', '.join(RESIZES)}")

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image, ``(height, width, channels)``."""
        return self.height, self.width, self.channels

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self) | {"filter": "bilinear, antialiased", "colour": "RGB"}

    @staticmethod
    def from_dict(fields: Any) -> ImageContract:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: it is no image contract.
        """
        return hold(fields, ImageContract)


@dataclass(frozen=True)
class Normalization:
    """What a Keras graph wants of its pixels: ``y = x * scale + offset``, x in 0…255.

    Attributes:
        scale: One factor, or one per channel.
        offset: One summand, or one per channel.
        bgr: Whether the channels are reversed first.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    bgr: bool = False


_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in 0…1
# Named as keras.applications.imagenet_utils.preprocess_input names its modes.
NORMALIZATIONS: dict[str, Normalization] = {
    "unit": Normalization((1 / 255,), (0.0,)),
    "tf": Normalization((1 / 127.5,), (-1.0,)),
    "caffe": Normalization((1.0,), (-103.939, -116.779, -123.68), bgr=True),
    "torch": Normalization(
        tuple(1 / 255 / d for d in _DEVIATION),
        tuple(-m / d for m, d in zip(_MEAN, _DEVIATION, strict=True)),
    ),
    "none": Normalization((1.0,), (0.0,)),
}


def normalizations_of(channels: int) -> tuple[str, ...]:
    """Return the names in `NORMALIZATIONS` of those that images of so many channels can have."""
    return tuple(
        name
        for name, spec in NORMALIZATIONS.items()
        if {len(spec.scale), len(spec.offset)} <= {1, channels}
    )


def to_tensor(source: ImageSource, contract: ImageContract) -> np.ndarray:
    """Return one image as the network takes it: uint8 ``[H, W, C]``.

    An array that has this shape and type already is returned as it is.

    Raises:
        ImageError: the image cannot be decoded; the message names it.
    """
    if (
        isinstance(source, np.ndarray)
        and source.shape == contract.shape
        and source.dtype == np.uint8
    ):
        return source
    picture = decode(source, contract)
    return fit(picture, contract)


def to_batch(sources: Iterable[ImageSource], contract: ImageContract) -> np.ndarray:
    """Return several images as uint8 ``[N, H, W, C]``; see `to_tensor`."""
    return np.stack([to_tensor(source, contract) for source in sources])


def normalize(batch: np.ndarray, normalization: str) -> np.ndarray:
    """Return uint8 images as the float32 a Keras graph was trained on.

    Args:
        batch: uint8 ``[N, H, W, C]``.
        normalization: A name in `NORMALIZATIONS`.
    """
    spec = NORMALIZATIONS[normalization]
    pixels = batch[..., ::-1] if spec.bgr and batch.shape[-1] == 3 else batch
    values = pixels.astype(np.float32)
    if any(s != 1.0 for s in spec.scale):
        values *= np.array(spec.scale, np.float32)
    if any(o != 0.0 for o in spec.offset):
        values += np.array(spec.offset, np.float32)
    return values


def value_range(normalization: str) -> tuple[float, float]:
    """Return the lowest and the highest value that `normalize` can give."""
    ends = normalize(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, -1), normalization)
    return float(ends.min()), float(ends.max())


def decode(source: ImageSource, contract: ImageContract | None = None) -> PillowImage:
    """Return an image upright, in 8-bit RGB, first frame, transparency laid on white.

    Args:
        source: A path, the bytes of a file, an open file, a Pillow image, or a uint8 array
            ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` (RGB) or ``[H, W, 4]`` (RGBA).
        contract: Where the image is going. A JPEG at least four times as large is then decoded at
            a half, a quarter or an eighth of its size, never below twice the target: many times
            faster, and the antialiased resize that follows hardly tells.

    Raises:
        ImageError: it is missing, broken, no image, or too large, or it takes more memory than
            ``CNNEDGE_IMAGE_MEMORY`` MiB (300); the message names it.
    """
    from PIL import Image, UnidentifiedImageError

    name = name_of(source)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source, name), name)
    try:
        if isinstance(source, Image.Image):
            if getattr(source, "tile", None):  # it was opened and not read
                require_memory(decoding_bytes(source, source.size), name)
            source.load()
            return to_rgb(source, name)
        if isinstance(source, str | os.PathLike) and (found := what_is_special(Path(source))):
            raise ImageError(f"{name} is {found}", fix="give an image file")
        opened = _open(source)
        with opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ImageError(
                    f"{name} declares {opened.width}×{opened.height} pixels",
                    fix=f"cnnedge reads at most {MOST_PIXELS / 1e6:.0f} megapixels: shrink it",
                )
            declared = opened.size
            if contract is not None and opened.format == "JPEG":
                aim = (2 * contract.width, 2 * contract.height)
                sideways = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
                opened.draft("RGB", aim[::-1] if sideways else aim)
            opened.seek(0)
            require_memory(decoding_bytes(opened, declared), name)
            opened.load()
            return to_rgb(opened, name)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        too_large = isinstance(error, Image.DecompressionBombError)
        what = "declares more pixels than cnnedge reads" if too_large else "is no image"
        raise ImageError(
            f"{name} {what}", fix="give a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM"
        ) from error
    except FileNotFoundError as error:
        raise ImageError(f"there is no image {name}", fix="check the path") from error
    except IsADirectoryError as error:
        what = f"{name} is {kind_of(name)}, and no image file"
        raise ImageError(what, fix=f"name its files: {name}/*") from error
    except ImageError:
        raise
    # Pillow's decoders raise whatever a damaged file makes them raise.
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ImageError(
            f"{name} cannot be decoded ({reason})", fix="replace it by a whole image file"
        ) from error


_bomb_filter = threading.Lock()


def _open(source: Any) -> PillowImage:
    from PIL import Image, UnidentifiedImageError

    stream = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
    if not isinstance(stream, str | os.PathLike):
        if not hasattr(stream, "read"):
            raise ImageError(
                f"{name_of(source)} is no image",
                fix="give a path, bytes, an open file or a uint8 array",
            )
        try:
            stream.seek(0)
        except (AttributeError, io.UnsupportedOperation):  # a pipe; it may be looked at twice
            stream = io.BytesIO(stream.read())
    # Pillow warns between one and two times its limit; `decode` refuses there, in one line.
    # The warnings module's state is global, hence the lock.
    with _bomb_filter, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.preinit()  # or a format that is named makes it load all forty
        try:
            return Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:
            plugin = plugin_of(_head(stream))
            if plugin is None:
                raise
            if not plugin.load():
                raise ImageError(
                    f"{name_of(source)} is {plugin.format}, "
                    f"which needs the package {plugin.package}",
                    fix=f"run: pip install {plugin.package}",
                ) from None
            return Image.open(stream, formats=(plugin.format,))


def _head(stream: Any) -> bytes:
    if isinstance(stream, str | os.PathLike):
        with open(stream, "rb") as file:
            return file.read(HEAD)
    stream.seek(0)
    return bytes(stream.read(HEAD))


def _from_array(array: np.ndarray, name: str) -> PillowImage:
    from PIL import Image

    if array.dtype != np.uint8:
        raise ImageError(
            f"{name} holds {array.dtype}, an image array holds uint8 0…255",
            fix="for floats 0…1: (array * 255).round().astype('uint8')",
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if (
        array.size == 0
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (3, 4))
    ):
        raise ImageError(f"{name} is no image", fix="give [H, W], [H, W, 3] or [H, W, 4]")
    return Image.fromarray(np.ascontiguousarray(array))


def fit(picture: PillowImage, contract: ImageContract) -> np.ndarray:
    """Return a decoded image resized to the contract, uint8 ``[H, W, C]``.

    Raises:
        ImageError: it is so tall or so large that this would take more memory than any image may.
    """
    from PIL import Image

    if contract.resize == "stretch" and contract.width * picture.height > MOST_PIXELS:
        raise ImageError(
            f"an image of {_size(picture)} pixels is too tall to be stretched",
            fix=f"give one of at most {MOST_PIXELS // contract.width} rows",
        )
    require_memory(_fitting_bytes(picture.size, contract), f"an image of {_size(picture)} pixels")
    if contract.channels == 1:
        picture = picture.convert(_GREY)
    width, height = contract.width, contract.height
    if contract.resize == "letterbox":
        scale = min(width / picture.width, height / picture.height)
        inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        canvas = Image.new(picture.mode, (width, height))
        canvas.paste(
            _resize(picture, inner),
            ((width - inner[0]) // 2, (height - inner[1]) // 2),
        )
        picture = canvas
    else:
        if contract.resize == "crop":
            picture = picture.crop(_centre(picture.size, width / height))
        picture = _resize(picture, (width, height))
    tensor = np.asarray(picture)
    return tensor[..., None] if contract.channels == 1 else tensor


def _fitting_bytes(size: tuple[int, int], contract: ImageContract) -> int:
    """Return what `fit` takes at its worst moment: the picture, a part of it, and what is made."""
    width, height = size
    held = 4 * width * height
    if contract.resize == "crop":
        left, top, right, bottom = _centre(size, contract.width / contract.height)
        width, height = right - left, bottom - top
        held += 4 * width * height if (width, height) != size else 0
    held += width * height if contract.channels == 1 else 0
    across = contract.width
    if contract.resize == "letterbox":
        across = max(1, round(width * min(across / width, contract.height / height)))
    # Between the axes it is as wide as the target. Pillow's filter has two weights of eight bytes
    # for each pixel of a line that is shrunk.
    return held + 4 * across * height + 16 * max(width, height)


def _size(picture: PillowImage) -> str:
    return f"{picture.width}×{picture.height}"


def _resize(picture: PillowImage, size: tuple[int, int]) -> PillowImage:
    """Return a picture resized to ``(width, height)`` by Pillow's antialiased bilinear filter.

    The width first: Pillow rounds to 8 bits between the axes, and from 13.0 on it takes the height
    first where that is quicker, which changes pixels by a level. Asked for one axis at a time,
    every version gives the same.
    """
    from PIL import Image

    for step in ((size[0], picture.height), size):
        if picture.size != step:
            picture = picture.resize(step, Image.Resampling.BILINEAR)
    return picture


def _centre(size: tuple[int, int], aspect: float) -> tuple[int, int, int, int]:
    """Return the largest centred box of a shape, in whole source pixels."""
    width = max(1, round(min(size[0], size[1] * aspect)))
    height = max(1, round(min(size[1], size[0] / aspect)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def name_of(source: Any) -> str:
    """Return what a message calls an image: its file, or what kind of thing it is."""
    if isinstance(source, str | os.PathLike):
        return str(Path(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"the image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"the array of shape {source.shape}"
    name = getattr(source, "name", None) or getattr(source, "filename", None)
    return str(name) if name else f"the {type(source).__name__}"
