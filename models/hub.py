"""Networks as folders and repositories of the Hugging Face hub: config.json, model.safetensors and a model card.

config.json is what models/checkpoint.py reads from a checkpoint for sampling; the states of the empty caption are among
the weights. What others wrote runs no code, and is checked before a network is built.
"""

import hashlib
import inspect
import json
import re
from pathlib import Path

import torch
from huggingface_hub import HfApi, PyTorchModelHubMixin, constants, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised

from models.card import model_card, public_record
from models.interpolant import auto_shift
from models.vae import LatentSpace
from models.weights import build, plain_weights, require_record
from runtime import run
from runtime.files import read_object, sha256, write_json, write_whole
from runtime.messages import UserError
from runtime.run import Damaged

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
TRANSFORMER, VAE = "transformer", "vae"                          # folders of the diffusers form
NULL = "text.null"                   # the null states' name among the weights
HUB_ID = r"(?![.~])[\w.-]+/[\w.-]+(?<!\.pt)(?<!\.pth)(?<!\.safetensors)"


class HubNetwork(PyTorchModelHubMixin):
    """`save_pretrained`, `push_to_hub` and `from_pretrained` for a network with `config`, its constructor arguments.

    Attribute `record`: what a checkpoint says beside architecture and weights, in the form of models/checkpoint.py, if
    the network was read from one: latent space, steps, settings, classes, text encoder; also data_name, licence and the
    rows of scores in its card.
    """

    record: dict | None = None
    device = property(lambda self: self.pos_embed.device)         # where a pipeline of diffusers asks
    dtype = property(lambda self: self.pos_embed.dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **where) -> "HubNetwork":
        """The network in a folder or in a repository of the hub, in evaluation mode, on the CPU.

        `where`: the keywords of `find`, and no others. Raises UserError if there is none, or if it is not this kind of
        network, whole and with weights of its sizes.
        """
        path = find(pretrained_model_name_or_path, **where)
        state = read_shared(path)
        require_record(path, state, cls)
        which = next((which for which in ("ema", "model") if which in state), None)
        if which is None or "architecture" not in state:
            raise Damaged(f"{path}: {CONFIG} describes no {cls.__name__}; use another folder")
        model = build(cls, state.pop("architecture"), plain_weights(state.pop(which)))
        model.record = {**state, "weights": which}
        return model

    def save_pretrained(self, save_directory: str | Path, *, model_card_kwargs: dict | None = None, config=None):
        """Write config.json, model.safetensors and the card. The other arguments are for `push_to_hub`."""
        save_folder(self, Path(save_directory))
        write_card(self, Path(save_directory), **(model_card_kwargs or {}))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **settings) -> str:
        """Upload what `save_pretrained` writes, with the repository's id in the card. `settings`: of the mixin."""
        name = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = {"model_card_kwargs": {"name": name}}
        return PyTorchModelHubMixin.push_to_hub(self, name, private=private, token=token, **settings | card)


def shared(model: HubNetwork) -> tuple[dict, dict[str, torch.Tensor]]:
    """What describes a network, for JSON, and its weights with the null states."""
    about = {"architecture": model.config, **public_record(model.record or {})}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if "text" in about:
        weights[NULL] = about["text"].pop("null").contiguous()
    return about, weights


def save_folder(model: HubNetwork, folder: Path) -> None:
    """Write config.json, then the weights, without which a folder is refused; older weights and their card are removed
    first. Raises UserError as `write_whole`."""
    about, weights = shared(model)
    data = serialised(weights, {"format": "pt"})
    for name in (WEIGHTS, CARD):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / CONFIG, about)
    write_whole(folder / WEIGHTS, lambda partial: partial.write_bytes(data))


def write_card(model: HubNetwork, folder: Path, name: str | None = None, diffusers: bool = False) -> None:
    """Write the model card of a folder, or of a pipeline's, under the folder's name if None."""
    card = model_card(model.config, model.record or {}, name or folder.resolve().name, diffusers)
    write_whole(folder / CARD, lambda partial: partial.write_text(card, encoding="utf-8"))


