"""What a run is on disk: save, find the newest, read, and load weights, ours or those of the released REG and REPA programs.

OUTPUT_DIR/EXP/args.json                  the settings, for people
OUTPUT_DIR/EXP/checkpoints/0400000.pt     REPA's keys model, ema, opt, args (a plain dict), steps; and ours:
    draws          global batches taken, from which the data position and all randomness follow
    scaler         state of the fp16 loss scaler, or None
    architecture   the constructor arguments of models.sit.SiT
    latent_space   what latents mean (models.vae.LatentSpace)
    data           fingerprint of the data set's keys and labels
"""

import argparse
import inspect
import json
import re
import zipfile
from pathlib import Path

import torch

from models.errors import UserError
from models.files import write_whole
from models.sit import SiT, SiT_models

CHECKPOINTS = "checkpoints"
# Names of the released REG program -> ours; every other name is the same in REG, REPA and here.
RELEASED_NAMES = {"cls_projectors2.": "cls_embedder.", "wg_norm.": "cls_norm."}


def checkpoint_path(experiment: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, in REPA's spelling."""
    return experiment / CHECKPOINTS / f"{step:07d}.pt"


def saved(experiment: Path) -> dict[int, Path]:
    """The checkpoints of `experiment` by their steps, in order."""
    found = {int(p.stem): p for p in (experiment / CHECKPOINTS).glob("*.pt") if re.fullmatch(r"\d{7,}", p.stem)}
    return dict(sorted(found.items()))


def newest(experiment: Path) -> Path | None:
    """The checkpoint of `experiment` with the highest step, or None."""
    return next(reversed(saved(experiment).values()), None)


def find(path: str | Path) -> Path:
    """A checkpoint file as named, or the newest one of an experiment folder; raises UserError when there is none."""
    path = Path(path)
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise UserError(f"no checkpoint below {path / CHECKPOINTS}: name a .pt file or an experiment folder that holds one")
        return found
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: name a .pt file or an experiment folder")
    return path


def save(experiment: Path, *, model: SiT, ema: SiT, optimizer, scaler, args: dict, step: int, draws: int, latent_space: dict,
         data: str) -> Path:
    """Write the checkpoint of `step` whole, and return its path."""
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(), "args": args, "steps": step,
             "draws": draws, "scaler": None if scaler is None else scaler.state_dict(),
             "architecture": model.config, "latent_space": latent_space, "data": data}
    path = checkpoint_path(experiment, step)
    write_whole(path, lambda partial: torch.save(state, partial))
    return path


def save_args(experiment: Path, args: dict) -> None:
    """Write the settings beside the checkpoints, for people."""
    write_whole(experiment / "args.json", lambda partial: partial.write_text(json.dumps(args, indent=2) + "\n"))


def read(path: str | Path, mmap: bool = True) -> dict:
    """Read a checkpoint without running anything in it (`weights_only`); an argparse.Namespace in it becomes a dict.

    With `mmap` tensors stay on disk until they are used, so a sampler does not pay for the optimiser state; without it they are the
    caller's own, whatever becomes of the file.
    Raises UserError when the file is missing or not a checkpoint.
    """
    path = find(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:                    # a file that is no checkpoint can make the unpickler raise anything
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or holds more than weights; "
                        "use another file, or delete it") from error
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint: name a .pt file of REG, REPA or this program")
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    return state


def _weights(source: str | Path | dict, which: str) -> dict[str, torch.Tensor]:
    """The state dict in a file, a whole checkpoint or a bare state dict, under our names."""
    state = source if isinstance(source, dict) else read(source)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        if which not in state:
            raise UserError(f"the checkpoint has no {which!r} weights but {', '.join(map(str, state))}: "
                            "name a checkpoint of REG, REPA or this program")
        state = state[which]
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"the checkpoint's {which!r} is no state dict: name a checkpoint of REG, REPA or this program")
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        for released, ours in RELEASED_NAMES.items():
            if name.startswith(released):
                name = ours + name.removeprefix(released)
        renamed[name] = tensor
    return renamed


