"""What a run is on disk: save, find the newest whole one, resume, and load weights, ours or those of the released programs.

OUTPUT_DIR/EXP/args.json                  the settings, for people
OUTPUT_DIR/EXP/checkpoints/0400000.pt     REPA's keys model, ema, opt, args (a plain dict), steps; and ours:
    draws          global batches taken, from which the data position and all randomness follow
    scaler         state of the fp16 loss scaler, or None
    architecture   the constructor arguments of models.sit.SiT
    latent_space   what latents mean (models.vae.LatentSpace)
    data           fingerprint of the data set's keys and labels
    processes      how many trained it
    log            what has been summed up for the next log line

    python -m models.checkpoint export CKPT OUT.safetensors [--weights ema|model] [--model SiT-XL/2]

writes the weights alone, to share: no code can hide in the file, and generate.py takes it as a checkpoint.
"""

import argparse
import inspect
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised

from models.sit import SiT, SiT_models
from runtime.files import write_whole
from runtime.messages import UserError, without_traceback
from runtime.run import Damaged, find, read_file

KINDS = {"args": dict, "steps": int, "draws": int, "architecture": dict, "latent_space": dict, "data": str, "log": dict}  # of what is there
PRIVATE = ("data_dir", "output_dir", "ref_batch", "inception_weights", "encoder_weights", "init_weights", "resume")  # paths of a machine
# Names of the released REG program -> ours; every other name is the same in REG, REPA and here.
RELEASED_NAMES = {"cls_projectors2.": "cls_embedder.", "wg_norm.": "cls_norm."}


def capture(*, model: SiT, ema: SiT, optimizer, scaler, args: dict, step: int, draws: int, latent_space: dict, data: str,
            processes: int, log: dict) -> dict:
    """A checkpoint's content, on the CPU and by itself: training may go on while it is written."""
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict(), "args": dict(args), "steps": step,
             "draws": draws, "scaler": None if scaler is None else scaler.state_dict(), "architecture": model.config,
             "latent_space": latent_space, "data": data, "processes": processes, "log": log}
    return _copied(state)


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def read(path: str | Path, mmap: bool = True) -> dict:
    """A checkpoint or a file of `export`; raises as `runtime.run.read_file`."""
    path = find(path)
    if path.suffix == ".safetensors":
        return _read_export(path)
    state = read_file(path, mmap)
    _require_kinds(state, path)
    return state


def _require_kinds(state: dict, path: Path) -> None:
    for name, kind in KINDS.items():
        if name in state and not isinstance(state[name], kind):
            raise Damaged(f"{path} holds {name} as {type(state[name]).__name__}, expected {kind.__name__}: use another file")


# ------------------------------------------------------------------------------------------------------------ loading weights

def _weights(source: str | Path | dict, which: str) -> dict[str, torch.Tensor]:
    """The state dict in a file, a whole checkpoint or a bare state dict, under our names."""
    state = source if isinstance(source, dict) else read(source)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        if which not in state and {"ema", "model"} & state.keys():
            raise UserError(f"the checkpoint has no {which!r} weights but {', '.join({'ema', 'model'} & state.keys())}: "
                            "change --weights, or name another file")
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
    architecture = {**architecture_of(state, model_name), "z_dims": ()}
    try:
        model = SiT(**architecture)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"no model can be built from the checkpoint's architecture ({error or architecture}): use another file") from error
    load_weights(model, state, which)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ weights to share

def export(path: str | Path, out: str | Path, which: str = "ema", model_name: str | None = None) -> None:
    """Write one set of a checkpoint's weights, without projectors, as safetensors that `read` and generate.py take as a checkpoint.

    What sampling needs to know (architecture, latent space, path) is in the file's metadata. Raises UserError as `read` does, and
    where `out` is no .safetensors file or is there already.
    """
    out = Path(out)
    if out.suffix != ".safetensors" or out.exists():
        raise UserError(f"{out} {'is there already' if out.exists() else 'does not end in .safetensors'}: name a new .safetensors file")
    state = read(path)
    model = build_for_sampling(state, model_name, which)
    args = {name: value for name, value in state.get("args", {}).items() if name not in PRIVATE}
    about = {"architecture": {**model.config}, "latent_space": state.get("latent_space"), "steps": state.get("steps"), "weights": which,
             "args": args or None}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    data = serialised(weights, {"reg": json.dumps(about, default=str)})
    write_whole(out, lambda partial: partial.write_bytes(data))   # safetensors' own file would be readable for its owner alone


def _read_export(path: Path) -> dict:
    """A file of `export` as a checkpoint with that one set of weights."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["reg"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        state = {about.pop("weights"): weights, **{name: value for name, value in about.items() if value is not None}}
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{path} cannot be read as exported weights ({type(error).__name__}): expected a file that "
                      "`python -m models.checkpoint export` wrote") from error
    _require_kinds(state, path)
    return state


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.checkpoint", description="Weights to share.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="export")
    one = commands.add_parser("export", help="write one set of weights as safetensors", allow_abbrev=False)
    one.add_argument("ckpt", metavar="CKPT", help="checkpoint file, or experiment folder: its newest")
    one.add_argument("out", metavar="OUT", help="the .safetensors file")
    one.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last weights (default: ema)")
    one.add_argument("--model", choices=tuple(SiT_models), default=None, metavar="NAME", help="for released files, which do not say it")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    export(args.ckpt, args.out, args.weights, args.model)
    print(f"wrote {args.out}: python generate.py --ckpt {args.out}")


if __name__ == "__main__":
    main()
