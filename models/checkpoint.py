"""What the bytes of a checkpoint mean: its content, the weights in it (ours or of the released programs), and export.

A checkpoint has REPA's keys model, ema, opt, args (a plain dict), steps, and ours:
    scaler         state of the fp16 loss scaler, or None
    architecture   the constructor arguments of models.sit.SiT or models.mmdit.MMDiT
    latent_space   the meaning of the latents (models.vae.LatentSpace)
    data           fingerprint of the data set's keys and labels
    encoders       what identifies the encoders (models.encoders.encoder_ids); older checkpoints lack it
    classes        the classes that have images, if not all have
    text           of captions: the text encoder's name and sha256, its length L and width W, and the null states (L, W)
    processes      number of processes that trained it

    python -m models.checkpoint export CKPT OUT.safetensors [--weights ema|model] [--model SiT-XL/2]

writes the weights alone, to share: the file cannot hold code, and generate.py takes it as a checkpoint.
"""

import argparse
import datetime
import inspect
import json
import math
import re
from pathlib import Path, PurePath

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised

from models.mmdit import MMDiT, MMDiT_models, rename_released
from models.sit import SiT, SiT_models
from models.vae import LatentSpace
from runtime.arguments import Parser
from runtime.catalogue import MAX_CLASSES
from runtime.files import write_whole
from runtime.messages import UserError, notice, without_traceback
from runtime.run import Damaged, find, read_file
from runtime.stores import shown

Network = SiT | MMDiT
MODELS = SiT_models | MMDiT_models

# Types of the entries, where a file has them. `draws` counted batches in older checkpoints, whose `steps` left skipped
# ones out.
KINDS = {"args": dict | argparse.Namespace, "steps": int, "draws": int, "processes": int, "architecture": dict,
         "data": str, "encoders": list, "classes": list, "text": dict, "model": dict, "ema": dict, "opt": dict,
         "scaler": dict | None}
LARGEST = MAX_CLASSES                # of any number in an architecture
RESUMED = {"model", "ema", "opt", "scaler", "args", "steps", "latent_space", "data"}          # needed to go on
PRIVATE = ("data_dir", "output_dir", "ref_batch", "inception_weights", "encoder_weights", "text_encoder",
           "init_weights", "resume")
NULL = "text.null"                   # the null states' name among exported weights
# Names of the released REG program -> ours. Every other name is the same in REG, REPA and here.
RELEASED_NAMES = {"cls_projectors2.": "cls_embedder.", "wg_norm.": "cls_norm."}


def read(path: str | Path, mmap: bool = True) -> dict:
    """Read a checkpoint, or a file of `export`. `path` is a file or an experiment folder.

    With `mmap` tensors stay on disk until they are used: a sampler needs no memory for the optimiser state.
    Raises UserError if the file is missing or cannot be read now, and Damaged if it is no whole checkpoint.
    """
    path = find(path)
    state = dict(_read_export(path) if path.suffix == ".safetensors" else read_file(path, mmap))
    for name, kind in KINDS.items():
        value = state.get(name)
        if name in state and (not isinstance(value, kind) or kind is int and not 0 <= value < 2**63):
            expected = "a number of at least 0" if kind is int else getattr(kind, "__name__", kind)
            raise Damaged(f"{path}: {name} is of type {type(value).__name__}, expected {expected}; use another file")
    for name, kind in (("encoders", str), ("classes", int)):
        if not all(type(one) is kind and (kind is str or 0 <= one < MAX_CLASSES) for one in state.get(name, ())):
            raise Damaged(f"{path}: {name} holds other things than {kind.__name__}; use another file")
    if "args" in state:
        args = state["args"] if isinstance(state["args"], dict) else vars(state["args"])
        state["args"] = {str(name): _as_json(value) for name, value in args.items()}
    if "architecture" in state:
        _require_architecture(path, state["architecture"])
    if "latent_space" in state:
        LatentSpace.from_record(state["latent_space"], str(path))
    if "text" in state:
        _require_text(path, state["text"])
    if "architecture" in state and state["architecture"].get("context_dim") != state.get("text", {}).get("width"):
        raise Damaged(f"{path}: its network and its text encoder do not fit; use another file")
    return state