def load_weights(model: SiT, path_or_dict: str | Path | dict, which: str = "ema") -> None:
    """Load weights strictly: ours, released REG or released REPA; a whole file, its content, or a bare state dict.

    `which` chooses "ema" or "model" in a whole file. Projectors are dropped when the model has none, since sampling needs none.
    Raises UserError naming the first wrong key and the likely cause.
    """
    weights = _weights(path_or_dict, which)
    if not len(model.projectors):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("projectors.")}
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        here, there = expected.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            came = "absent" if there is None else f"of shape {tuple(there.shape)}"
            wanted = "no such parameter" if here is None else f"shape {tuple(here.shape)}"
            raise UserError(f"{name} is {came} in the checkpoint where the model has {wanted}: {_likely_cause(name)}")
    model.load_state_dict(weights)


def _likely_cause(name: str) -> str:
    """What a user most often got wrong when this parameter does not fit."""
    causes = {
        ("cls_embedder", "cls_norm", "final_layer.linear_cls"): "one has a class-token slot (REG) of this width, the other not; "
                                                                "choose the same --method and --enc-type",
        ("pos_embed",): "the resolution, the patch size or the class-token slot differs; use the model the checkpoint was trained as",
        ("y_embedder",): "the number of classes differs; set --num-classes as the checkpoint has it",
        ("projectors",): "the encoders, --projector-dim or --proj-coeff differ; choose those of the checkpoint",
        ("x_embedder", "final_layer"): "the patch size, width or number of latent channels differs; choose the same --model and VAE",
    }
    for prefixes, cause in causes.items():
        if name.startswith(prefixes):
            return cause
    if "_norm" in name:
        return "one has --qk-norm, the other not"
    return "the model's size differs; choose the same --model"


def architecture_of(state: dict, model_name: str | None) -> dict:
    """The SiT constructor arguments of a checkpoint: as stored by us, or, for released files, read off the weights' shapes.

    A released file does not tell its number of heads: `model_name` ("SiT-XL/2") must, and is refused where it contradicts the weights.
    """
    if "architecture" in state:
        expected = inspect.signature(SiT).parameters.keys()
        if not isinstance(state["architecture"], dict) or state["architecture"].keys() != expected:
            raise UserError(f"the checkpoint's architecture is not described by {', '.join(expected)}: use another file")
        if model_name is not None:
            stored, size = state["architecture"], SiT_models[model_name].keywords
            if any(stored[key] != size[key] for key in ("depth", "hidden_size", "num_heads", "patch_size")):
                raise UserError(f"--model {model_name} contradicts the checkpoint, which describes another architecture: leave --model out")
        return dict(state["architecture"])
    if model_name is None:
        raise UserError("this checkpoint does not describe its architecture, as released REG and REPA files: add --model, e.g. SiT-XL/2")
    weights = _weights(state, "ema")
    size = SiT_models[model_name].keywords
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    except KeyError as error:
        raise UserError(f"the checkpoint lacks {error.args[0]}: it is not a SiT of REG, REPA or this program") from None
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    if (width, depth, patch) != (size["hidden_size"], size["depth"], size["patch_size"]):
        raise UserError(f"--model {model_name} has width {size['hidden_size']}, depth {size['depth']}, patch {size['patch_size']}, but the "
                        f"checkpoint has {width}, {depth}, {patch}: name the model that it was trained as")
    slot = weights.get("cls_embedder.weight")
    side = int((tokens - (slot is not None)) ** 0.5)
    return dict(size, input_size=side * patch, in_channels=channels, num_classes=classes, qk_norm="blocks.0.attn.q_norm.weight" in weights,
                cls_token_dim=None if slot is None else slot.shape[1])


def build_for_sampling(state: dict, model_name: str | None = None, which: str = "ema") -> SiT:
    """The model of a checkpoint with its weights, in evaluation mode, on the CPU, without projectors."""
    model = SiT(**{**architecture_of(state, model_name), "z_dims": ()})
    load_weights(model, state, which)
    return model.eval()
