"""`check`: is the prepared data set whole, and do its latents look like its images?"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import LatentDataset
from models.cached_features import Features, feature_stores
from models.vae import Codec, LatentSpace, load_codec
from preprocessing.work import load
from runtime.files import write_whole
from runtime.messages import UserError
from runtime.stores import shown

CHUNK = 64   # entries a worker reads at a time
SHOWN = 8    # entries in the picture


class _Faults(torch.utils.data.Dataset):
    """Item k reads the k-th chunk of entries: their number, and one sentence for each that is at fault."""

    def __init__(self, entries: LatentDataset):
        self.entries = entries

    def __len__(self) -> int:
        return -(-len(self.entries) // CHUNK)

    def __getitem__(self, k: int) -> tuple[int, list[str]]:
        chunk = range(k * CHUNK, min((k + 1) * CHUNK, len(self.entries)))
        return len(chunk), [fault for fault in map(self._fault, chunk) if fault]

    def _fault(self, i: int) -> str | None:
        try:
            _, moments, _, *features = self.entries[i]
        except UserError as error:
            return str(error)
        if not torch.isfinite(moments).all():
            return f"the moments of {self.entries.key(i)} are not finite: remove them and encode again"
        if not all(torch.isfinite(part).all() for one in features for part in one.values()):
            return f"the features of {self.entries.key(i)} are not finite: remove them and encode again"
        return None


def side_by_side(entries: LatentDataset, space: LatentSpace, codec: Codec) -> tuple[Image.Image, float]:
    """A few images above what their latents decode to, and the mean PSNR between them in dB."""
    chosen = np.linspace(0, len(entries) - 1, min(SHOWN, len(entries))).round().astype(int)
    images = torch.stack([entries[i][0] for i in chosen])                         # (B, 3, R, R)
    moments = torch.stack([entries[i][1] for i in chosen])                        # (B, 2C, H, W)
    mean_only = torch.zeros(len(moments), moments.shape[1] // 2, *moments.shape[2:])
    decoded = codec.decode(space.latents(moments, mean_only)).cpu()               # (B, 3, R, R)
    error = (images.double() - decoded.double()).square().mean(dim=(1, 2, 3))     # (B,)
    psnr = 10 * torch.log10(255**2 / error.clamp(min=1e-3)).mean().item()
    rows = torch.cat([torch.cat(list(row), dim=2) for row in (images, decoded)], dim=1)                   # (3, 2R, B*R)
    return Image.fromarray(rows.permute(1, 2, 0).numpy()), psnr


def check(source: str, output: str, workers: int, model_url: str | None = None) -> None:
    """Read every image, all moments and all features below `source` and write the picture `output`.

    Raises UserError when images, moments, features and labels do not pair, or with the number of faulty files and the first sentences.
    """
    picture = Path(output)
    if picture.suffix != ".png" or not picture.parent.is_dir():
        raise UserError(f"--output {shown(output)}: expected the name of a .png in a folder that exists")
    entries = LatentDataset(source, features=[Features(path) for path in feature_stores(source)])
    if entries.vae_record is None:
        print(f"{shown(source)} does not record its VAE: taking {LatentSpace()}")
    space = LatentSpace.from_record(entries.vae_record) if entries.vae_record else LatentSpace()
    side = entries.resolution // space.downsampling
    if entries.moments_shape != (2 * space.channels, side, side):
        raise UserError(f"moments of shape {entries.moments_shape} and images of {entries.resolution} px do not fit {space}: encode again")
    codec = load_codec(model_url or space.decoder, "cuda" if torch.cuda.is_available() else "cpu")
    space.require_same(codec.space, "the data set", "the decoder")

    faults = []
    with tqdm(total=len(entries), desc="check", unit="image") as bar:
        for count, found in load(_Faults(entries), workers):
            faults += found
            bar.update(count)
    if faults:
        raise UserError(f"{len(faults)} of {len(entries)} entries are at fault: {' | '.join(faults[:3])}")

    drawn, psnr = side_by_side(entries, space, codec)
    write_whole(picture, lambda partial: drawn.save(partial, "png"))
    by = "".join(f", features of {one.record.enc_type}" for one in entries.features)
    print(f"{shown(source)}: {len(entries)} images of {entries.resolution} px, moments {entries.moments_shape}, "
          f"{entries.num_classes} classes{by}, all readable; images above their decoded latents in {shown(output)} (PSNR {psnr:.1f} dB)")
