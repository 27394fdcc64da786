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

    python -m models.checkpoint export CKPT FOLDER|OUT.safetensors [--weights ema|model] [--model SiT-XL/2]

writes the weights alone, to share: a folder as models/hub.py describes it, or a single file. Neither can hold code, and
generate.py takes both as checkpoints.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save as serialised

from models.card import read_scores
from models.hub import CONFIG, TRANSFORMER, decoder_of, digest_of, find, read_shared, shared, space_of
from models.mmdit import MMDiT, MMDiT_models, rename_released
from models.sit import SiT, SiT_models
from models.weights import build, is_state_dict, load_strictly, plain_weights, require_record, sizes_in
from runtime.arguments import Parser
from runtime.files import read_object, write_whole
from runtime.messages import UserError, notice, say, without_traceback
from runtime.run import CHECKPOINTS, Damaged, read_file
from runtime.stores import shown

Network = SiT | MMDiT
MODELS = SiT_models | MMDiT_models

RESUMED = {"model", "ema", "opt", "scaler", "args", "steps", "latent_space", "data"}          # needed to go on
# Names of the released REG program -> ours. Every other name is the same in REG, REPA and here.
RELEASED_NAMES = {"cls_projectors2.": "cls_embedder.", "wg_norm.": "cls_norm."}


def read(path: str | Path, mmap: bool = True) -> dict:
    """Read a checkpoint, or a file of `export`. `path` is a file or an experiment folder.

    With `mmap` tensors stay on disk until they are used: a sampler needs no memory for the optimiser state.
    Raises UserError if the file is missing or cannot be read now, and Damaged if it is no whole checkpoint.
    """
    path = find(path)
    state = read_shared(path) if path.suffix == ".safetensors" else dict(read_file(path, mmap))
    names = state.get("architecture")
    require_record(path, state, _network_of(names if isinstance(names, dict) else {}))
    if "architecture" in state and "context_dim" in state["architecture"] and "text" not in state:
        raise Damaged(f"{path}: does not describe its text encoder; use another file")
    return state


def has_captions(state: dict, model_name: str | None = None) -> bool:
    """Whether a checkpoint is of captions; `model_name` counts where it does not describe its architecture."""
    return "context_dim" in state["architecture"] if "architecture" in state else model_name in MMDiT_models


def _network_of(names: dict) -> type[Network]:
    """The class that has these constructor arguments."""
    return MMDiT if "context_dim" in names else SiT


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
    if not is_state_dict(state):
        if which not in state:
            found = shown(", ".join({"ema", "model"} & state.keys() or list(map(str, state))[:9]))
            raise UserError(f"--weights {which}: the checkpoint has {found}; name a file with ema or model, or the "
                            "weights alone")
        state = state[which]
        if not isinstance(state, dict) or not is_state_dict(state):
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


def load_weights(model: Network, path_or_dict: str | Path | dict, which: str = "ema", projectors: bool = True) -> None:
    """Load weights strictly: ours, released REG or released REPA; a file, its content, or a bare state dict.

    `which` chooses "ema" or "model" in a whole file. Projectors are dropped if the model has none; without `projectors`
    the model keeps its own, with a notice, if the file has none. A model on the meta device is moved to the CPU.
    Raises UserError naming the first wrong key and the likely cause.
    """
    weights = _weights(path_or_dict, which)
    if not projectors and len(model.projectors) and not any(name.startswith("projectors.") for name in weights):
        notice("the weights are without projectors, which start anew")
        weights |= {f"projectors.{name}": value for name, value in model.projectors.state_dict().items()}
    load_strictly(model, weights)


def architecture_of(state: dict, model_name: str | None, which: str = "ema") -> dict:
    """The constructor arguments of a checkpoint's network: stored, or (released files) read off the weights' shapes.

    A released file does not tell its number of heads: `model_name` ("SiT-XL/2") must. Raises UserError if they differ.
    """
    size = MODELS[model_name].keywords if model_name else {}
    if not size and "architecture" not in state:
        raise UserError("this checkpoint does not describe its architecture, like all released files: "
                        "add --model, e.g. SiT-XL/2")
    weights = _weights(state, which)
    found = sizes_in(weights)
    if model_name and _network_of(found) is not MODELS[model_name].func:
        raise UserError(f"--model {model_name}: the checkpoint is of {_network_of(found).__name__}; name the model it "
                        "was trained as")
    if any(found.get(key, state.get("architecture", size)[key]) != size[key] for key in size if key != "encoder_depth"):
        raise UserError(f"--model {model_name}: the checkpoint has width {found['hidden_size']}, depth "
                        f"{found['depth']}, patch {found['patch_size']}; name the model it was trained as")
    if "architecture" not in state:
        return size | found
    return dict(state["architecture"])


