"""`encode` images to VAE moments (mean and std of the posterior) or an encoder's features, by key; `stats-latents`."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataset import MOMENTS_EXTENSIONS, read_image, read_moments
from models.cached_features import FeaturesRecord, file_size, pack
from models.encoders import load_encoder, sha256_of_named
from models.vae import SHORTHANDS, load_codec, read_statistics
from preprocessing.captions import source_captions
from preprocessing.convert import source_labels, spread
from preprocessing.destination import Destination, described, digest, in_workers
from runtime import speed
from runtime.catalogue import key_of, keyed, list_keyed
from runtime.files import as_size, sha256, to_npy
from runtime.launch import blocks, join_processes
from runtime.messages import UserError, say
from runtime.npz import write_npz
from runtime.sources import open_source
from runtime.stores import IMAGE_EXTENSIONS, Store, open_store, read_metadata, shown, split_names

# Precision of the VAE's arithmetic. With the toy's VAE, the images' means differ from fp32's by 0.0003 (tf32) and 0.004
# (bf16) on average, and their stds by 0.00002 and 0.0004; storing them as float16 changes them by 0.0002 and 0.00001.
# bf16 moves the mean by a third of a std: less than the noise that training adds, but the same in every epoch.
PRECISIONS = ("fp32", "tf32", "bf16")


def npy_name(prefix: bytes, key: bytes) -> bytes:
    """The name of a key's file, as REPA has it: `00000/00000007` -> `00000/img-mean-std-00000007.npy`."""
    folder, slash, stem = key.rpartition(b"/")
    return folder + slash + prefix + stem + b".npy"


moments_name, features_name = partial(npy_name, b"img-mean-std-"), partial(npy_name, b"img")


