"""The one way in which pictures of any kind and size become square training images: decoded, to RGB, then ADM's centre crop."""

import numpy as np
from PIL import Image

# The limits and faults of pictures have their home beside the data set's own reader; the evaluator takes them from here.
from runtime.files import UNREADABLE
from runtime.messages import UserError
from runtime.stores import MAX_PIXELS, decode_image, shown

__all__ = ["MAX_PIXELS", "UNREADABLE", "center_crop", "decode_image", "shown", "to_rgb"]


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Any picture -> RGB. Transparency is dropped and EXIF orientation not applied, as in ADM; 16-bit greys keep their upper 8 bits.

    Raises UserError for floating-point pictures, whose range is unknown.
    """
    if image.mode == "F":
        raise UserError(f"{where} is a floating-point picture: expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # PIL would clip 16 bits at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def center_crop(image: Image.Image, resolution: int, where: str = "the picture") -> Image.Image:
    """A picture of any size -> its central square, `resolution` px on a side, enlarging where it is smaller.

    The FID of this literature depends on it, so it follows ADM (arXiv 2105.05233, released code) to the pixel: halve with a box
    filter while the short side is at least twice the target, resize bicubically until it is the target, cut out the centre.
    Give it RGB: palettes and bits cannot be averaged. Raises UserError for a strip so narrow that it would be enlarged beyond MAX_PIXELS.
    """
    width, height = image.size
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise UserError(f"{where} is {width}x{height} px and would be enlarged to {scaled[0]}x{scaled[1]}: cut or remove it")
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
