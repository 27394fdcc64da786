"""ADM's centre crop: the one way in which pictures of any size become square training images."""

from PIL import Image


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """A picture of any size -> its central square, `resolution` px on a side, enlarging where it is smaller.

    The FID of this literature depends on it, so it follows ADM (arXiv 2105.05233, released code) to the pixel: halve with a box
    filter while the short side is at least twice the target, resize bicubically until it is the target, cut out the centre.
    Give it RGB: palettes and bits cannot be averaged.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