def read_shared(path: Path) -> dict:
    """A safetensors file as a checkpoint with one set of weights; unchecked. Its description is in its metadata
    (the single-file form) or in config.json beside it.

    Raises UserError if it cannot be read now, and Damaged if it is of another form.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, config = file.metadata() or {}, path.with_name(CONFIG)
            inside = "reg" in metadata or not config.is_file()
            about = json.loads(metadata["reg"] if inside else config.read_text(encoding="utf-8"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if NULL in weights:
            about["text"]["null"] = weights.pop(NULL)
        which = about.pop("weights", "ema")
        return {**{name: value for name, value in about.items() if value is not None}, which: weights}
    except (OSError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read now ({error!r}); give the same command again later") from error
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}: cannot be read ({type(error).__name__}), expected a file of `python -m "
                      "models.checkpoint export`; if it is a checkpoint of training, export it first") from error


def find(name: str | Path, **where) -> Path:
    """A checkpoint's file: of a folder with config.json, or of a repository of the hub, its model.safetensors; else as
    runtime.run.find. A pipeline's folder counts as that of its transformer.

    `where`: keywords of huggingface_hub.snapshot_download: revision, cache_dir, token, force_download,
    local_files_only, ... Raises UserError if there is none, and TypeError for other keywords.
    """
    place = Path(name)
    inspect.signature(snapshot_download).bind(str(name), **where)  # TypeError for what it does not know
    if not place.exists() and re.fullmatch(HUB_ID, str(name)):
        try:
            place = Path(snapshot_download(str(name), **where, allow_patterns=[f"*{CONFIG}", f"*{WEIGHTS}"]))
        except (OSError, ValueError) as error:                    # offline, no such repository, no right to read it
            where = "in its cache (offline)" if constants.HF_HUB_OFFLINE else f"({type(error).__name__})"
            raise UserError(f"{name}: no such checkpoint here or on the hub {where}; name a checkpoint, an experiment, "
                            "an exported folder or a hub id") from error
    for folder in (place, place / TRANSFORMER):
        if (folder / CONFIG).is_file():
            if not (folder / WEIGHTS).is_file():
                raise UserError(f"{folder}: has {CONFIG}, but no {WEIGHTS}; download or export it again")
            return folder / WEIGHTS
    return run.find(place)


def space_of(record: dict) -> LatentSpace:
    """The latent space of a checkpoint's content or a network's `record`: where they are silent, Stable Diffusion's."""
    return LatentSpace.from_record(record["latent_space"]) if "latent_space" in record else LatentSpace()


def shift_of(where: str | Path, record: dict, asked: float | str | None = None) -> float:
    """The time shift `asked` for, else that of training. Raises UserError if `record`, see `space_of`, has none."""
    trained, space = record.get("args") or {}, space_of(record)
    shift = asked or trained.get("time_shift", 1.0)
    if shift == "auto" and type(trained.get("resolution")) is int:
        return auto_shift(space.channels, trained["resolution"] // space.downsampling)
    if not isinstance(shift, int | float) or not 1e-3 <= shift <= 1e3:
        raise UserError(f"{where}: its time shift is {shift!r}, expected 0.001 to 1000; generate.py takes --time-shift")
    return shift


def decoder_of(path: Path, space: LatentSpace) -> str:
    """The VAE for a checkpoint's file unless the user names another: a pipeline's own, if that of training was a
    folder."""
    own = path.absolute().parent.parent / VAE
    return str(own) if path.parent.name == TRANSFORMER and "/" not in space.vae and own.is_dir() else space.decoder


def digest_of(path: Path) -> str:
    """The SHA-256 of a checkpoint's file; of a network's folder that of its two files, but for scores and licence."""
    digest, about = sha256(path), read_object(path.with_name(CONFIG)) if path.name == WEIGHTS else {}
    about = {name: about[name] for name in about if name not in ("scores", "licence")}
    return hashlib.sha256(f"{digest} {json.dumps(about, sort_keys=True)}".encode()).hexdigest() if about else digest


def name_of(path: Path) -> str:
    """What people call a checkpoint's file: its stem; of a file WEIGHTS its folder's name, or the hub's."""
    if path.name != WEIGHTS:
        return path.stem
    place = path.absolute().parent
    place = place.parent if place.name == TRANSFORMER else place
    hub = place.parent.parent.name                                # models--USER--NAME/snapshots/REVISION
    return hub.removeprefix("models--") if hub.startswith("models--") else place.name
