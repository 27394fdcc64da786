"""`check`: read a whole prepared data set, and draw its images above their decoded latents."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset import IMAGES, MOMENTS, MOMENTS_EXTENSIONS, LatentDataset, find_store, read_image, read_moments
from models.cached_features import Features, feature_stores
from models.vae import Codec, LatentSpace, load_codec, read_space
from preprocessing.destination import in_workers
from runtime.catalogue import Catalogue, digest_of, write_catalogue
from runtime.files import write_whole
from runtime.launch import blocks
from runtime.messages import UserError, notice, say
from runtime.pictures import grid_of
from runtime.stores import IMAGE_EXTENSIONS, shown

CHUNK = 64   # entries that a worker reads at a time
SHOWN = 8    # entries in the picture
LARGEST = 1e5  # a VAE's moments are below: diffusers limits stds to exp(10), and means are of the order of 1 / scale


def _unpaired(catalogues: list[Catalogue]) -> tuple[dict[bytes, str], np.ndarray]:
    """A sentence for each key of images or moments (the first two) that some catalogue lacks, and the keys of all.

    The first of these is of a pair that can be read, which opening the data set needs.
    """
    images, moments, *_ = catalogues
    keys = np.union1d(images.keys, moments.keys)
    faults = {key: f"{shown(key)}: no file in {shown(one.store.path)}; encode again, or remove its partners"
              for one in catalogues for key in np.setdiff1d(keys, one.keys).tolist()}
    paired = keys[~np.isin(keys, np.array(list(faults), dtype=bytes))]
    while len(paired):
        image, moment = (one.names[one.keys == paired[0]][0] for one in (images, moments))
        try:
            read_image(images.store, image)
            read_moments(moments.store, moment)
            break
        except UserError as error:
            faults[bytes(paired[0])], paired = str(error), paired[1:]
    return faults, paired


def _replaced(catalogue: Catalogue, keys: set[bytes]) -> dict[bytes, str]:
    """A sentence for each file of `keys` that is not the one whose digest `convert` or `encode` recorded; by key."""
    recorded, found = catalogue.metadata.get("sample"), {}
    for key, name in zip(catalogue.keys.tolist(), catalogue.names.tolist(), strict=True):
        known = recorded.get(os.fsdecode(name)) if isinstance(recorded, dict) and key in keys else None
        if known is not None and known != digest_of(catalogue.store, name):
            found[key] = (f"{catalogue.store.where(name)}: replaced since it was written, and perhaps others with it; "
                          "convert or encode again")
    return found


def _faults(entries: LatentDataset, chunk: range) -> tuple[int, dict[bytes, str]]:
    """The number of entries in a chunk, and one sentence for each faulty one, by key."""
    found = {bytes(entries.keys[i]): _fault(entries, i) for i in chunk}
    return len(chunk), {key: fault for key, fault in found.items() if fault}


def _fault(entries: LatentDataset, i: int) -> str | None:
    try:
        _, moments, _, *features = entries[i]
    except UserError as error:
        return str(error)
    mean, std = moments.chunk(2)
    if not (mean.abs().max() <= LARGEST and std.min() >= 0 and std.max() <= LARGEST):         # false for nan
        return f"{entries.key(i)}: its moments are not finite, or too large, or a std is negative; encode it again"
    if not all(torch.isfinite(part).all() for one in features for part in one.values()):
        return f"{entries.key(i)}: its features are not finite; remove them and encode again"
    return None


def side_by_side(entries: LatentDataset, space: LatentSpace, codec: Codec) -> tuple[Image.Image, float]:
    """A picture of a few images above their decoded latents and a caption, and the mean PSNR between them in dB."""
    chosen = np.linspace(0, len(entries) - 1, min(SHOWN, len(entries))).round().astype(int)
    images = torch.stack([entries[i][0] for i in chosen])                         # (B, 3, R, R)
    moments = torch.stack([entries[i][1] for i in chosen])                        # (B, 2C, H, W)
    no_noise = torch.zeros(len(moments), space.channels, *moments.shape[2:])
    decoded = codec.decode(space.latents(moments, no_noise)).cpu()                # (B, 3, R, R)
    error = (images.double() - decoded.double()).square().mean(dim=(1, 2, 3))     # (B,)
    psnr = 10 * torch.log10(255**2 / error.clamp(min=1e-3)).mean().item()
    captions = entries.captions and [entries.captions[i].partition("\n")[0] for i in chosen]
    return grid_of(torch.cat([images, decoded], dim=2), len(chosen), captions), psnr


def _refuse(faults: dict[bytes, str], count: int, source: str) -> None:
    """Name all faults. Raises UserError if there are any among `count` entries."""
    for key in sorted(faults):
        notice(faults[key])
    if faults:
        raise UserError(f"{shown(source)}: {len(faults)} of {count} entries are faulty, named above; remove their "
                        "files, then convert or encode again")


def check(source: str, output: str, workers: int, vae: str | None = None) -> None:
    """Read all images, moments and features below `source`, write their catalogues anew, and the picture `output`.

    Faulty files and those without a partner are named on stderr, one to a line. Raises UserError if there are any, and
    if labels or settings do not fit together.
    """
    picture = Path(output)
    if picture.suffix != ".png" or not picture.parent.is_dir():
        raise UserError(f"--output {shown(output)}: not the name of a .png in a folder that exists")
    features = feature_stores(source)
    found = [(find_store(Path(source), kind, what).path, extensions) for kind, what, extensions in (
        (IMAGES, "images", IMAGE_EXTENSIONS), (MOMENTS, "moments", MOMENTS_EXTENSIONS))]
    found += [(path, MOMENTS_EXTENSIONS) for path in features]
    catalogues = [write_catalogue(*one) for one in found]         # first: files may have been added or removed by hand
    faults, good = _unpaired(catalogues)
    if faults and not len(good):
        _refuse(faults, len(faults), source)
    entries = LatentDataset(source, features=[Features(path) for path in features], only=good,
                            captions=any(one.captions is not None for one in catalogues[:2]))
    space, resolution = read_space(entries.vae_record, entries.moments_shape, entries.resolution, shown(source))
    codec = load_codec(vae or space.decoder, "cuda" if torch.cuda.is_available() else "cpu")
    codec.use_space(space, "the data set")

    count = len(entries) + len(faults)
    with tqdm(total=len(entries), desc="check", unit="image") as bar:
        for done, found in in_workers(partial(_faults, entries), blocks(len(entries), CHUNK), workers):
            faults |= found
            bar.update(done)
    readable = set(entries.keys.tolist()) - faults.keys()
    for one in catalogues:
        faults |= _replaced(one, readable)
    _refuse(faults, count, source)

    drawn, psnr = side_by_side(entries, space, codec)
    write_whole(picture, lambda partial: drawn.save(partial, "png"))
    by = "".join(f", features of {one.record.enc_type}" for one in entries.features)
    kind = f"{entries.num_classes} classes" if entries.captions is None else "captions"
    say(f"{shown(source)}: {len(entries)} images of {resolution} px, moments {entries.moments_shape}, "
        f"{kind}{by}, all readable; see {shown(output)} (PSNR {psnr:.1f} dB)")