def _as_json(value: object) -> str | int | float | bool | None:
    """A setting as JSON has it; of a type that no setting has, its name."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str | int | float | None):
        return value
    written = isinstance(value, PurePath | torch.device | torch.dtype | datetime.date | datetime.timedelta)
    return str(value) if written else type(value).__name__


def _require_text(path: Path, found: dict) -> None:
    """Raise Damaged unless this names a text encoder and holds the states of its empty caption."""
    null, shape = found.get("null"), (found.get("length"), found.get("width"))
    named = all(isinstance(found.get(name), str) for name in ("encoder", "sha256"))
    if not (named and isinstance(null, torch.Tensor) and null.ndim == 2 and null.shape == shape):
        raise Damaged(f"{path}: does not describe its text encoder; use another file")
    plain_weights({"null": null})


def has_captions(state: dict, model_name: str | None = None) -> bool:
    """Whether a checkpoint is of captions; `model_name` counts where it does not describe its architecture."""
    return "context_dim" in state["architecture"] if "architecture" in state else model_name in MMDiT_models


def _network_of(names: dict) -> type[Network]:
    """The class that has these constructor arguments."""
    return MMDiT if "context_dim" in names else SiT


def _require_architecture(path: Path, found: dict) -> None:
    """Raise Damaged unless these are a network's constructor arguments, each of its type and a possible number."""

    def fits(value: object, kind: type) -> bool:
        if kind == tuple[int, ...]:
            return isinstance(value, list | tuple) and all(fits(one, int) for one in value)
        if kind is bool or value is None:
            return isinstance(value, kind)
        return type(value) is int and 0 < value <= LARGEST or kind is type(value) is float and 0 <= value <= LARGEST

    network = _network_of(found)
    kinds = {name: one.annotation for name, one in inspect.signature(network).parameters.items()}
    wrong = [name for name, kind in kinds.items() if name not in found or not fits(found[name], kind)]
    if wrong or found.keys() != kinds.keys():
        raise Damaged(f"{path}: the architecture is not described by the arguments of {network.__name__} ("
                      f"{', '.join(wrong) or 'it has others'}); use another file")


def content(model: Network, ema: Network, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None,
            about: dict, step: int) -> dict:
    """What a checkpoint of `step` holds; `about` gives args, latent_space, data, processes, encoders, classes, text."""
    return {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(), "steps": step,
            "scaler": None if scaler is None else scaler.state_dict(), "architecture": model.config, **about}


def restore(path: Path, state: dict, model: Network, ema: Network, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler | None) -> int:
    """Put the content of a checkpoint into the networks, the optimiser and the scaler; return its step.

    The optimiser's settings (learning rate, ...) stay as they are. Raises UserError if something does not fit.
    """
    load_weights(model, state, "model")
    load_weights(ema, state, "ema")
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    try:
        optimizer.load_state_dict(state["opt"])
        for parameter, moments in optimizer.state.items():
            if any(moment.layout != torch.strided or moment.is_meta or moment.shape not in ((), parameter.shape)
                   for moment in moments.values()):
                raise ValueError("of other shapes")
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{path}: holds the state of another optimiser ({error}); start from its weights with "
                        f"--init-weights {path} and another --exp-name") from error
    for group in optimizer.param_groups:
        group.update(settings)
    if state.get("draws", state["steps"]) != state["steps"]:
        notice(f"{path}: {state['steps']} updates of {state['draws']} batches, as some were skipped; going "
               f"on at step {state['draws']}")
    return state.get("draws", state["steps"])


# ------------------------------------------------------------------------------------------------------ loading weights

def _weights(source: str | Path | dict, which: str) -> dict[str, torch.Tensor]:
    """The `plain_weights` of a file, a whole checkpoint or a bare state dict, under our names."""
    state = source if isinstance(source, dict) else read(source)
    if not _is_state_dict(state):
        if which not in state:
            found = shown(", ".join({"ema", "model"} & state.keys() or list(map(str, state))[:9]))
            raise UserError(f"--weights {which}: the checkpoint has {found}; name a file with ema or model, or the "
                            "weights alone")
        state = state[which]
        if not isinstance(state, dict) or not _is_state_dict(state):
            raise UserError(f"the checkpoint's {which!r} is no state dict: name a checkpoint of "
                            "REG, REPA or this program")
    weights = {}
    for name, tensor in rename_released(plain_weights(state)).items():
        if name.startswith("decoder_blocks."):
            raise UserError(f"{shown(name)}: the checkpoint is of an early REPA, which kept the blocks behind "
                            "--encoder-depth apart: rename decoder_blocks.i to blocks.(i + that depth)")
        for released, ours in RELEASED_NAMES.items():
            if name.startswith(released):
                name = ours + name.removeprefix(released)
        weights[name] = tensor
    return weights


def _is_state_dict(state: dict) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


