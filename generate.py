"""Sample a checkpoint: an npz for scoring, PNG files, a grid, class tokens on request. `bash eval.sh` also scores them.

Image i depends on (seed, i) alone. Blocks of consecutive indices are dealt to the processes, so the images are
bit-equal for any number of processes. The same command again makes only what is missing.
"""

import argparse
import hashlib
import json
import os
import platform
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import find_captions
from models import checkpoint
from models.checkpoint import MODELS, Network
from models.conditioning import Captions, ClassLabels, Conditions, open_captions
from models.hub import decoder_of, digest_of, find, name_of, shift_of, space_of
from models.interpolant import PATHS
from models.text import DEFAULT
from models.vae import SHORTHANDS, Codec, load_codec
from runtime.arguments import Parser, Released, at_least, guidance, share, time_shift
from runtime.catalogue import tidy
from runtime.files import UNREADABLE, read_object
from runtime.launch import join_processes, leave_processes
from runtime.messages import UserError, notice, say, without_traceback
from runtime.run import CHECKPOINTS
from runtime.samples import SETTINGS, SampleFolder
from runtime.speed import allow_tf32, choose_same_kernels, compile_parts, require_same_everywhere
from runtime.stores import parse_json
from samplers import Sampling, image_rng, sample_images

# Flags of the released programs that set nothing here, and what to use instead; None: the flag is taken.
RELEASED_FLAGS = {
    "legacy": "rename decoder_blocks.i in the file to blocks.(i + --encoder-depth); leave it out",
    "local-rank": None,                                           # of torch.distributed.launch
    "no-heun": "Euler steps are the default; leave it out",
    "no-legacy": "there is one form of files; leave it out",
    "no-tf32": "the network computes in fp32 unless --precision says otherwise; leave it out",
    "tf32": "give --precision tf32",
}
LABEL_FLAGS = ("labels", "classes")
CAPTION_FLAGS = ("prompt", "prompts", "captions_from", "captions", "samples_per_prompt", "layout", "text_encoder")
LONGEST_NAME = 200           # bytes of a folder's name
DECIDING = ("checkpoint_sha256", "weights", "vae", "vae_precision", "sampling", "compiled", "num_images",
            "per_proc_batch_size")        # the settings that decide an image


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(description="Sample a REG, REPA or SiT checkpoint; the last line printed is the .npz file.")
    what = parser.add_argument_group("what")
    what.add_argument("--ckpt", required=True, metavar="PATH|ID",
                      help="checkpoint file; experiment folder: its newest; exported folder; or hub id")
    what.add_argument("--model", choices=tuple(MODELS), metavar="NAME", help="for released files, which lack it")
    what.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or last weights")
    what.add_argument("--vae", metavar="VAE", help="hub id, folder or name of docs/data.md; None: the checkpoint's")
    what.add_argument("--sample-dir", metavar="DIR", help="None: samples/ in the experiment, else ./samples")
    what.add_argument("--num-fid-samples", type=at_least(1), metavar="N", help="number of images; "
                      f"None: {ClassLabels.count}, for captions {Captions.count}, for prompts all")
    what.add_argument("--save-cls-tokens", action="store_true", help="also write the generated class tokens (REG)")
    what.add_argument("--no-png", action="store_true", help="write samples.npz and the grid only, no images/ folder")

    how = parser.add_argument_group("how (None: the published guided setting)")
    how.add_argument("--mode", choices=("sde", "ode"), default=Sampling.mode, help="Euler-Maruyama, or Euler")
    how.add_argument("--heun", action="store_true", help="Heun instead of Euler, for ode")
    how.add_argument("--num-steps", type=at_least(1, 10**6), default=Sampling.num_steps, metavar="N",
                     help="solver steps")
    how.add_argument("--cfg-scale", type=guidance, metavar="S", help="guidance of the latents; 1: none; "
                     f"None: {ClassLabels.published['cfg_scale']}, for captions {Captions.published['cfg_scale']}")
    how.add_argument("--cls-cfg-scale", type=guidance, metavar="S",
                     help="guidance of the class token; None: as --cfg-scale; 0: conditional only")
    how.add_argument("--guidance-low", type=share, default=Sampling.guidance_low, metavar="T",
                     help="guided from this t on, in [0, 1]")
    how.add_argument("--guidance-high", type=share, metavar="T", help="guided up to this t, inclusive; None: "
                     f"{ClassLabels.published['guidance_high']}, for captions {Captions.published['guidance_high']}")
    how.add_argument("--time-shift", type=time_shift, metavar="S|auto",
                     help="of the steps' times; None: as in training")
    how.add_argument("--global-seed", type=at_least(0), default=Sampling.seed, metavar="SEED",
                     help="image i depends on (SEED, i) alone")

    labels = parser.add_argument_group("class labels")
    labels.add_argument("--labels", choices=("random", "balanced"), help="None: random; balanced: every class in turn")
    labels.add_argument("--classes", type=class_list, metavar="LIST", help="classes to take in turn, e.g. 207,360")

    text = parser.add_argument_group("captions")
    of = text.add_mutually_exclusive_group()
    of.add_argument("--prompt", action="append", metavar="TEXT", help="a caption; may be given several times")
    of.add_argument("--prompts", metavar="FILE", help="captions, one per line, or JSONL with `prompt`")
    of.add_argument("--captions-from", metavar="DATA", help="prepared data set with captions; None: that of training")
    text.add_argument("--captions", choices=("in-order", "random"), help="None: in-order; random: from (SEED, i)")
    text.add_argument("--samples-per-prompt", type=at_least(1), metavar="N", help="images of one prompt; None: 1")
    text.add_argument("--layout", choices=("geneval",), help="also write GenEval's folders; --prompts is its file")
    text.add_argument("--text-encoder", metavar="NAME|FOLDER", help="None: the checkpoint's")

    run = parser.add_argument_group("machine")
    run.add_argument("--per-proc-batch-size", type=at_least(1, 10**5), default=64, metavar="IMAGES",
                     help="images per block; another size may change a few pixel values by one level")
    run.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default=Sampling.precision,
                     help="of the network; the solver's state is float64")
    run.add_argument("--vae-precision", choices=("fp32", "bf16"), default="fp32",
                     help="of the decoder; bf16 changes some pixel values by a level or two; "
                          "fp32 convolves in TF32 on a GPU unless --precision is fp32")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                     help="compile the network, and a decoder in bf16; may change a few pixel values; None: on CUDA")
    told = parser.add_argument_group("told by the checkpoint, and refused if it says otherwise")
    told.add_argument("--path-type", choices=tuple(PATHS), help="needed for weights alone that are not linear")
    for name in ("--encoder-depth", "--resolution", "--num-classes", "--cls"):
        told.add_argument(name, type=at_least(0), metavar="N")
    told.add_argument("--projector-embed-dims", type=class_list, metavar="LIST")
    for name in ("--qk-norm", "--fused-attn"):
        told.add_argument(name, action=argparse.BooleanOptionalAction)
    for name, instead in RELEASED_FLAGS.items():
        parser.add_argument(f"--{name}", action=Released, instead=instead)
    args = parser.parse_args(argv)
    if args.cfg_scale is not None and args.cfg_scale < 1:
        parser.error(f"--cfg-scale {args.cfg_scale}: expected a number of at least 1; 1 is no guidance")
    if args.guidance_high is not None and args.guidance_low > args.guidance_high:
        parser.error(f"--guidance-low {args.guidance_low}: is above --guidance-high {args.guidance_high}")
    if args.heun and args.mode != "ode":
        parser.error("--heun needs --mode ode")
    if args.precision == "tf32" and not torch.cuda.is_available():
        parser.error("--precision tf32: there is no CUDA device; use fp32 or bf16")
    if args.classes is not None and args.labels == "balanced":
        parser.error(f"--labels {args.labels}: --classes are taken in turn; leave --labels out")
    if args.layout and (args.prompts is None or args.num_fid_samples is not None or args.captions == "random"):
        parser.error(f"--layout {args.layout}: needs --prompts, GenEval's file, in order and without --num-fid-samples")
    return args


