"""Grids of images with their captions."""

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from runtime.stores import shown

SIDE, SIZE, SPACING = 128, 11, 2         # px: least width of a captioned image, height of its letters and between lines
LINES, MARGIN = 10, 4                    # of a caption, the rest is cut off; px around images and captions


def grid_of(images: torch.Tensor, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """A grid of uint8 images (N, 3, H, W), row by row, with the captions (N,) below them.

    With captions, small images are enlarged by a whole factor, so that the text fits.
    """
    if captions is None:
        return to_pil_image(make_grid(images, nrow=columns))
    from matplotlib import get_data_path  # slow to import

    count, _, height, width = images.shape
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", SIZE)  # Pillow's own has no accents
    scale = -(-SIDE // width)
    height, width = scale * height, scale * width
    fitting = {"width": int(width / font.getlength("x")), "max_lines": LINES, "placeholder": "..."}
    texts = [textwrap.wrap(shown(caption), **fitting) for caption in captions]
    row = height + max(map(len, texts)) * (SIZE + SPACING) + 2 * MARGIN
    size = MARGIN + min(columns, count) * (width + MARGIN), MARGIN + -(-count // columns) * row
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = MARGIN + i % columns * (width + MARGIN), MARGIN + i // columns * row
        grid.paste(to_pil_image(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.multiline_text((left, top + height), "\n".join(text), "black", font, spacing=SPACING)
    return grid
