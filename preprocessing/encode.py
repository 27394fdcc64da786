"""`encode`: images -> VAE moments (mean and std of the posterior) under the same keys."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataset import read_image
from models.vae import SHORTHANDS, Codec, load_codec
from preprocessing.work import Destination, digest, load
from runtime.catalogue import list_keyed, read_labels
from runtime.files import to_npy
from runtime.launch import join_processes
from runtime.messages import UserError
from runtime.speed import (
    choose_same_kernels,
    compile_parts,
    compiler_works,
    float32_arithmetic,
    require_same_everywhere,
)
from runtime.stores import IMAGE_EXTENSIONS, Store, open_store, shown

# How the VAE computes. With the toy's VAE, images' means differ from fp32's by 0.0003 (tf32) and 0.004 (bf16) on average, and their stds
# by 0.00002 and 0.0004; to store them as float16 moves them by 0.0002 and 0.00001. A third of a std, which bf16 moves the mean by, is
# less than the noise that training adds to it, but the same in each epoch.
PRECISIONS = ("fp32", "tf32", "bf16")


def moments_name(key: bytes) -> bytes:
    """The name of a key's moments, REPA's: `00000/00000007` -> `00000/img-mean-std-00000007.npy`."""
    folder, slash, stem = key.rpartition(b"/")
    return folder + slash + b"img-mean-std-" + stem + b".npy"


class Batches(torch.utils.data.Dataset):
    """Item k is the k-th listed batch: its first index, and uint8 images (B, 3, R, R).

    They stay numpy arrays, which travel by pipe: tensors would need shared memory, of which containers have little.
    """

    def __init__(self, store: Store, names: np.ndarray, starts: list[int], batch_size: int, resolution: int):
        self.store, self.names, self.starts, self.batch_size, self.resolution = store, names, starts, batch_size, resolution

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, k: int) -> tuple[int, np.ndarray]:
        start = self.starts[k]
        names = self.names[start:start + self.batch_size]
        return start, np.stack([read_image(self.store, name, self.resolution) for name in names])


def set_precision(codec: Codec, precision: str) -> None:
    """Make the codec's network ready for one of PRECISIONS. Raises UserError for tf32 without a GPU."""
    if precision == "tf32" and codec.vae.device.type != "cuda":
        raise UserError("--precision is tf32, which is a GPU's, and this is a CPU: give fp32 or bf16")
    if precision == "bf16":
        codec.in_bf16()