def class_list(text: str) -> tuple[int, ...]:
    """A type for whole numbers with commas between them."""
    return tuple(map(at_least(0), text.split(",")))


def require_suitable(args: argparse.Namespace, state: dict, model: Network) -> None:
    """Raise UserError for flags that this checkpoint cannot follow or contradicts; where it is silent, they count."""
    trained, weights = state.get("args") or {}, state.get(args.weights, state)
    widths = [bias.numel() for name, bias in weights.items() if re.search(r"projectors\.\d+\.4\.bias$", name)]
    told = {"path_type": trained.get("path_type"), "encoder_depth": trained.get("encoder_depth"),
            "fused_attn": trained.get("fused_attn"), "qk_norm": model.config["qk_norm"],
            "resolution": model.input_size * space_of(state).downsampling,
            "num_classes": getattr(model, "num_classes", 0),
            "cls": model.cls_token_dim or 0, "projector_embed_dims": tuple(widths) or None}
    for name, value in told.items():
        given = getattr(args, name)
        if None not in (given, value) and given != value:
            raise UserError(f"--{name.replace('_', '-')} {given}: the checkpoint has {value}; leave it out")
    if model.cls_token_dim is None and (args.save_cls_tokens or args.cls_cfg_scale is not None):
        flag = "--save-cls-tokens" if args.save_cls_tokens else f"--cls-cfg-scale {args.cls_cfg_scale}"
        raise UserError(f"{flag}: the checkpoint has no class token; leave it out")
    if args.cfg_scale == 1 and args.cls_cfg_scale is not None:
        notice(f"--cls-cfg-scale {args.cls_cfg_scale:g}: has no effect, as --cfg-scale 1 guides nothing")
    captions = checkpoint.has_captions(state, args.model)
    for name in LABEL_FLAGS if captions else CAPTION_FLAGS:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: the checkpoint was trained with "
                            f"{'captions' if captions else 'class labels'}; leave it out")
    if args.cfg_scale != 1 and (trained.get("cfg_prob") if captions else model.y_embedder.dropout_prob) == 0:
        given = "" if args.cfg_scale is None else f" {args.cfg_scale:g}"
        raise UserError(f"--cfg-scale{given}: trained with --cfg-prob 0, so without guidance; give 1")
    if args.classes is not None and max(args.classes) >= model.num_classes:
        raise UserError(f"--classes {max(args.classes)}: the checkpoint has classes 0 to {model.num_classes - 1}")
    require_seen(args.classes, state.get("classes"), told["num_classes"])


