"""The six networks of FDr6 (FD-Loss, arXiv 2604.28190), as timm names them, and their published reference files.

FDr6 is the mean over the six of Frechet distance / constant. Letters: B batch, H W image size, F feature width.
"""

from dataclasses import dataclass, field

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from runtime.messages import UserError


@dataclass(frozen=True)
class Row:
    """One network: how it is built, what it sees, and what its distance is divided by."""

    timm_name: str | None                    # None: the Inception of FID
    size: int                                # of the input, pixels
    width: int                               # F
    constant: float
    file: str                                # with mu and sigma of ImageNet's training images at 256 px
    settings: dict[str, bool] = field(default_factory=dict)       # of timm.create_model; for vision transformers


DYNAMIC = {"dynamic_img_size": True}                              # position embeddings for any size
PADDED = DYNAMIC | {"dynamic_img_pad": True}                      # 256 px are padded to a multiple of 14
FDR6 = {
    "inception": Row(None, 299, 2048, 1.68, "guided_diffusion_stats.npz"),
    "convnext-224": Row("convnextv2_base.fcmae_ft_in22k_in1k", 224, 1024, 56.87, "convnext_in256_t224_stats.npz"),
    "dinov2-256": Row("vit_large_patch14_dinov2.lvd142m", 256, 1024, 14.19,
                      "vit_large_patch14_dinov2_lvd142m_in256_t256_stats.npz", PADDED),
    "mae-224": Row("vit_large_patch16_224.mae", 224, 1024, 0.04, "vit_large_patch16_224_mae_in256_t224_stats.npz",
                   DYNAMIC),
    "siglip-224": Row("vit_so400m_patch16_siglip_256.v2_webli", 224, 1152, 0.60,
                      "vit_so400m_patch16_siglip_256_v2_webli_in256_t224_stats.npz", DYNAMIC),
    # Not the quickgelu form: constant and published statistics are of this one.
    "clip-256": Row("vit_large_patch14_clip_224.openai", 256, 1024, 5.60,
                    "vit_large_patch14_clip_224_openai_in256_t256_stats.npz", PADDED),
}
OTHERS = {name: row for name, row in FDR6.items() if row.timm_name is not None}


class FdNetwork(nn.Module):
    """uint8 images (B, 3, H, W) -> pooled features (B, F), float32: a class token, an attention pool, or a mean.

    Pixels are resized (bicubic with antialiasing, without rounding), then normalised by the network's mean and std.
    Vision transformers compute in bfloat16 on a GPU, as the published statistics.
    """

    def __init__(self, row: Row, model: nn.Module):
        super().__init__()
        self.size, self.is_vit, self.model = row.size, bool(row.settings), model
        for name in ("mean", "std"):
            values = torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, size, size)."""
        x = images.float()
        if tuple(x.shape[2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return (x - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.preprocess(images)
        if not self.is_vit:
            return self.model.forward_features(x).mean(dim=(2, 3))                # (B, F), without the head's norm
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True).float()


def load_network(name: str) -> FdNetwork:
    """A network of OTHERS with weights from timm's hub or its cache. Raises UserError if they are not there."""
    row = OTHERS[name]
    try:
        model = timm.create_model(row.timm_name, pretrained=True, num_classes=0, **row.settings)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: weights of {row.timm_name} neither in the hub's cache nor downloaded ({reason}); "
                        "download them once where the hub can be reached, and keep HF_HOME") from error
    return FdNetwork(row, model)