class Moments:
    """Moments by a VAE, for `encode`: float32 or float16 (2C, H, W)."""

    kind, remedy, file_name = "moments", "use --dtype float32, or another VAE", staticmethod(moments_name)

    def __init__(self, vae: str, dtype: str, precision: str | None, compiled: bool | None, device: torch.device,
                 latent_stats: Path | None = None):
        """`precision` None is PyTorch's own: tf32 for a GPU's convolutions, else fp32. `compiled` None: bf16 on a GPU,
        where norms and activations cost more than convolutions. `latent_stats`: a file for `read_statistics`, or None.

        Raises UserError for tf32 on a CPU, and if only some processes can compile.
        """
        on_gpu = device.type == "cuda"
        if precision == "tf32" and not on_gpu:
            raise UserError("--precision tf32: needs a GPU; give fp32 or bf16")
        self.name, self.dtype, self.device = SHORTHANDS.get(vae, vae), dtype, device
        self.precision = precision or ("tf32" if on_gpu else "fp32")
        wanted = self.precision == "bf16" and on_gpu if compiled is None else compiled
        self.compiled = wanted and speed.compiler_works(device.type)
        speed.require_same_everywhere(self.compiled)
        self.latent_stats, self.statistics = latent_stats, latent_stats and read_statistics(latent_stats)
        self.settings = {"vae": self.name, "dtype": dtype, "precision": self.precision, "compiled": self.compiled,
                         "latent_stats": latent_stats and sha256(latent_stats)}

    def open(self, resolution: int, batch_size: int) -> int:
        """Load the VAE and return the bytes of one file. Raises UserError if it fails or R does not fit."""
        self.codec, self.batch_size = load_codec(self.name, self.device), batch_size
        if self.statistics:
            self.codec.use_statistics(self.statistics, str(self.latent_stats), self.settings["latent_stats"])
        space, side = self.codec.space, self.codec.side
        if resolution % space.downsampling or side not in (None, resolution):
            raise UserError(f"--vae {self.name}: cannot encode images of {resolution} px; expected "
                            f"{side or f'a multiple of {space.downsampling}'} px")
        if self.precision == "bf16":
            self.codec.in_bf16()
        if self.compiled:
            speed.choose_same_kernels()
            speed.compile_parts(self.codec.vae)
        self.record = {"vae": space.to_record()}
        side = resolution // space.downsampling
        return len(to_npy(np.zeros((2 * space.channels, side, side), self.dtype)))

    def compute(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, R, R) -> moments (B, 2C, H, W) on the device."""
        count = len(images)
        if self.compiled and count < self.batch_size:             # another size would be compiled anew
            images = torch.cat([images, images.new_zeros(self.batch_size - count, *images.shape[1:])])
        with speed.float32_arithmetic(tf32=self.precision == "tf32"):
            return self.codec.encode(images)[:count].to(getattr(torch, self.dtype))

    def arrays(self, moments: torch.Tensor) -> np.ndarray:
        """What is stored of each image."""
        return moments.cpu().numpy()                              # (B, 2C, H, W)


class Features:
    """Features by an encoder, for `encode`: class token and patch tokens as `FeaturesRecord.layout` describes."""

    kind, remedy, file_name = "features", "use --dtype int8, or another encoder", staticmethod(features_name)

    def __init__(self, enc_type: str, weights: str | None, dtype: str, device: torch.device):
        """Raises UserError if the named weights are missing."""
        self.name, self.weights, self.dtype, self.device = enc_type, weights, dtype, device
        self.weights_file = sha256_of_named(enc_type, weights)
        self.settings = {"enc_type": enc_type, "weights": self.weights_file, "dtype": dtype}

    def open(self, resolution: int, batch_size: int) -> int:
        """Load the encoder and return the bytes of one file. Raises UserError if it fails."""
        self.encoder = encoder = load_encoder(self.name, self.device, resolution, weights=self.weights)
        class_token, patches = self.compute(torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8))
        record = FeaturesRecord(enc_type=self.name, timm_name=encoder.timm_name, weights_file=self.weights_file,
                                resolution=resolution, grid=round(patches.shape[1] ** 0.5), width=encoder.embed_dim,
                                class_token=class_token is not None, dtype=self.dtype)
        self.record = {"features": record.to_record()}
        return file_size(record.layout())

    def compute(self, images: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """uint8 images (B, 3, R, R) -> class token (B, E) or None, patch tokens (B, N, E), in full float32."""
        with speed.full_precision(self.device):
            return self.encoder.tokens(images.to(self.device, non_blocking=True))

    def arrays(self, tokens: tuple[torch.Tensor | None, torch.Tensor]) -> np.ndarray:
        """What is stored of each image."""
        return pack(*tokens, self.dtype)                          # (B,)


def read_block(store: Store, names: np.ndarray, resolution: int, block: range) -> tuple[int, np.ndarray]:
    """The first index of a block and its images uint8 (B, 3, R, R).

    They stay a numpy array, which workers send by pipe: tensors need shared memory, of which containers have little.
    """
    return block.start, np.stack([read_image(store, name, resolution) for name in names[block.start:block.stop]])


def encode_batches(compute: Callable[[torch.Tensor], Any], batches: Iterable[tuple[int, np.ndarray]],
                   write: Callable[[int, Any], None], on_gpu: bool) -> Iterator[int]:
    """`compute` each batch (first index, images (B, 3, R, R)), `write` the index and the result, and yield B.

    A thread writes a batch while the next is read and computed; an error in `write` is raised here.
    """
    with ThreadPoolExecutor(1) as writer:
        writing = None                                            # the batch before
        for start, images in batches:
            images = torch.from_numpy(images)
            computed = compute(images.pin_memory() if on_gpu else images)  # other memory would be copied in step
            if writing is not None:
                writing.result()
            writing = writer.submit(write, start, computed)
            yield len(images)
        if writing is not None:
            writing.result()


def encode(source: str, dest: str, network: Moments | Features, batch_size: int, workers: int,
           max_images: int | None = None, **columns: str) -> None:
    """Encode images of `source` (see `open_source`), all RGB of one size, into `dest`, with any number of processes.

    Writes one npy file per image, and dataset.json with what made them; moments have the labels, captions and names of
    classes of the source, see `source_labels`. Batches are the same consecutive images however the work is divided or
    interrupted, because results may differ by float noise between batch sizes. Raises UserError as `convert` does.
    """
    store = open_source(source, **columns)
    names, others = split_names(store, IMAGE_EXTENSIONS)
    if not len(names):
        raise UserError(f"--source {shown(source)}: holds no images; expected those that `convert` writes")
    metadata = read_metadata(store)
    keys, names = keyed(store, names)
    texts = source_captions(store, names, others, metadata, None, names, key_of)
    values, classes, _ = source_labels(store, names, metadata, key_of, captioned=texts is not None)
    chosen = spread(values, len(names), max_images)
    keys, names = keys[chosen], names[chosen]
    resolution = read_image(store, names[0]).shape[-1]
    state = join_processes()
    # Not the images' path: the data folder may move meanwhile.
    settings = {"command": "encode", "source_contents": digest(names, metadata), "images": len(names),
                "image_column": getattr(store, "columns", {}).get("image"), **network.settings}
    outputs = np.array([network.file_name(key) for key in keys.tolist()], dtype=bytes)
    labels = described(outputs, None if values is None else values[chosen], classes,
                       texts and [texts[name] for name in names.tolist()]) if network.kind == "moments" else {}
    destination = Destination(dest, outputs, MOMENTS_EXTENSIONS, settings, source)
    if destination.is_finished(state.is_main_process):
        return
    size = network.open(resolution, batch_size)
    free = destination.require_room(size)
    say(f"{shown(dest)}: needs {as_size(len(names) * size)} in all, {size:,} bytes per image; {as_size(free)} are free")
    if state.is_main_process:
        destination.begin()
    state.wait_for_everyone()

    def write(start: int, computed: Any) -> None:
        for i, array in enumerate(network.arrays(computed), start):
            parts = [array[name] for name in array.dtype.names or ()] or [array]
            if not all(np.isfinite(part).all() for part in parts):
                raise UserError(f"{store.where(names[i])}: its {network.kind} are not finite in {network.dtype}; "
                                f"{network.remedy}")
            destination.write(outputs[i], to_npy(array))

    missing = destination.is_missing()
    mine = blocks(len(names), batch_size)[state.process_index::state.num_processes]
    left = [block for block in mine if missing[block.start:block.stop].any()]
    total, todo = (sum(map(len, some)) for some in (mine, left))
    batches = in_workers(partial(read_block, store, names, resolution), left, workers)
    with tqdm(total=total, initial=total - todo, desc="encode", unit="image", disable=not state.is_main_process) as bar:
        for count in encode_batches(network.compute, batches, write, on_gpu=state.device.type == "cuda"):
            bar.update(count)
    state.wait_for_everyone()
    if state.is_main_process:
        destination.finish({**labels, **network.record})
        say(f"{shown(dest)}: {network.kind} of {len(names)} images by {network.name}, {network.dtype}")


def _sums(store: Store, names: np.ndarray, shape: tuple[int, int, int], chunk: range) -> np.ndarray:
    """Sums over images and positions of E[x] and E[x^2] under the posteriors: (2, C) float64."""
    found = np.zeros((2, shape[0] // 2))
    for name in names[chunk.start:chunk.stop]:
        mean, std = np.split(read_moments(store, name, shape).astype(np.float64), 2)      # (C, H, W) each
        found += mean.sum((1, 2)), (mean**2 + std**2).sum((1, 2))
    return found


def stats_latents(source: str, output: str, workers: int) -> None:
    """Write `output`, an npz with mean and std (C,) float64 of latents drawn from the moments in `source`.

    Raises UserError for unreadable moments, and if a std is not above 0.
    """
    path, store = Path(output), open_store(source)
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise UserError(f"--output {shown(output)}: not the name of an .npz in a folder that exists")
    _, names = list_keyed(store, MOMENTS_EXTENSIONS)
    if not len(names):
        raise UserError(f"--source {shown(source)}: holds no moments; expected those that `encode` writes")
    shape = read_moments(store, names[0]).shape
    chunks = in_workers(partial(_sums, store, names, shape), blocks(len(names), 64), workers)
    mean, square = sum(chunks) / (len(names) * shape[1] * shape[2])               # (C,) each
    std = np.sqrt(np.maximum(square - mean**2, 0))
    if not (np.isfinite(mean).all() and std.min() > 0):
        raise UserError(f"--source {shown(source)}: a channel is constant or not finite; see what `check` finds")
    write_npz(path, (), 0, (0, 0), mean=mean, std=std)
    say(f"{shown(output)}: std {std.min():.4g} to {std.max():.4g} in {len(std)} channels, over {len(names)} images")
