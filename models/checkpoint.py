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
import contextlib
import fcntl
import inspect
import itertools
import json
import re
import threading
import zipfile
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised

from models.errors import UserError, notice, say, without_traceback
from models.files import make_folder, partial_name, write_whole
from models.sit import SiT, SiT_models

CHECKPOINTS = "checkpoints"
KINDS = {"args": dict, "steps": int, "draws": int, "architecture": dict, "latent_space": dict, "data": str, "log": dict}  # of what is there
PRIVATE = ("data_dir", "output_dir", "ref_batch", "inception_weights", "encoder_weights", "init_weights", "resume")  # paths of a machine
ASIDE = ".aside"  # ends the names of checkpoints that a run has gone back behind
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


class Damaged(UserError):
    """A file that is not what was written. (One that cannot be read just now is another matter.)"""


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


def save(experiment: Path, state: dict) -> Path:
    """Write the checkpoint of `state["steps"]` whole, and return its path. Raises UserError where it cannot be written."""
    path = checkpoint_path(experiment, state["steps"])

    def write(partial: Path) -> None:
        try:
            torch.save(state, partial)
        except RuntimeError as error:             # what PyTorch's zip writer makes of every failure
            raise OSError("not all of it could be written, as on a full disk") from error

    write_whole(path, write)
    return path


class Saver:
    """Writes an experiment's checkpoints in a thread, one at a time, and removes those that are not to be kept.

    The newest `keep_last` stay (0: all), and of the others those whose step is a multiple of `keep_every` (0: none). Nothing is
    removed before the newer one is whole.
    """

    def __init__(self, experiment: Path, keep_last: int = 0, keep_every: int = 0):
        """Raises UserError where another process is training the experiment."""
        self.experiment, self.keep_last, self.keep_every = make_folder(experiment), keep_last, keep_every
        self._lock = _lock(experiment)
        self.failure: UserError | None = None     # of the last write
        self._state: dict | None = None           # what is being written, or could not be
        self._thread = threading.Thread()
        for partial in (experiment / CHECKPOINTS).glob(partial_name(Path("*.pt")).name):
            partial.unlink()                      # of a run that was killed while it wrote

    def start(self, state: dict) -> None:
        """Begin to write what `capture` returned, after the one before is done."""
        self.wait()
        self._state = state
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        before = self.failure
        try:
            path = save(self.experiment, self._state)
            for old in self._superseded():
                old.unlink()
        except Exception as error:                # whatever it is must reach the run, which is in another thread
            self.failure = error if isinstance(error, UserError) else UserError(f"cannot write a checkpoint: {error!r}")
            if before is None:
                notice(f"warning: {self.failure}; training goes on and tries again at every log line, older checkpoints are untouched")
        else:
            self._state = self.failure = None
            say(f"saved {path}")

    def _superseded(self) -> list[Path]:
        if self.keep_last == 0:
            return []
        older = list(saved(self.experiment).items())[:-self.keep_last]
        return [path for step, path in older if not self.keep_every or step % self.keep_every]

    def wait(self) -> None:
        """Until nothing is being written; `failure` then tells how the last write went."""
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self) -> None:
        """Until the last one is whole, which is tried once more if it has failed. Raises UserError when that fails, too."""
        self.wait()
        if self.failure is not None:
            self.start(self._state)
            self.wait()
        if self.failure is not None:
            raise self.failure


def _lock(experiment: Path) -> IO:
    """Keeps others from writing to this experiment until the file is closed, by whatever ends this process."""
    file = open(experiment / ".lock", "a")        # noqa: SIM115  (stays open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                          # not inherited by loader workers, unlike flock
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training {experiment}: wait until it ends, or use another --exp-name") from None
    except OSError as error:
        notice(f"{experiment} lies on a disk without locks ({error.strerror}): take care that nothing else trains it")
    return file


def save_args(experiment: Path, args: dict) -> None:
    """Write the settings beside the checkpoints, for people."""
    write_whole(experiment / "args.json", lambda partial: partial.write_text(json.dumps(args, indent=2) + "\n"))


def read(path: str | Path, mmap: bool = True) -> dict:
    """Read a checkpoint without running anything in it (`weights_only`); an argparse.Namespace in it becomes a dict.

    The file is read through once for its checksums. With `mmap` tensors stay on disk until they are used, so a sampler needs no memory
    for the optimiser state; without it they are the caller's own, whatever becomes of the file. Files of `export` are read too.
    Raises UserError when the file is missing or cannot be read now, and Damaged when it is no whole checkpoint.
    """
    path = find(path)
    if path.suffix == ".safetensors":
        return _read_export(path)
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()       # torch.load does not look at the checksums
                if damaged is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read now ({error!r}): give the same command again when it can") from error
    except Exception as error:                    # a file that is no checkpoint can make the unpickler raise anything
        raise Damaged(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or holds more than weights; "
                        "use another file, or delete it") from error
    if not isinstance(state, dict) or not state:
        raise Damaged(f"{path} holds a {type(state).__name__}, not a checkpoint: name a .pt file of REG, REPA or this program")
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    _require_kinds(state, path)
    return state


def _require_kinds(state: dict, path: Path) -> None:
    for name, kind in KINDS.items():
        if name in state and not isinstance(state[name], kind):
            raise Damaged(f"{path} holds {name} as {type(state[name]).__name__}, expected {kind.__name__}: use another file")


# ------------------------------------------------------------------------------------------------------------------- resuming

def resumable(experiment: Path, resume: str) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its content, or None for a new run.

    `resume` is "auto": the newest one that is whole, with a warning where newer ones are damaged; "none": a new run; or a file. A run
    goes back to a file once: given the same `resume` again, it goes on from what it has saved since.
    Raises UserError when nothing that is there can be read, or when "none" would write among the checkpoints of another run.
    """
    there = saved(experiment)
    if resume == "none":
        if there:
            raise UserError(f"--resume none came, but {experiment / CHECKPOINTS} holds {len(there)} checkpoints up to step {max(there)}: "
                            "use another --exp-name, or remove them")
        return None
    if resume == "auto":
        return _newest_whole(there) if there else None
    with contextlib.suppress(Damaged):            # if all are, the file is the remedy
        since = _newest_whole(there) if there else None
        if since is not None and since[1].get("args", {}).get("resume") == resume:
            return since
    path = find(resume)
    if there and not path.parent.samefile(experiment / CHECKPOINTS):
        raise UserError(f"--resume {resume} came, but {experiment} holds checkpoints of its own: use another --exp-name")
    return path, read(path, mmap=False)


def _newest_whole(there: dict[int, Path]) -> tuple[Path, dict]:
    damaged = []
    for path in reversed(there.values()):
        try:
            state = read(path, mmap=False)
        except Damaged:
            damaged.append(path)
            continue
        if damaged:
            notice(f"warning: {', '.join(map(str, damaged))} cannot be read and is passed over: going on from {path}")
        return path, state
    raise Damaged(f"none of the checkpoints can be read ({', '.join(map(str, damaged))}): remove them to start afresh, "
                  "or use another --exp-name")


def set_aside(experiment: Path, step: int) -> None:
    """Rename the checkpoints after `step`, where a run goes on: the same command must not take them for its own later."""
    for later, path in saved(experiment).items():
        if later > step:
            aside = next(name for i in itertools.count() if not (name := path.with_name(f"{path.name}{ASIDE}{i or ''}")).exists())
            path.rename(aside)
            notice(f"the run goes on at step {step}: {path} is renamed to {aside.name}, and may be removed")


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