def require_seen(classes: tuple[int, ...] | None, seen: list | None, num_classes: int) -> None:
    """Raise UserError for classes without training images; `seen`: those that had some, None: all."""
    if seen is None:
        return
    if not seen or max(seen) >= num_classes:
        raise UserError("the checkpoint's list of classes does not fit its model; use another file")
    for one in classes or ():
        if one not in seen:
            raise UserError(f"--classes {one}: no training image had this class; give one with images, like {seen[0]}")
    if classes is None:
        notice(f"{len(seen)} of {num_classes} classes had training images: labels are drawn among these")


# ------------------------------------------------------------------------------------------- which images, which folder

def read_prompts(path: str) -> tuple[list[str], list[str]]:
    """The prompts of a file with one on each line (of JSONL the field `prompt`), and the lines, without empty ones.

    Raises UserError if there are none, or a line of JSONL has none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UNREADABLE as error:
        raise UserError(f"--prompts {path}: cannot be read ({error}); give a text file with a prompt on each line"
                        ) from error
    if not lines:
        raise UserError(f"--prompts {path}: is empty; give a file with a prompt on each line")
    prompts = []
    for number, line in enumerate(lines, 1):
        where = f'--prompts {path}: line {number}, "prompt"'
        entry = parse_json(line, where) if lines[0].startswith("{") else {"prompt": line}
        prompts += tidy([entry.get("prompt") if isinstance(entry, dict) else None], where)
    return prompts, lines


def conditions_of(args: argparse.Namespace, state: dict, num_classes: int = 0,
                  device: torch.device | str = "cpu") -> Conditions:
    """What the images show, but for the text encoder. Neither `num_classes` nor the device matter to settings.json.

    Raises UserError if the prompts or captions cannot be read.
    """
    if not checkpoint.has_captions(state, args.model):
        seen = state.get("classes")
        return ClassLabels(num_classes, args.labels or "random", args.classes, seen and tuple(seen), device)
    if args.prompts is not None:
        prompts, lines = read_prompts(args.prompts)
        if args.layout and not lines[0].startswith("{"):
            raise UserError(f"--prompts {args.prompts}: holds no JSON; --layout {args.layout} needs GenEval's file")
    elif args.prompt is not None:
        prompts = ["" if not text.strip() else tidy(text, "--prompt")[0] for text in args.prompt]
    else:
        source = args.captions_from or (state.get("args") or {}).get("data_dir")
        if source is None:
            raise UserError("the checkpoint does not tell its data set; give --prompt, --prompts or --captions-from")
        prompts = find_captions(str(source))                      # an edited checkpoint may name anything
    source = state["text"]["sha256"] if "text" in state else args.text_encoder or DEFAULT
    return Captions(prompts, None, None, args.captions or "in-order", args.samples_per_prompt or 1, source)


def settings_of(args: argparse.Namespace, path: Path, state: dict, digest: str, compiled: bool,
                conditions: Conditions) -> dict:
    """What makes the images, for settings.json: the flags with what the checkpoint says. `digest`: SHA-256 of its file.

    Raises UserError if the checkpoint was trained on an unknown path.
    """
    path_type = (state.get("args") or {}).get("path_type") or args.path_type or "linear"
    if path_type not in PATHS:
        raise UserError(f"{path}: trained on the path {path_type!r}, expected {' or '.join(PATHS)}; use another file")
    vae = args.vae or decoder_of(path, space_of(state))
    guided = {name: value if getattr(args, name) is None else getattr(args, name)
              for name, value in conditions.published.items()}
    if args.guidance_low > guided["guidance_high"]:
        raise UserError(f"--guidance-low {args.guidance_low}: is above --guidance-high {guided['guidance_high']}")
    how = Sampling(mode=args.mode, num_steps=args.num_steps, heun=args.heun, cls_cfg_scale=args.cls_cfg_scale,
                   guidance_low=args.guidance_low, seed=args.global_seed, path_type=path_type,
                   time_shift=shift_of(path, state, args.time_shift), precision=args.precision, **guided)
    of_prompts = isinstance(conditions, Captions) and (args.prompts or args.prompt)
    count = len(conditions.prompts) * conditions.per_prompt if of_prompts else conditions.count
    libraries = {name: version(name) for name in ("torch", "numpy", "diffusers", "timm")}
    return {"checkpoint": str(path), "checkpoint_sha256": digest, "step": state.get("steps"), "weights": args.weights,
            "vae": SHORTHANDS.get(vae, vae), "vae_precision": args.vae_precision,
            "sampling": asdict(how) | conditions.settings(), "compiled": compiled,
            "num_images": args.num_fid_samples or count, "per_proc_batch_size": args.per_proc_batch_size,
            "versions": {"python": platform.python_version(), **libraries}, "training": state.get("args")}


def sampling_of(settings: dict) -> Sampling:
    """The sampler's part of settings.json, without what decides the conditions."""
    return Sampling(**{name: settings["sampling"][name] for name in Sampling.__dataclass_fields__})