def build_for_sampling(state: dict, model_name: str | None = None, which: str = "ema") -> Network:
    """The model of a checkpoint with its weights, in evaluation mode, on the CPU, without projectors."""
    architecture = {**architecture_of(state, model_name, which), "z_dims": ()}
    return build(_network_of(architecture), architecture, _weights(state, which))


# ----------------------------------------------------------------------------------------------------- weights to share

def export(path: str | Path, out: str | Path, which: str = "ema", model_name: str | None = None,
           licence: str | None = None, diffusers: bool = False, vae: str | None = None) -> None:
    """Write one set of a checkpoint's weights, without projectors, to a folder with a model card, or to a single file
    whose metadata hold what sampling needs.

    `diffusers`: as the folder of a models.pipeline.REGPipeline, with `vae`, by default that of training. A folder with
    the same network is completed, and its card written again. Raises UserError as `read` does, and if `out` is anything
    else that exists.
    """
    out, single = Path(out), Path(out).suffix == ".safetensors"
    if single and (out.exists() or diffusers) or out.suffix in (".pt", ".pth", ".bin", ".ckpt") or out.is_file():
        raise UserError(f"{out}: {'exists' if out.exists() else 'wrong ending'}; name a folder or new .safetensors")
    path = find(path)
    state, digest = read(path), digest_of(path)
    model = build_for_sampling(state, model_name, which)
    names = ("latent_space", "steps", "classes", "text", "args", "data_name", "licence", "scores")
    data = Path(str(state.get("args", {}).get("data_dir") or "")).name                    # without its place
    model.record = {name: state[name] for name in names if name in state} | {"weights": which}
    experiment = path.parent.parent if path.parent.name == CHECKPOINTS else Path()        # as generate.py's folders
    scores, known = read_scores(experiment / "samples", digest, which), state.get("scores", [])
    scores += [row for row in known if row not in scores]
    told = {"data_name": data, "scores": scores, "licence": licence}
    model.record |= {name: value for name, value in told.items() if value}
    if single:
        about, weights = shared(model)
        data = serialised(weights, {"reg": json.dumps(about)})    # save_file's is readable for its owner
        return write_whole(out, lambda partial: partial.write_bytes(data))
    before = require_new(out, out / (TRANSFORMER if diffusers else "") / CONFIG, digest, which)
    model.record = {name: before[name] for name in ("licence",) if name in before} | model.record
    model.record["checkpoint_sha256"] = digest
    if diffusers:
        from models.pipeline import REGPipeline  # diffusers is slow to import

        model = REGPipeline.of(model, vae=vae or decoder_of(path, space_of(model.record)))
    model.save_pretrained(out)


def require_new(out: Path, config: Path, digest: str, which: str) -> dict:
    """The folder's `config`, or {}. Raises UserError if it is of another checkpoint than that with this SHA-256, or
    if the folder holds other files."""
    found = read_object(config)
    if (found.get("checkpoint_sha256"), found.get("weights")) == (digest, which):
        return found
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: holds another model, or other files; name another folder")
    return {}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m models.checkpoint", description="Weights to share.")
    commands = parser.add_subparsers(required=True, metavar="export")
    one = commands.add_parser("export", help="write one set of weights as safetensors, with a model card")
    one.add_argument("ckpt", metavar="CKPT", help="checkpoint file, or experiment folder (its newest)")
    one.add_argument("out", metavar="OUT", help="a folder, for the hub; or a single .safetensors file")
    one.add_argument("--diffusers", action="store_true", help="the folder of a diffusers pipeline, with the VAE")
    one.add_argument("--vae", metavar="VAE", help="of the pipeline: hub id or folder; None: as trained")
    one.add_argument("--licence", metavar="NAME", help="of the weights, for the card, as the hub spells it; None: not "
                     "stated")
    one.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last weights")
    one.add_argument("--model", choices=tuple(MODELS), default=None, metavar="NAME",
                     help="needed for released files")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.vae is not None and not args.diffusers:
        raise UserError(f"--vae {args.vae}: only a pipeline holds a VAE; add --diffusers, or leave it out")
    export(args.ckpt, args.out, args.weights, args.model, args.licence, args.diffusers, args.vae)
    say(f"wrote {args.out}" + f": {args.out}/README.md has the command that samples it" * Path(args.out).is_dir())


if __name__ == "__main__":
    main()