def moments_of(codec: Codec, batch_size: int, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """`codec.encode`, or with `compiled` a function that gives it batches of one size, since it would be compiled anew for another."""
    if not compiled:
        return codec.encode
    choose_same_kernels()
    compile_parts(codec.vae)

    def of_whole(images: torch.Tensor) -> torch.Tensor:
        lacking = batch_size - len(images)                        # the last batch is filled up
        whole = torch.cat([images, images.new_zeros(lacking, *images.shape[1:])]) if lacking else images
        return codec.encode(whole)[:len(images)]

    return of_whole


def encode_batches(compute: Callable[[torch.Tensor], Any], batches: Iterable[tuple[int, np.ndarray]],
                   write: Callable[[int, Any], None], on_gpu: bool) -> Iterator[int]:
    """`compute` batches of uint8 images (B, 3, R, R), each with its first index, and `write` that index and what was computed.

    Yields each B. While a GPU computes one batch, a thread writes the one before and the next is read; what `write` raises is raised here.
    """
    with ThreadPoolExecutor(1) as writer:
        writing = None                                            # of the batch before
        for start, images in batches:
            images = torch.from_numpy(images)
            computed = compute(images.pin_memory() if on_gpu else images)  # from other memory the copy would wait for the batch before
            if writing is not None:
                writing.result()
            writing = writer.submit(write, start, computed)
            yield len(images)
        if writing is not None:
            writing.result()


def encode_missing(store: Store, names: np.ndarray, outputs: np.ndarray, destination: Destination, batch_size: int, resolution: int,
                   workers: int, compute: Callable[[torch.Tensor], Any], write: Callable[[int, Any], None]) -> None:
    """Begin or go on: every batch of `names` (n,) of which one of `outputs` (n,) is missing, dealt to the processes that were joined."""
    state = join_processes()
    destination.begin()
    state.wait_for_everyone()
    missing = destination.is_missing(outputs)
    mine = range(state.process_index * batch_size, len(names), state.num_processes * batch_size)
    starts = [start for start in mine if missing[start:start + batch_size].any()]
    total, left = (sum(len(names[start:start + batch_size]) for start in some) for some in (mine, starts))
    batches = load(Batches(store, names, starts, batch_size, resolution), workers)
    with tqdm(total=total, initial=total - left, desc="encode", unit="image", disable=not state.is_main_process) as bar:
        for count in encode_batches(compute, batches, write, on_gpu=state.device.type == "cuda"):
            bar.update(count)
    state.wait_for_everyone()


def encode(source: str, dest: str, model_url: str, batch_size: int, dtype: str, workers: int,
           precision: str | None = None, compile: bool | None = None) -> None:
    """Encode the images of `source` (folder or zip, all RGB of one size) into `dest` (folder or .zip), with one process or many.

    Writes `00000/img-mean-std-00000000.npy`, ... of shape (2C, H, W) and `dtype`, and dataset.json with the labels of the source and
    the latent space. Batches are the same consecutive images however the work is divided or interrupted, since an image's moments
    may differ by float noise between batch sizes. `precision` is one of PRECISIONS, None what PyTorch does by itself; `compile` fuses
    norms and activations, None on a GPU in bf16, where they cost more than the convolutions. Both are settings that may not change.
    Raises UserError as `convert` does, and when the VAE does not load.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: expected at least 1")
    store = open_store(source)
    keys, names = list_keyed(store, IMAGE_EXTENSIONS)
    if not len(keys):
        raise UserError(f"the source {shown(source)} holds no images: expected what `convert` writes")
    labels = read_labels(store, keys)
    resolution = read_image(store, names[0]).shape[-1]
    state = join_processes()
    usual = "tf32" if state.device.type == "cuda" else "fp32"     # of convolutions, which is nearly all there is
    precision = precision or usual
    compiled = (precision == "bf16" and state.device.type == "cuda" if compile is None else compile) and compiler_works(state.device.type)
    require_same_everywhere(compiled)
    # Not where the images are: a data folder may move while it is being encoded.
    settings = {"command": "encode", "source_contents": digest(store, names), "images": len(names),
                "vae": SHORTHANDS.get(model_url, model_url), "dtype": dtype, "precision": precision,
                "compiled": compiled}
    destination = Destination(dest, settings, source, unsaid={"precision": usual, "compiled": False})
    outputs = np.array([moments_name(key) for key in keys.tolist()], dtype=bytes)
    destination.require_names(outputs)
    if destination.is_finished(outputs):
        if state.is_main_process:
            print(f"{shown(dest)} is finished already ({len(names)} images): nothing to do")
        return
    codec = load_codec(model_url, state.device)
    if resolution % codec.space.downsampling:
        raise UserError(f"images of {resolution} px cannot be encoded by {codec.space.vae}: "
                        f"expected a multiple of {codec.space.downsampling} px")
    set_precision(codec, precision)
    compute = moments_of(codec, batch_size, compiled)

    def write(start: int, moments: torch.Tensor) -> None:
        for i, one in enumerate(moments.cpu().numpy(), start):                    # (2C, H, W)
            if not np.isfinite(one).all():
                raise UserError(f"the moments of {store.where(names[i])} are not finite in {dtype}: "
                                "use --dtype float32, or another VAE")
            destination.write(outputs[i], to_npy(one))

    with float32_arithmetic(tf32=precision == "tf32"):
        encode_missing(store, names, outputs, destination, batch_size, resolution, workers,
                       lambda images: compute(images).to(getattr(torch, dtype)), write)
    if state.is_main_process:
        listed = None if labels is None else [[os.fsdecode(name), int(label)] for name, label in zip(outputs, labels, strict=True)]
        destination.finish(outputs, {"labels": listed, "vae": codec.space.to_record()})
        print(f"{shown(dest)}: moments of {len(names)} images by {codec.space.vae}, {dtype}")
