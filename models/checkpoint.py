"""What the bytes of a checkpoint mean: its content, the weights in it (ours or of the released programs), and export.

A checkpoint has REPA's keys model, ema, opt, args (a plain dict), steps, and ours:
    scaler         state of the fp16 loss scaler, or None
    architecture   the constructor arguments of models.sit.SiT
    latent_space   the meaning of the latents (models.vae.LatentSpace)
    data           fingerprint of the data set's keys and labels
    classes        the classes that have images, if not all have
    processes      number of processes that trained it

    python -m models.checkpoint export CKPT OUT.safetensors [--weights ema|model] [--model SiT-XL/2]

writes the weights alone, to share: the file cannot hold code, and generate.py takes it as a checkpoint.
"""

import argparse
import inspect
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised

from models.sit import SiT, SiT_models
from runtime.arguments import Parser
from runtime.files import write_whole
from runtime.messages import UserError, notice, without_traceback
from runtime.run import Damaged, find, read_file

# Types of the entries, where a file has them. `draws` counted batches in older checkpoints, whose `steps` left skipped
# ones out.
KINDS = {"args": dict, "steps": int, "draws": int, "architecture": dict, "latent_space": dict, "data": str,
         "classes": list}
RESUMED = {"model", "ema", "opt", "scaler", "args", "steps", "latent_space", "data"}          # needed to go on
PRIVATE = ("data_dir", "output_dir", "ref_batch", "inception_weights", "encoder_weights", "init_weights", "resume")
# Names of the released REG program -> ours. Every other name is the same in REG, REPA and here.
RELEASED_NAMES = {"cls_projectors2.": "cls_embedder.", "wg_norm.": "cls_norm."}


def read(path: str | Path, mmap: bool = True) -> dict:
    """Read a checkpoint, or a file of `export`. `path` is a file or an experiment folder.

    With `mmap` tensors stay on disk until they are used: a sampler needs no memory for the optimiser state.
    Raises UserError if the file is missing or cannot be read now, and Damaged if it is no whole checkpoint.
    """
    path = find(path)
    state = _read_export(path) if path.suffix == ".safetensors" else read_file(path, mmap)
    for name, kind in KINDS.items():
        if name in state and not isinstance(state[name], kind):
            raise Damaged(f"{path}: {name} is a {type(state[name]).__name__}, expected "
                          f"{kind.__name__}; use another file")
    return state


def content(model: SiT, ema: SiT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, about: dict,
            step: int) -> dict:
    """What a checkpoint of `step` holds; `about` gives args, latent_space, data, processes."""
    return {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(), "steps": step,
            "scaler": None if scaler is None else scaler.state_dict(), "architecture": model.config, **about}