def folder_of(sample_dir: str | None, settings: dict) -> Path:
    """The folder of the images; its name carries every setting that changes an image, a long one as a hash."""
    how, path, vae = sampling_of(settings), Path(settings["checkpoint"]), settings["vae"]
    shown = settings["sampling"]
    if "captions" in shown:
        what = [shown["captions"], f"{shown['prompts']}x{shown['samples_per_prompt']}", shown["prompts_sha256"][:6]]
    else:
        what = [shown["labels"] if shown["classes"] is None else "classes" + "+".join(map(str, shown["classes"]))]
    ours = path.parent.name == CHECKPOINTS
    parts = [path.parent.parent.name if ours else "", name_of(path), "model" * (settings["weights"] == "model"),
             how.mode, "heun" * how.heun, f"steps{how.num_steps}", f"cfg{how.cfg_scale:.12g}"]
    if how.cfg_scale > 1:
        parts += ["" if how.cls_cfg_scale is None else f"cls{how.cls_cfg_scale:.12g}",
                  f"t{how.guidance_low:.12g}-{how.guidance_high:.12g}"]
    place = str(Path(vae).resolve()) if os.path.isdir(vae) else vae                       # two folders may share a name
    parts += ["" if how.time_shift == 1 else f"shift{how.time_shift:.12g}", *what, f"seed{how.seed}", how.precision,
              "compiled" * settings["compiled"],
              f"vae-{Path(vae).name}-{hashlib.sha256(place.encode()).hexdigest()[:6]}",
              "bf16" * (settings["vae_precision"] == "bf16"), f"batch{settings['per_proc_batch_size']}",
              f"n{settings['num_images']}", "" if settings["training"] else how.path_type.replace("linear", "")]
    name = "-".join(filter(None, parts)).encode(errors="surrogateescape")
    if len(name) > LONGEST_NAME:
        name = name[:LONGEST_NAME] + b"-" + hashlib.sha256(name).hexdigest()[:8].encode()
    return Path(sample_dir or (path.parent.parent if ours else Path()) / "samples") / name.decode(errors="ignore")


def is_same(found: dict, wanted: dict) -> bool:
    """Whether two settings.json decide the same images, `found` with any content. Unguided ones have no interval."""
    def deciding(settings: dict) -> dict:
        how = settings.get("sampling")
        if isinstance(how, dict):
            how = {"seen": None, "time_shift": 1.0, **how}        # older files lack it
            if how.get("cfg_scale") == 1:
                how |= dict.fromkeys(("cls_cfg_scale", "guidance_low", "guidance_high"))
        settings = {name: settings.get(name) for name in DECIDING} | {"sampling": how}
        return json.loads(json.dumps(settings))                   # tuples become lists, as in a file

    return deciding(found) == deciding(wanted)


