"""Pictures of any mode and size to square RGB: the centre crop of ADM (arXiv 2105.05233), and others."""

import numpy as np
from PIL import Image

from runtime.messages import UserError
from runtime.stores import MAX_PIXELS

TRANSFORMS = ("center-crop-dhariwal", "center-crop", "center-crop-lanczos", "center-crop-wide", "none")


class NotSquare(UserError):
    """A picture that is not square, and no transform was chosen: for all pictures it must be."""


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Convert to RGB as ADM does: drop transparency, ignore EXIF orientation. 16-bit greys keep their upper 8 bits.

    Raises UserError for pictures of unknown range: floating-point, and integers that do not look like 16 bits. Cameras
    and scanners store 12 or 14 bits in 16, and 32 bits hold anything.
    """
    if image.mode == "F":
        raise UserError(f"{where}: a floating-point picture; expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):                                # PIL would clip 16 bits at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or not 2**14 <= grey.max() < 2**16:
            raise UserError(f"{where}: greys {grey.min()}..{grey.max()} in more than 8 bits, of unknown range; save it "
                            "with 8 bits, or scale it to 0..65535")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int, where: str = "the picture") -> Image.Image:
    """Resize an RGB picture and cut out its central square of `resolution` px; smaller pictures are enlarged.

    FID depends on every pixel, so this follows ADM's released code exactly: halve with a box filter while the short
    side is at least twice the target, resize bicubically to the target, cut out the centre.
    Raises UserError for a strip so narrow that it would be enlarged beyond MAX_PIXELS.
    """
    width, height = image.size
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise UserError(f"{where}: {width}x{height} px would be enlarged to {scaled[0]}x{scaled[1]}; cut or remove it")
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def require_square(image: Image.Image, where: str) -> None:
    """Raise NotSquare, which asks for a transform."""
    if image.width != image.height:
        raise NotSquare(f"{where}: {image.width}x{image.height} px is not square; choose "
                        f"--transform={'|'.join(TRANSFORMS)}, of which the first is that of the published numbers")


def to_square(image: Image.Image, resolution: int, transform: str | None, where: str = "the picture") -> Image.Image:
    """Make an RGB picture `resolution` px wide and high by one of TRANSFORMS; None: the first, if it is square.

    center-crop, also called center-crop-lanczos: the central square, resized with Lanczos' filter, as is usual for
    COCO. center-crop-wide: the whole width, on black; of a tall picture the central square. none: no change. Raises
    UserError for a picture that the transform does not take.
    """
    width, height = image.size
    if transform is None:
        require_square(image, where)
    if transform in (None, "center-crop-dhariwal"):
        return center_crop(image, resolution, where)
    if transform == "none":
        if image.size != (resolution, resolution):
            raise UserError(f"{where}: {width}x{height} px, expected {resolution}x{resolution}; "
                            "use --transform=center-crop-dhariwal")
        return image
    rows = min(width, height)
    columns = width if transform == "center-crop-wide" else rows
    left, top = (width - columns) // 2, (height - rows) // 2
    image = image.crop((left, top, left + columns, top + rows))
    image = image.resize((resolution, max(1, round(resolution * rows / columns))), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (resolution, resolution))
    square.paste(image, (0, (resolution - image.height) // 2))
    return square
