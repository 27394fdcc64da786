"""Grids of images with their captions."""

import textwrap
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from runtime.stores import shown

SIDE, SIZE = 128, 11      # px: the least width of a captioned image, and the height of its letters
LINE_HEIGHT = SIZE + 2
LINES, MARGIN = 10, 4     # of a caption, the rest is cut off; px around images and captions


def grid_of(images: torch.Tensor, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """A grid of uint8 images (N, 3, H, W), row by row, with the captions (N,) below them.

    With captions, small images are enlarged by a whole factor, so that the text fits.
    """
    if captions is None:
        return to_pil_image(make_grid(images, nrow=columns))
    from matplotlib import get_data_path  # slow to import

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", SIZE)  # Pillow's own has no accents
    scale = -(-SIDE // images.shape[-1])
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)       # (N, 3, H, W)
    height, width = images.shape[2:]
    fitting = {"width": int(width / font.getlength("x")), "max_lines": LINES, "placeholder": "..."}
    texts = [textwrap.wrap(shown(caption), **fitting) for caption in captions]
    below = max(map(len, texts)) * LINE_HEIGHT + MARGIN
    tiles = F.pad(images, (MARGIN, 0, MARGIN, below), value=255)                          # (N, 3, H + ., W + .)
    grid = to_pil_image(F.pad(make_grid(tiles, nrow=columns, padding=0, pad_value=255), (0, MARGIN), value=255))
    draw = ImageDraw.Draw(grid)
    for i, text in enumerate(texts):
        left, top = MARGIN + i % columns * tiles.shape[3], MARGIN + i // columns * tiles.shape[2] + height
        for line, words in enumerate(text):
            draw.text((left, top + line * LINE_HEIGHT), words, "black", font)
    return grid
