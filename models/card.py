"""The model card of a network to share: README.md of a folder or a repository of the Hugging Face hub."""

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from models.vae import VAES, LatentSpace
from runtime.files import read_object
from runtime.messages import notice
from runtime.samples import METRICS
from runtime.stores import shown

METHODS = {"reg": "REG ([arXiv 2507.01467](https://arxiv.org/abs/2507.01467))",
           "repa": "REPA ([arXiv 2410.06940](https://arxiv.org/abs/2410.06940))",
           "sit": "SiT ([arXiv 2401.08740](https://arxiv.org/abs/2401.08740))"}
# The settings of training that sampling and the card need: no others are shared.
KEPT = ("method", "model", "enc_type", "path_type", "time_shift", "resolution", "cfg_prob", "encoder_depth",
        "fused_attn", "batch_size")
LOCAL = "; the VAE was a folder: a pipeline has it in vae/, otherwise name it with --vae"
HEAD = ("score", "value", "samples", "features", "reference", "setting")
SETTINGS = ("mode", "heun", "num_steps", "cfg_scale", "cls_cfg_scale", "guidance_low", "guidance_high", "time_shift",
            "labels", "classes", "captions", "prompts", "samples_per_prompt", "precision", "seed")


def public(value: object) -> object:
    """JSON without places of this machine: of a path, also behind a prefix like `local-dir:`, only the last part."""
    if isinstance(value, dict):
        return {name: public(one) for name, one in value.items()}
    if not isinstance(value, str):
        return [public(one) for one in value] if isinstance(value, list | tuple) else value
    kind, place = re.fullmatch(r"([\w-]+:)?(.*)", value, re.DOTALL).groups("")
    private = re.search(r"^[/~.]|\\|/.*/", place) or os.path.isdir(place)
    return kind + re.split(r"[/\\]", place.rstrip("/\\"))[-1] if private else value


def public_record(record: dict) -> dict:
    """A network's `record` to share: of the settings those in KEPT, and everything `public`, as scores are already."""
    args = {name: value for name, value in record.get("args", {}).items() if name in KEPT}
    if isinstance(args.get("enc_type"), str):                     # several, with commas between them
        args["enc_type"] = ",".join(map(public, args["enc_type"].split(",")))
    kept = {name: value if name == "scores" else public(value) for name, value in record.items() if name != "args"}
    return kept | ({"args": public(args)} if args else {})


def read_scores(samples: Path, digest: str, which: str) -> list[list[str]]:
    """Rows of HEAD: what the evaluator wrote below an experiment's `samples` for a checkpoint with this SHA-256 and
    `which` weights, a row for each score against each reference."""
    found = []
    for path in sorted(samples.glob(f"*/{METRICS}")):
        try:
            result = read_object(path)
            settings, how = result["settings"], result["settings"]["sampling"]
            if (settings["checkpoint_sha256"], settings["weights"]) == (digest, which):
                setting = [f"{name} {public(how[name])}" for name in SETTINGS if how.get(name) not in (None, False)]
                setting += [f"VAE {public(settings.get('vae'))}", f"block {settings.get('per_proc_batch_size')}"]
                found += _scores(public(result), ", ".join(setting))
        except (LookupError, TypeError, AttributeError, RecursionError):
            notice(f"{path}: not scores of samples that generate.py made; left out")
    return found


def model_card(architecture: dict, record: dict, name: str, diffusers: bool) -> str:
    """Markdown with the hub's metadata, from a network's `config` and `record`.

    `name`: of the folder or repository; `diffusers`: it is a pipeline's.
    """
    record, captions = public_record(record), "context_dim" in architecture
    args, licence = record.get("args", {}), record.get("licence")
    table = _table(HEAD, record["scores"]) if record.get("scores") else ["No scores recorded."]
    head = ["---", f"license: {json.dumps(licence)}" if licence else "", "library_name: reg",
            f"pipeline_tag: {'text-to-image' if captions else 'unconditional-image-generation'}",
            "tags: [model_hub_mixin, pytorch_model_hub_mixin]", "---", "", f"# {shown(name)}", ""]
    rows = {"method": METHODS.get(args.get("method"), "not recorded"), **_rows(architecture, record, args),
            "licence": f"{licence or 'of these weights: not stated'}; the code is under the MIT licence"}
    what, how = ('prompt="..."', '--prompt "..."') if captions else ("class_labels=0", "--num-fid-samples 16")
    flag, vae = ("", "") if diffusers or LOCAL not in rows["latent space"] else (" --vae FOLDER", ', vae="FOLDER"')
    command = f"python generate.py --ckpt {shlex.quote(name)} {how}{flag}"
    python = f"from models.pipeline import REGPipeline\n\nREGPipeline.from_pretrained({name!r}{vae})({what}).images[0]"
    use = ["", "## Sampling", "", "In a clone of the program:", "", "```bash", command, "```", "", "```python", python,
           "```", ""]
    return "\n".join([*head, *_table(["", ""], rows.items()), "", "## Scores", "", *table, *use])


def _rows(architecture: dict, record: dict, args: dict) -> dict[str, str]:
    size = ", ".join(f"{key.replace('_', ' ')} {architecture[key]}" for key in
                     ("depth", "hidden_size", "num_heads", "patch_size", "cls_token_dim"))
    rows = {"network": f"{args.get('model', 'not named')}: {size}", "data": record.get("data_name", "not recorded")}
    if "num_classes" in architecture:
        some = f", of which {len(record['classes'])} had images" if "classes" in record else ""
        rows["classes"] = f"{architecture['num_classes']}{some}"
    if "text" in record:
        rows["text encoder"] = "{encoder}, {length} states of width {width}".format(**record["text"])
    rows["latent space"] = "not recorded; counts as Stable Diffusion's"
    if "latent_space" in record:
        space = LatentSpace.from_record(record["latent_space"])
        licence = next((f", licence of the VAE: {row.licence}" for row in VAES.values() if row.id == space.vae), "")
        rows["latent space"] = (f"{space.vae} (f{space.downsampling}c{space.channels}), scale {space.scale}, shift "
                                f"{space.shift}{licence}{LOCAL * ('/' not in space.vae)}")
        rows["images"] = f"{architecture['input_size'] * space.downsampling} px"
    steps = f"{record['steps']:,}" if "steps" in record else "not recorded"
    rows["steps"] = steps + (f" of {args['batch_size']} images" if "batch_size" in args else "")
    rows["weights"] = {"ema": "averaged (EMA)", "model": "last"}.get(record.get("weights"), "not recorded")
    more = ("path_type", "time_shift", "enc_type")
    return rows | {name.replace("_", " "): args[name] for name in more if name in args}


def _scores(result: dict, setting: str) -> list[list[str]]:
    references = ({"name": result.get("ref_batch"), **result}, *result.get("references", ())[1:])
    about = [str(result.get(name)) for name in ("num_samples", "features")]
    return [[name, f"{value:.5g}", *about, str(one["name"]), setting]
            for one in references for name, value in one.items() if isinstance(value, float)]


def _table(head: Sequence[str], rows) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(shown(str(cell)).replace('|', '/') for cell in line)} |" for line in lines]