# ------------------------------------------------------------------------------------------------------------- sampling

def make_ready(model: Network, device: torch.device, precision: str, compiled: bool) -> bool:
    """Move the network to the device in its fastest form; returns whether it is compiled, as asked and if possible."""
    model.to(device)
    if precision == "bf16":
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.to(torch.bfloat16)  # once, instead of autocast at every evaluation: the same bits
    if not compiled:
        return False
    choose_same_kernels()
    return compile_parts(model)


def open_decoder(vae: str, device: torch.device, precision: str, compiled: bool) -> Codec:
    codec = load_codec(vae, device)
    if precision == "bf16":
        codec.in_bf16()
        if compiled:
            compile_parts(codec.vae)
    return codec


def make_blocks(folder: SampleFolder, blocks: list[range], model: Network, codec: Codec, how: Sampling,
                conditions: Conditions, compiled: bool, show: bool) -> None:
    """Sample and write one process's blocks."""
    for block in tqdm(blocks, desc="sampling", unit="block", disable=not show):
        # Compiling for the size of a smaller last block would take longer than to sample a whole one.
        indices = range(block.start, block.start + folder.block_size) if compiled else block
        images, _, class_tokens = sample_images(model, codec, indices, how, conditions)   # (B, 3, R, R), B, (B, E)
        arrays = {"images": images.permute(0, 2, 3, 1), "class_tokens": class_tokens}
        folder.write_block(block, **{part: arrays[part][:len(block)].numpy() for part in folder.parts})


@without_traceback
def main(argv=None) -> None:
    args = parse_args(argv)
    path = find(args.ckpt)
    state, digest = checkpoint.read(path), digest_of(path)
    model, space = checkpoint.build_for_sampling(state, args.model, args.weights), space_of(state)
    require_suitable(args, state, model)

    world = join_processes()
    first, device = world.is_main_process, world.device
    if device.type == "cpu":
        torch.set_num_threads(1)          # more threads change the last bits; use more processes
    allow_tf32(args.precision != "fp32")
    # Before the folder is named: where the compiler does not work, the images are those of --no-compile.
    compiled = args.compile if args.compile is not None else device.type == "cuda"
    compiled = make_ready(model, device, args.precision, compiled)
    require_same_everywhere(compiled)
    conditions = conditions_of(args, state, getattr(model, "num_classes", 0), device)
    settings = settings_of(args, path, state, digest, compiled, conditions)
    settings["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, 1 thread"
    how = sampling_of(settings)
    side = model.input_size * space.downsampling
    parts = {"class_tokens": np.dtype((np.float32, (model.cls_token_dim,)))} if args.save_cls_tokens else {}
    parts["images"] = np.dtype((np.uint8, (side, side, 3)))
    folder = SampleFolder(folder_of(args.sample_dir, settings), settings["num_images"], args.per_proc_batch_size,
                          parts, png=not args.no_png)
    missing = folder.missing(is_same(read_object(folder.path / SETTINGS), settings)) if first else None

    from accelerate.utils import broadcast_object_list  # slow to import

    missing, = broadcast_object_list([missing])           # one answer for all: a shared disk may show files late
    if missing is None:
        notice(f"already there: {folder.count} images of these settings in {folder.path}")
    else:
        with world.local_main_process_first():                    # one process downloads, the others find the cache
            codec = open_decoder(settings["vae"], device, args.vae_precision, compiled)
            if isinstance(conditions, Captions):
                conditions = open_captions(conditions.prompts, args.text_encoder, None, device, state.get("text"), path,
                                           model.context_dim, order=conditions.order, per_prompt=conditions.per_prompt)
        silent = "" if "latent_space" in state else ", which names no VAE and so counts as Stable Diffusion's,"
        codec.use_space(space, f"the checkpoint{silent}")
        done = len(folder.blocks) - len(missing)
        if done:
            notice(f"continuing: {done} of {len(folder.blocks)} blocks are done")
        if first:
            if not done and folder.npz()[0].exists():
                notice(f"{folder.path}: its samples are of another checkpoint file; they are made again")
            folder.begin(settings, keep=done > 0)
        world.wait_for_everyone()
        make_blocks(folder, missing[world.process_index::world.num_processes], model, codec, how, conditions,
                    compiled, show=first)
        world.wait_for_everyone()
        if first:
            folder.finish([conditions.draw(i, image_rng(how.seed, i)) for i in range(folder.count)])
    if first:
        folder.export((read_prompts(args.prompts)[1], conditions.per_prompt) if args.layout else None)
    world.wait_for_everyone()
    say(str(folder.npz()[0]))


if __name__ == "__main__":
    main()
    leave_processes()