def plain_weights(state: dict) -> dict[str, torch.Tensor]:
    """A state dict without DataParallel's prefix `module.` and torch.compile's `_orig_mod.`, wherever they are.

    Raises UserError for what is no dense tensor, for tensors that claim more numbers than are stored, and if two
    entries have one name.
    """
    plain, claimed, stored = {}, 0, {}
    for name, tensor in state.items():
        if (not _is_state_dict({name: tensor}) or tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta
                or tensor.is_quantized or tensor.is_complex() or not tensor.numel()):
            raise UserError(f"{shown(str(name))} is no plain tensor (dense, real, not empty): name another file")
        storage = tensor.untyped_storage()
        claimed, stored[storage.data_ptr()] = claimed + tensor.numel() * tensor.element_size(), storage.nbytes()
        plain[re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", name)] = tensor
    if len(plain) < len(state):
        raise UserError("two of the weights have one name without the prefixes module. and _orig_mod.: name another "
                        "file")
    if claimed > sum(stored.values()):
        raise UserError("the weights claim more numbers than are stored: name another file")
    broken = next((name for name, tensor in plain.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{shown(broken)} holds numbers that are not finite: name another file or checkpoint")
    return plain


def load_weights(model: Network, path_or_dict: str | Path | dict, which: str = "ema") -> None:
    """Load weights strictly: ours, released REG or released REPA; a file, its content, or a bare state dict.

    `which` chooses "ema" or "model" in a whole file. Projectors are dropped if the model has none. A model on the meta
    device is moved to the CPU.
    Raises UserError naming the first wrong key and the likely cause.
    """
    weights = _weights(path_or_dict, which)
    if not len(model.projectors):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("projectors.")}
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        here, there = expected.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            found = "absent" if there is None else f"of shape {tuple(there.shape)}"
            wanted = "no such parameter" if here is None else f"shape {tuple(here.shape)}"
            doubled = name.startswith("final_layer.linear.") and there is not None and len(there) == 2 * len(here)
            raise UserError(f"{shown(name)} is {found} in the checkpoint, the model has {wanted}: "
                            f"{LEARN_SIGMA if doubled else _likely_cause(name)}")
    if model.pos_embed.is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(weights)


LEARN_SIGMA = ("it predicts a variance, too (learn_sigma of SiT's and DiT's own releases, whose time runs otherwise); "
               "use a checkpoint of REG, REPA or this program")
CAUSES = {
    ("cls_embedder", "cls_norm", "final_layer.linear_cls"):
        "only one of them has a class-token slot (REG) of this width; choose the same --method and --enc-type",
    ("pos_embed",): "the resolution, the patch size or the class-token slot differs; choose the "
                    "same --model and --method",
    ("y_embedder",): "the number of classes differs, or one of them has captions; choose the same --num-classes and "
                     "--model",
    ("context_embedder",): "the text encoder's width differs, or one of them has class labels; choose the same "
                           "--text-encoder and --model",
    ("projectors",): "the encoders, --projector-dim or --proj-coeff differ; choose those of the checkpoint",
    ("x_embedder", "final_layer"):
        "the patch size, width or number of latent channels differs; choose the same --model and VAE",
}


def _likely_cause(name: str) -> str:
    """The most common mistake when this parameter does not fit."""
    for prefixes, cause in CAUSES.items():
        if name.startswith(prefixes):
            return cause
    if "_norm" in name:
        return "only one of them has --qk-norm"
    return "the model's size differs; choose the same --model"


def architecture_of(state: dict, model_name: str | None, which: str = "ema") -> dict:
    """The constructor arguments of a checkpoint's network: stored, or (released files) read off the weights' shapes.

    A released file does not tell its number of heads: `model_name` ("SiT-XL/2") must. Raises UserError if they differ,
    or if the shapes contradict what is stored, so that a model is never larger than its file.
    """
    size = MODELS[model_name].keywords if model_name else {}
    if not size and "architecture" not in state:
        raise UserError("this checkpoint does not describe its architecture, like all released files: "
                        "add --model, e.g. SiT-XL/2")
    weights = _weights(state, which)
    try:
        _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        _, tokens, width = weights["pos_embed"].shape
        if "context_embedder.weight" in weights:
            own = {"context_dim": weights["context_embedder.weight"].shape[1]}
        else:
            own = {"num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1}
        slot = weights["cls_embedder.weight"].shape[1] if "cls_embedder.weight" in weights else None
        side = math.isqrt(tokens - (slot is not None))
    except KeyError as error:
        raise UserError(f"the checkpoint lacks {error.args[0]}: it is no SiT or MMDiT of REG, REPA or this program"
                        ) from None
    except (ValueError, IndexError, TypeError):
        raise UserError("the checkpoint's embeddings have other dimensions than SiT's: name another file") from None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    found = {"hidden_size": width, "depth": depth, "patch_size": patch, "in_channels": channels, **own,
             "input_size": side * patch, "cls_token_dim": slot,
             "qk_norm": any(f"blocks.0.attn.{name}.weight" in weights for name in ("q_norm", "norm_q"))}
    if model_name and _network_of(found) is not MODELS[model_name].func:
        raise UserError(f"--model {model_name}: the checkpoint is of {_network_of(found).__name__}; name the model it "
                        "was trained as")
    if any(found.get(key, state.get("architecture", size)[key]) != size[key] for key in size if key != "encoder_depth"):
        raise UserError(f"--model {model_name}: the checkpoint has width {width}, depth {depth}, patch {patch}; name "
                        "the model it was trained as")
    if "architecture" not in state:
        return size | found
    wrong = [key for key in found if found[key] != state["architecture"][key]]
    if wrong:
        raise UserError(f"the checkpoint's architecture says {wrong[0]} {state['architecture'][wrong[0]]}, its weights "
                        f"{found[wrong[0]]}: use another file")
    return dict(state["architecture"])


def build_for_sampling(state: dict, model_name: str | None = None, which: str = "ema") -> Network:
    """The model of a checkpoint with its weights, in evaluation mode, on the CPU, without projectors."""
    architecture = {**architecture_of(state, model_name, which), "z_dims": ()}
    try:
        with torch.device("meta"):                                # nothing is allocated until the shapes agree
            model = _network_of(architecture)(**architecture)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError("the checkpoint's architecture cannot be built "
                        f"({error or architecture}): use another file") from error
    load_weights(model, state, which)
    return model.eval()


# ----------------------------------------------------------------------------------------------------- weights to share

def export(path: str | Path, out: str | Path, which: str = "ema", model_name: str | None = None) -> None:
    """Write one set of a checkpoint's weights, without projectors, as safetensors; generate.py reads the file.

    The file's metadata hold what sampling needs: architecture, latent space, path. Raises UserError as `read` does, and
    if `out` exists or does not end in .safetensors.
    """
    out = Path(out)
    if out.suffix != ".safetensors" or out.exists():
        raise UserError(f"{out}: {'exists already' if out.exists() else 'wrong ending'}; name a new .safetensors file")
    state = read(path)
    model = build_for_sampling(state, model_name, which)
    args = {name: value for name, value in state.get("args", {}).items() if name not in PRIVATE}
    about = {"architecture": {**model.config}, "latent_space": state.get("latent_space"), "steps": state.get("steps"),
             "weights": which, "args": args or None, "classes": state.get("classes")}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if "text" in state:
        about["text"] = {name: value for name, value in state["text"].items() if name != "null"}
        if Path(about["text"]["encoder"]).is_absolute():          # a folder of this machine
            about["text"]["encoder"] = Path(about["text"]["encoder"]).name
        weights[NULL] = state["text"]["null"].contiguous()
    data = serialised(weights, {"reg": json.dumps(about, default=str)})
    write_whole(out, lambda partial: partial.write_bytes(data))   # save_file would make it readable for its owner alone


def _read_export(path: Path) -> dict:
    """A file of `export` as a checkpoint with that one set of weights."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["reg"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if NULL in weights:
            about["text"]["null"] = weights.pop(NULL)
        return {about.pop("weights"): weights, **{name: value for name, value in about.items() if value is not None}}
    except (OSError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read now ({error!r}); give the same command again later") from error
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}: cannot be read ({type(error).__name__}); expected a file of `python -m "
                      "models.checkpoint export`") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m models.checkpoint", description="Weights to share.")
    commands = parser.add_subparsers(required=True, metavar="export")
    one = commands.add_parser("export", help="write one set of weights as safetensors")
    one.add_argument("ckpt", metavar="CKPT", help="checkpoint file, or experiment folder (its newest)")
    one.add_argument("out", metavar="OUT", help="the .safetensors file")
    one.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last weights")
    one.add_argument("--model", choices=tuple(MODELS), default=None, metavar="NAME",
                     help="needed for released files")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    export(args.ckpt, args.out, args.weights, args.model)
    print(f"wrote {args.out}: python generate.py --ckpt {args.out}")


if __name__ == "__main__":
    main()
