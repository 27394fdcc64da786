"""The six networks of FDr6 (FD-Loss, arXiv 2604.28190): the mean over them of Frechet distance / constant."""

from typing import NamedTuple


class Row(NamedTuple):
    """One network. `file` holds mu and sigma of ImageNet's training images at 256 px."""

    timm_name: str | None                                         # None: the Inception of FID
    size: int                                                     # of the input, pixels
    constant: float                                               # by which its distance is divided
    file: str
    settings: dict[str, bool] = {}                                # timm's, of a vision transformer


DYNAMIC = {"dynamic_img_size": True}                              # position embeddings for any size
PADDED = DYNAMIC | {"dynamic_img_pad": True}                      # 256 px are padded to a multiple of 14
FDR6 = {
    "inception": Row(None, 299, 1.68, "guided_diffusion_stats.npz"),
    "convnext-224": Row("convnextv2_base.fcmae_ft_in22k_in1k", 224, 56.87, "convnext_in256_t224_stats.npz"),
    "dinov2-256": Row("vit_large_patch14_dinov2.lvd142m", 256, 14.19,
                      "vit_large_patch14_dinov2_lvd142m_in256_t256_stats.npz", PADDED),
    "mae-224": Row("vit_large_patch16_224.mae", 224, 0.04, "vit_large_patch16_224_mae_in256_t224_stats.npz", DYNAMIC),
    "siglip-224": Row("vit_so400m_patch16_siglip_256.v2_webli", 224, 0.60,
                      "vit_so400m_patch16_siglip_256_v2_webli_in256_t224_stats.npz", DYNAMIC),
    # Not the quickgelu form: constant and published statistics are of this one.
    "clip-256": Row("vit_large_patch14_clip_224.openai", 256, 5.60,
                    "vit_large_patch14_clip_224_openai_in256_t256_stats.npz", PADDED),
}
OTHERS = {name: row for name, row in FDR6.items() if row.timm_name is not None}
