"""`check`: read a whole prepared data set, and draw its images above their decoded latents."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import IMAGES, MOMENTS, MOMENTS_EXTENSIONS, LatentDataset
from models.cached_features import Features, feature_stores
from models.vae import Codec, LatentSpace, load_codec, read_space
from preprocessing.destination import in_workers
from runtime.catalogue import write_catalogue
from runtime.files import write_whole
from runtime.launch import blocks
from runtime.messages import UserError, notice, say
from runtime.stores import IMAGE_EXTENSIONS, shown

CHUNK = 64   # entries that a worker reads at a time
SHOWN = 8    # entries in the picture


def _faults(entries: LatentDataset, chunk: range) -> tuple[int, list[str]]:
    """The number of entries in a chunk, and one sentence for each faulty one."""
    return len(chunk), [fault for fault in (_fault(entries, i) for i in chunk) if fault]


def _fault(entries: LatentDataset, i: int) -> str | None:
    try:
        _, moments, _, *features = entries[i]
    except UserError as error:
        return str(error)
    if not torch.isfinite(moments).all():
        return f"{entries.key(i)}: its moments are not finite; remove them and encode again"
    if not all(torch.isfinite(part).all() for one in features for part in one.values()):
        return f"{entries.key(i)}: its features are not finite; remove them and encode again"
    return None


def side_by_side(entries: LatentDataset, space: LatentSpace, codec: Codec) -> tuple[Image.Image, float]:
    """A picture of a few images above their decoded latents, and the mean PSNR between them in dB."""
    chosen = np.linspace(0, len(entries) - 1, min(SHOWN, len(entries))).round().astype(int)
    images = torch.stack([entries[i][0] for i in chosen])                         # (B, 3, R, R)
    moments = torch.stack([entries[i][1] for i in chosen])                        # (B, 2C, H, W)
    no_noise = torch.zeros(len(moments), space.channels, *moments.shape[2:])
    decoded = codec.decode(space.latents(moments, no_noise)).cpu()                # (B, 3, R, R)
    error = (images.double() - decoded.double()).square().mean(dim=(1, 2, 3))     # (B,)
    psnr = 10 * torch.log10(255**2 / error.clamp(min=1e-3)).mean().item()
    rows = torch.cat([torch.cat(list(row), dim=2) for row in (images, decoded)], dim=1)       # (3, 2R, B*R)
    return Image.fromarray(rows.permute(1, 2, 0).numpy()), psnr


def check(source: str, output: str, workers: int, model_url: str | None = None) -> None:
    """Read all images, moments and features below `source`, write their catalogues anew, and the picture `output`.

    Faulty files are named on stderr, one to a line. Raises UserError if there are any, and if images, moments, features
    and labels do not pair.
    """
    picture = Path(output)
    if picture.suffix != ".png" or not picture.parent.is_dir():
        raise UserError(f"--output {shown(output)}: not the name of a .png in a folder that exists")
    features = feature_stores(source)
    stores = {Path(source, name): IMAGE_EXTENSIONS for name in IMAGES} | dict.fromkeys(
        [*(Path(source, name) for name in MOMENTS), *features], MOMENTS_EXTENSIONS)
    for path, extensions in stores.items():
        if path.exists():                                         # first: files may have been added or removed by hand
            write_catalogue(path, extensions)
    entries = LatentDataset(source, features=[Features(path) for path in features])
    space, resolution = read_space(entries.vae_record, entries.moments_shape, entries.resolution, shown(source))
    codec = load_codec(model_url or space.decoder, "cuda" if torch.cuda.is_available() else "cpu")
    space.require_same(codec.space, "the data set", "the decoder")

    faults = []
    with tqdm(total=len(entries), desc="check", unit="image") as bar:
        for count, found in in_workers(partial(_faults, entries), blocks(len(entries), CHUNK), workers):
            faults += found
            bar.update(count)
    if faults:
        for fault in faults:
            notice(fault)
        raise UserError(f"{shown(source)}: {len(faults)} of {len(entries)} entries are faulty, named above; "
                        "remove their files, then convert or encode again")

    drawn, psnr = side_by_side(entries, space, codec)
    write_whole(picture, lambda partial: drawn.save(partial, "png"))
    by = "".join(f", features of {one.record.enc_type}" for one in entries.features)
    say(f"{shown(source)}: {len(entries)} images of {resolution} px, moments {entries.moments_shape}, "
        f"{entries.num_classes} classes{by}, all readable; see {shown(output)} (PSNR {psnr:.1f} dB)")
