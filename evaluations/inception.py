"""The Inception-v3 of 2015-12-05 that every published FID is measured with, and TensorFlow 1's resize in front of it.

It is not torchvision's Inception: average pools leave the padding out, the last block pools with a maximum, there are 1008
outputs, and other weights. The key names are those of the published file `pt_inception-2015-12-05-6726825d.pth`.
Shape letters: B batch, H W image size.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SIDE = 299


def resize_tf1(images: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """TF1's `ResizeBilinear`: (B, C, H, W) in 0..255 -> float32 (B, C, side, side), never rounded.

    Output i reads the source at i * in / side, without the half-pixel shift of `F.interpolate`, and without antialiasing.
    """
    top, bottom, down = _taps(images.shape[2], side, images.device)
    left, right, across = _taps(images.shape[3], side, images.device)
    x = images.float()
    x = x[..., left] + (x[..., right] - x[..., left]) * across                    # (B, C, H, side): horizontally first, as TF does
    return x[:, :, top] + (x[:, :, bottom] - x[:, :, top]) * down[:, None]        # (B, C, side, side)


@functools.lru_cache(maxsize=8)                                   # a copy to a GPU would wait for all that it has to do
@torch.inference_mode(False)                                      # what is kept must serve in any mode
def _taps(source: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Along one axis: lower index, upper index and weight of the upper one, each (side,)."""
    position = np.arange(side, dtype=np.float32) * (np.float32(source) / np.float32(side))  # float32 as in TF
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, source - 1)
    return tuple(torch.from_numpy(a).to(device) for a in (low, high, position - low.astype(np.float32)))


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU. Without `padding`, stride 1 keeps the size and stride 2 does not pad."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | None = None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, same if padding is None else padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2)


# A block is a list of branches over one input, concatenated in this order. A branch is a chain of steps: a unit as
# (name, outputs, kernel[, stride]), a pooling function, or, only at the end, a list of units that all read the same tensor.
ROW, COLUMN = (1, 7), (7, 1)


def mixed_5(pooled: int) -> list:
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [average, ("branch_pool", pooled, 1)]]


def mixed_6(n: int) -> list:
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", n, 1), ("branch7x7_2", n, ROW), ("branch7x7_3", 192, COLUMN)],
            [("branch7x7dbl_1", n, 1), ("branch7x7dbl_2", n, COLUMN), ("branch7x7dbl_3", n, ROW),
             ("branch7x7dbl_4", n, COLUMN), ("branch7x7dbl_5", 192, ROW)],
            [average, ("branch_pool", 192, 1)]]


def mixed_7(pool) -> list:
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
            [pool, ("branch_pool", 192, 1)]]


MIXED_6A = [[("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            [halve]]
MIXED_7A = [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, ROW), ("branch7x7x3_3", 192, COLUMN), ("branch7x7x3_4", 192, 3, 2)],
            [halve]]


class Block(nn.Module):
    """Branches over one input of `inputs` channels, concatenated to `outputs` channels."""

    def __init__(self, inputs: int, branches: list):
        super().__init__()
        self.outputs = 0
        self.chains = []                                                          # per branch: steps; per step: functions of one tensor
        for branch in branches:
            widths, chain = [inputs], []
            for step in branch:
                if callable(step):
                    chain.append([step])
                    continue
                units = {name: Unit(widths[0], *shape) for name, *shape in (step if isinstance(step, list) else [step])}
                for name, unit in units.items():
                    self.add_module(name, unit)
                widths = [unit.conv.out_channels for unit in units.values()]
                chain.append(list(units.values()))
            self.chains.append(chain)
            self.outputs += sum(widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = []
        for chain in self.chains:
            y = [x]
            for step in chain:
                y = [function(y[0]) for function in step]
            ends += y
        return torch.cat(ends, dim=1)


class Inception(nn.Module):
    """uint8 (or 0..255 float) images (B, 3, H, W) of any size -> ADM's two features, float32.

    Pooled (B, 2048): the mean over the 8 x 8 map behind the 94 units, `pool_3:0`. Spatial (B, 2023): seven channels of the first
    branch of Mixed_6d after its ReLU, `mixed_6/conv:0`, flattened row by row with the channel last, as TF does.
    `fc` turns pooled features into 1008 logits; the Inception Score uses its weight and not its bias.
    """

    pooled, spatial, spatial_channels = 2048, 17 * 17 * 7, 7

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padding=0)
        width = 192
        for name, branches in {
            "Mixed_5b": mixed_5(32), "Mixed_5c": mixed_5(64), "Mixed_5d": mixed_5(64),
            "Mixed_6a": MIXED_6A, "Mixed_6b": mixed_6(128), "Mixed_6c": mixed_6(160), "Mixed_6d": mixed_6(160), "Mixed_6e": mixed_6(192),
            "Mixed_7a": MIXED_7A, "Mixed_7b": mixed_7(average), "Mixed_7c": mixed_7(maximum),
        }.items():
            block = Block(width, branches)
            self.add_module(name, block)
            width = block.outputs
        self.fc = nn.Linear(width, 1008)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (resize_tf1(images) - 128) / 128                                      # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))         # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))                      # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))                 # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))         # (B, 768, 17, 17)
        spatial = x[:, :self.spatial_channels].permute(0, 2, 3, 1).flatten(1)     # (B, 2023), of branch1x1, which comes first
        x = self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))                        # (B, 2048, 8, 8)
        return self.Mixed_7c(x).mean(dim=(2, 3)), spatial
