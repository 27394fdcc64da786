"""Grids of images with their captions."""

import textwrap
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from runtime.stores import shown

SIDE, SIZE, SPACING = 128, 11, 2         # px: least width of a captioned image, height of its letters and between lines
LINES, MARGIN = 10, 4                    # of a caption, the rest is cut off; px around images and captions
GAP = 2                                  # px around images without captions


def grid_of(images: torch.Tensor, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """A grid of uint8 images (N, 3, H, W), row by row, with the captions (N,) below them.

    With captions, small images are enlarged by a whole factor, so that the text fits.
    """
    count, _, height, width = images.shape
    columns = min(columns, count)
    if captions is None:
        cells = F.pad(images, (GAP, 0, GAP, 0, 0, 0, 0, -count % columns)).unflatten(0, (-1, columns))
        pixels = cells.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)         # (rows, columns, 3, ...) -> (Y, X, 3)
        return Image.fromarray(F.pad(pixels, (0, 0, 0, GAP, 0, GAP)).numpy())
    from matplotlib import get_data_path  # slow to import

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", SIZE)  # Pillow's own has no accents
    scale = -(-SIDE // width)
    height, width = scale * height, scale * width
    fitting = {"width": int(width / font.getlength("x")), "max_lines": LINES, "placeholder": "..."}
    texts = [textwrap.wrap(shown(caption), **fitting) for caption in captions]
    row = height + max(map(len, texts)) * (SIZE + SPACING) + 2 * MARGIN
    size = MARGIN + columns * (width + MARGIN), MARGIN + -(-count // columns) * row
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = MARGIN + i % columns * (width + MARGIN), MARGIN + i // columns * row
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + height), "\n".join(text), "black", font, spacing=SPACING)
    return grid