def restore(path: Path, state: dict, model: SiT, ema: SiT, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler | None) -> int:
    """Put the content of a checkpoint into the networks, the optimiser and the scaler; return its step.

    The optimiser's settings (learning rate, ...) stay as they are. Raises UserError if something does not fit.
    """
    load_weights(model, state, "model")
    load_weights(ema, state, "ema")
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    try:
        optimizer.load_state_dict(state["opt"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds the state of another optimiser ({error}); start from its weights with "
                        f"--init-weights {path} and another --exp-name") from error
    for group in optimizer.param_groups:
        group.update(settings)
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    if state.get("draws", state["steps"]) != state["steps"]:
        notice(f"{path}: {state['steps']} updates of {state['draws']} batches, as some were skipped; going "
               f"on at step {state['draws']}")
    return state.get("draws", state["steps"])


# ------------------------------------------------------------------------------------------------------ loading weights

def _weights(source: str | Path | dict, which: str) -> dict[str, torch.Tensor]:
    """The state dict in a file, a whole checkpoint or a bare state dict, under our names."""
    state = source if isinstance(source, dict) else read(source)
    if not _is_state_dict(state):
        if which not in state:
            found = ", ".join(map(str, {"ema", "model"} & state.keys() or state))
            raise UserError(f"--weights {which}: the checkpoint has {found}; change --weights, or name another file")
        state = state[which]
        if not isinstance(state, dict) or not _is_state_dict(state):
            raise UserError(f"the checkpoint's {which!r} is no state dict: name a checkpoint of "
                            "REG, REPA or this program")
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        for released, ours in RELEASED_NAMES.items():
            if name.startswith(released):
                name = ours + name.removeprefix(released)
        renamed[name] = tensor
    return renamed


def _is_state_dict(state: dict) -> bool:
    return all(isinstance(value, torch.Tensor) for value in state.values())


def load_weights(model: SiT, path_or_dict: str | Path | dict, which: str = "ema") -> None:
    """Load weights strictly: ours, released REG or released REPA; a file, its content, or a bare state dict.

    `which` chooses "ema" or "model" in a whole file. Projectors are dropped if the model has none.
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
            raise UserError(f"{name} is {found} in the checkpoint, the model has {wanted}: {_likely_cause(name)}")
    model.load_state_dict(weights)


CAUSES = {
    ("cls_embedder", "cls_norm", "final_layer.linear_cls"):
        "only one of them has a class-token slot (REG) of this width; choose the same --method and --enc-type",
    ("pos_embed",): "the resolution, the patch size or the class-token slot differs; choose the "
                    "same --model and --method",
    ("y_embedder",): "the number of classes differs; set --num-classes to the checkpoint's",
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


def architecture_of(state: dict, model_name: str | None) -> dict:
    """The SiT constructor arguments of a checkpoint: stored by us, or read off the weights' shapes (released files).

    A released file does not tell its number of heads: `model_name` ("SiT-XL/2") must. Raises UserError if they differ.
    """
    if "architecture" in state:
        stored = state["architecture"]
        if stored.keys() != inspect.signature(SiT).parameters.keys():
            raise UserError("the checkpoint's architecture is not described by the arguments of SiT: use another file")
        size = SiT_models[model_name].keywords if model_name else stored
        if any(stored[key] != size[key] for key in ("depth", "hidden_size", "num_heads", "patch_size")):
            raise UserError(f"--model {model_name}: the checkpoint describes another architecture; leave --model out")
        return dict(stored)
    if model_name is None:
        raise UserError("this checkpoint does not describe its architecture, like all released files: "
                        "add --model, e.g. SiT-XL/2")
    weights = _weights(state, "ema")
    size = SiT_models[model_name].keywords
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    except KeyError as error:
        raise UserError(f"the checkpoint lacks {error.args[0]}: it is no SiT of REG, REPA or this program") from None
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    if (width, depth, patch) != (size["hidden_size"], size["depth"], size["patch_size"]):
        raise UserError(f"--model {model_name}: the checkpoint has width {width}, depth {depth}, patch {patch}; name "
                        "the model it was trained as")
    slot = weights.get("cls_embedder.weight")
    side = int((tokens - (slot is not None)) ** 0.5)
    return dict(size, input_size=side * patch, in_channels=channels, num_classes=classes,
                qk_norm="blocks.0.attn.q_norm.weight" in weights, cls_token_dim=None if slot is None else slot.shape[1])


def build_for_sampling(state: dict, model_name: str | None = None, which: str = "ema") -> SiT:
    """The model of a checkpoint with its weights, in evaluation mode, on the CPU, without projectors."""
    architecture = {**architecture_of(state, model_name), "z_dims": ()}
    try:
        model = SiT(**architecture)
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
    data = serialised(weights, {"reg": json.dumps(about, default=str)})
    write_whole(out, lambda partial: partial.write_bytes(data))   # save_file would make it readable for its owner alone


def _read_export(path: Path) -> dict:
    """A file of `export` as a checkpoint with that one set of weights."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["reg"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return {about.pop("weights"): weights, **{name: value for name, value in about.items() if value is not None}}
    except OSError as error:
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
    one.add_argument("--model", choices=tuple(SiT_models), default=None, metavar="NAME",
                     help="needed for released files")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    export(args.ckpt, args.out, args.weights, args.model)
    print(f"wrote {args.out}: python generate.py --ckpt {args.out}")


if __name__ == "__main__":
    main()
