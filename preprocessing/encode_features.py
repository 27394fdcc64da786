"""`encode --enc-type`: images -> an encoder's features under the same keys, so that training need not run it."""

from pathlib import Path

import numpy as np
import torch

from dataset import read_image
from models.cached_features import (
    DTYPES,
    FeaturesRecord,
    disk_cost,
    features_folder,
    file_size,
    on_disk,
    pack,
)
from models.encoders import load_encoder, sha256_of_named, sha256_of_parameters
from preprocessing.encode import encode_missing
from preprocessing.work import Destination, digest
from runtime.catalogue import list_keyed
from runtime.files import as_size as gigabytes
from runtime.files import to_npy
from runtime.launch import join_processes
from runtime.messages import UserError
from runtime.speed import full_precision
from runtime.stores import IMAGE_EXTENSIONS, open_store, shown


def features_name(key: bytes) -> bytes:
    """The name of a key's features: `00000/00000007` -> `00000/img00000007.npy`."""
    folder, slash, stem = key.rpartition(b"/")
    return folder + slash + b"img" + stem + b".npy"


def describe(enc_type: str, weights: str | None, resolution: int, dtype: str) -> FeaturesRecord:
    """What the features will be, before any weight is fetched: all but `weights`, the sha256 of the parameters."""
    with torch.device("meta"):
        encoder = load_encoder(enc_type, "meta", resolution, pretrained=False)
        class_token, patches = encoder.tokens(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8))  # (1, E), (1, N, E)
    return FeaturesRecord(enc_type=enc_type, timm_name=encoder.timm_name, weights_file=sha256_of_named(enc_type, weights),
                          resolution=resolution, grid=round(patches.shape[1] ** 0.5), width=encoder.embed_dim,
                          class_token=class_token is not None, dtype=dtype)


def encode_features(source: str, dest: str, enc_type: str, weights: str | None, batch_size: int, dtype: str, workers: int) -> None:
    """Encode the images of `source` (folder or zip, all RGB of one size) into `dest` (folder or .zip), with one process or many.

    Writes `00000/img00000000.npy`, ... as `FeaturesRecord.layout` says, and dataset.json with the record. The forward pass is float32,
    without TF32 and autocast, and batches are the same however the work is divided or interrupted, as in `encode`. What it takes of the
    disk is said first. Raises UserError as `encode` does, when the encoder does not load, and when the disk is too small.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: expected at least 1")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} came with --enc-type, whose features are stored as {' or '.join(DTYPES)}: give one of these")
    if "," in enc_type:
        raise UserError(f"--enc-type {enc_type} names several encoders: encode the features of one at a time, each into its own --dest")
    if Path(dest).name.removesuffix(".zip") != features_folder(enc_type):
        raise UserError(f"--dest {shown(dest)}: training looks for the features of {enc_type} in DATA/{features_folder(enc_type)} or a zip "
                        "of that name: call it so")
    store = open_store(source)
    keys, names = list_keyed(store, IMAGE_EXTENSIONS)
    if not len(keys):
        raise UserError(f"the source {shown(source)} holds no images: expected what `convert` writes")
    resolution = read_image(store, names[0]).shape[-1]
    record = describe(enc_type, weights, resolution, dtype)
    settings = {"command": "encode", "source_contents": digest(store, names), "images": len(names), "enc_type": enc_type,
                "weights": record.weights_file, "dtype": dtype}
    destination = Destination(dest, settings, source)
    outputs = np.array([features_name(key) for key in keys.tolist()], dtype=bytes)
    destination.require_names(outputs)
    state = join_processes()
    if destination.is_finished(outputs):
        if state.is_main_process:
            print(f"{shown(dest)} is finished already ({len(names)} images): nothing to do")
        return
    free = destination.require_room(outputs, on_disk(file_size(record.layout())))
    if state.is_main_process:
        twice = ", and as much again while the zip is written" * destination.zipped
        print(f"{shown(dest)}: the {dtype} features of {len(names):,} images by {enc_type} take {gigabytes(disk_cost(len(names), record))} "
              f"({file_size(record.layout()):,} bytes each){twice}; {gigabytes(free)} are free", flush=True)
    encoder = load_encoder(enc_type, state.device, resolution, weights=weights)

    def compute(images: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        with full_precision(state.device):
            return encoder.tokens(images.to(state.device, non_blocking=True))     # (B, E), (B, N, E)

    def write(start: int, tokens: tuple[torch.Tensor | None, torch.Tensor]) -> None:
        stored = pack(*tokens, dtype)                                             # (B,)
        for i, one in enumerate(stored, start):
            if not all(np.isfinite(one[part]).all() for part in stored.dtype.names):
                raise UserError(f"the features of {store.where(names[i])} are not finite in {dtype}: "
                                "use --dtype int8, or another encoder")
            destination.write(outputs[i], to_npy(one))

    encode_missing(store, names, outputs, destination, batch_size, resolution, workers, compute, write)
    if state.is_main_process:
        described = {**record.to_record(), "weights": sha256_of_parameters(encoder.model)}
        destination.finish(outputs, {"features": described})
        print(f"{shown(dest)}: features of {len(names)} images by {enc_type}, {dtype}")
