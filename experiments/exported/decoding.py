"""From an image file to pixels, as `ab_jax.data.pixels` decodes it, without loading JAX."""

import io
import warnings

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_TURNS = {  # by the orientation that a camera notes
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_END_OF_JPEG = b"\xff\xd9"
_NOISE = bytes(range(64))  # and behind each restart marker, for which a decoder may wait
_SLIPPED_IN = _NOISE + b"".join(bytes([0xFF, 0xD0 + i]) + _NOISE for i in range(8))


def decode(encoded: bytes, name: str, mode: str) -> np.ndarray:
    """Pixels as every viewer shows them, turned as the file notes (EXIF); 16 bits scaled to 8.

    Args:
      encoded: the whole file, PNG, JPEG, WebP or BMP.
      name: the file's name, for the error.
      mode: "L" for gray, "RGB" for colours.

    Returns:
      uint8 [height, width] or [height, width, 3].

    Raises:
      ValueError: it is no such image, a damaged one, or one of more pixels than Pillow trusts.
    """
    try:
        if encoded[8:12] == b"WEBP" and not features.check("webp"):
            raise ValueError("it is WebP, which the Pillow that is installed was built without")
        image = _opened(encoded)
        if image.format in ("JPEG", "MPO") and _ends_early(encoded, image):
            raise ValueError("it ends before its last pixel")
        pixels = _eight_bits(image, encoded).convert(mode)
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return np.asarray(pixels if turn is None else pixels.transpose(turn))
    except UnidentifiedImageError as error:  # whose message names a buffer of ours
        raise _unreadable(name, "it does not start as one") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, why: object) -> ValueError:
    return ValueError(f"{name} is not a readable PNG or JPEG image (nor WebP or BMP): {why}")


def _opened(encoded: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # beyond 89,478,485 pixels
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            image.load()
            return image


def _ends_early(encoded: bytes, image: Image.Image) -> bool:
    """Whether a JPEG lacks pixels before its end marker, where decoders fill up with gray.

    Bytes slipped in there become pixels if some are missing, and are skipped if none is.
    """
    end = encoded.rfind(_END_OF_JPEG)
    if end < 0 or b"\xff\xc9" in encoded or b"\xff\xca" in encoded:  # arithmetic coding has no end
        return False
    longer = encoded[:end] + _SLIPPED_IN + encoded[end:]
    return _opened(longer).tobytes() != image.tobytes()


def _eight_bits(image: Image.Image, encoded: bytes) -> Image.Image:
    """The image with channels of 8 bits: of 16, v becomes v / 257, rounded."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; convert them to 8 or 16")
    elif image.format == "PNG" and encoded[24] == 16:  # bits of a channel, of which Pillow has 8
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None or decoded.dtype != np.uint16 or decoded.shape[1::-1] != image.size:
            raise ValueError("its pixels of 16 bits cannot be decoded")
        deep = decoded[..., 2::-1]  # from BGR or BGRA
    else:
        return image
    return Image.fromarray(((deep.astype(np.uint32) + 128) // 257).astype(np.uint8))
