"""Write one HTML page about a run: curves, grids over steps, samples, their nearest training images, sweep, settings.

    python -m evaluations.gallery EXP_DIR

EXP_DIR/gallery.html is made from the run's files alone. It holds its pictures and loads nothing: send it as it is.
"""

import argparse
import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset import LatentDataset
from evaluations.class_tokens import read_class_tokens
from evaluations.clip import read_captions
from evaluations.report import as_text, read_rows, scores_of, words
from models.cached_features import Features, features_folder, features_path
from runtime.arguments import Parser
from runtime.files import as_size, read_patiently, write_whole
from runtime.log import read_lines
from runtime.messages import UserError, say, without_traceback
from runtime.npz import load_npz, read_npz_rows, read_npz_shape
from runtime.stores import decode_image, parse_json

# What keeps the page below 20 MB: numbers of pictures, and the most bytes of each.
GRIDS, GRID_BYTES = 40, 150_000
SAMPLES, EACH, SAMPLE_BYTES = 144, 6, 25_000     # images, and of a class or caption
TOKENS, NEAREST, CANDIDATES = 8, 8, 5000         # generated tokens, images of each, training images to choose from
CURVES, POINTS, LARGEST, TEXT = 40, 300, 1e15, 300                # curves, their points and largest number; letters
SAID = ("step", "mode", "num_steps", "cfg_scale", "guidance_high", "num_samples", "labels", "reference")
FORMS = [(side, how) for side in (2048, 1024, 512, 256, 128, 64) for how in ({"lossless": True}, {"quality": 80})]

HEAD = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=width=device-width>
<meta http-equiv=Content-Security-Policy content="default-src 'unsafe-inline' data:"><style>h2{margin:2.5rem 0 .5rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:1rem} .row figure{width:min-content}
svg{fill:none;stroke:#2a78c8;border-bottom:1px solid GrayText} :root{color-scheme:light dark;font:15px/1.5 system-ui}
body{max-width:1280px;margin:2rem auto;padding:0 1rem} .missing{border-left:3px solid orange;padding:4px 1em}
#training,.row{display:flex;flex-wrap:wrap;gap:1rem} pre,small,figcaption{font-size:12px} .row img{flex:0 0 96px}
.small{image-rendering:pixelated} small,figcaption{color:GrayText} #grids img,input,svg{width:100%} h1,figure{margin:0}
.row div{display:flex;gap:3px} .row{margin-bottom:2rem} #curves{flex:3 1 400px} pre{overflow-x:auto} b{float:right}
#grids{flex:2 1 320px} .at{stroke:orange;transform:translateX(calc(200px*var(--step)/var(--last)))}</style>"""

SCRIPT = """<script>const slider = document.querySelector("input"), grids = [...document.querySelectorAll("#grids img")]
const show = () => {
  grids.forEach((grid, i) => grid.hidden = i != slider.value)
  document.querySelector("output").textContent = grids[slider.value].alt
  document.body.style.setProperty("--step", grids[slider.value].dataset.step)
}
if (slider) slider.oninput = onload = show</script>"""


# ------------------------------------------------------------------------------------------------------------- elements

class Html(str):
    """Text that is HTML already. `tag` escapes every other text."""


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """An element; `data_step=1` becomes data-step="1", and `class_` class."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    content = "".join(part if isinstance(part, Html) else escape(str(part)) for part in inside)
    return Html(f"<{name}{given}>{content}" + f"</{name}>" * (name not in ("img", "input")))


def picture(image: Image.Image | Path, limit: int, **attributes: object) -> Html:
    """An image as WebP of at most `limit` bytes: lossless if that fits, else at a lower quality, else smaller.

    Raises UserError for a missing or damaged file.
    """
    if isinstance(image, Path):
        image = decode_image(read_patiently(image.read_bytes, str(image)), str(image))
    image = image.convert("RGB")
    for side, how in FORMS:
        image.thumbnail((side, side))
        data = io.BytesIO()
        image.save(data, "webp", **how)
        if data.tell() <= limit:
            break
    return tag("img", src=f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}",
               class_="small" * (image.width <= 300), **attributes)


def require(found: object, message: str) -> None:
    if not found:
        raise UserError(message)


def spaced(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, with the first and the last one."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def figure(text: str, *images: Image.Image) -> Html:
    return tag("figure", tag("div", *(picture(one, SAMPLE_BYTES, alt="") for one in images)), tag("figcaption", text))


# ------------------------------------------------------------------------------------------------------------- chapters

def chapter(name: str, title: str, build: Callable[..., Sequence[Html]], *given: object) -> Html:
    """A chapter of the page, which says in its place what is missing or damaged."""
    try:
        inside = build(*given)
    except UserError as error:
        inside = [tag("p", str(error), class_="missing")]
    return tag("section", tag("h2", title), *inside, id=name)


def curves(path: Path, lines: list[dict], last: int) -> list[Html]:
    """A panel for each number in the lines of metrics.jsonl: scores of samples first, then what training logs."""
    require(lines, f"{path}: no lines; train.py writes one every --logging-steps")
    lines = sorted(lines, key=lambda line: ("loss" in line, line["step"]))
    note = f"Steps 0 to {last:,}; orange: the grid's." + " No scores: --eval-steps logs them." * ("loss" in lines[0])
    numbers, panels = {}, []
    for step, name, value in ((line["step"], *pair) for line in lines for pair in line.items()):
        if name != "step" and isinstance(value, int | float) and abs(value) < LARGEST:    # a nan is not
            numbers.setdefault(name[:TEXT], []).append((step, value))
    for name, points in [*numbers.items()][:CURVES]:
        low, high = min(value for _, value in points), max(value for _, value in points)
        places = [f"{step / last * 200:.1f},{60 - (value - low) / (high - low or 1) * 60:.1f}"
                  for step, value in spaced(points, POINTS)]
        drawing = tag("svg", tag("polyline", points=" ".join(places[:1] + places)),       # twice: a dot if it is alone
                      tag("line", class_="at", y2=60), viewBox="0 0 200 60")
        text = tag("figcaption", f"{low:.4g} to {high:.4g}")
        panels.append(tag("figure", tag("b", f"{points[-1][1]:.4g}"), name, drawing, text))
    return [tag("p", note), tag("div", *panels, class_="panels")]


def grids(folder: Path, drawn: dict[int, Path]) -> list[Html]:
    """The grids of EMA samples by step, of which a slider shows one."""
    require(drawn, f"{folder}: no grids; train.py draws one every --sampling-steps")
    steps = spaced(sorted(drawn), GRIDS)
    images = [picture(drawn[step], GRID_BYTES, data_step=step, alt=f"step {step}") for step in steps]
    slider = tag("input", type="range", min=0, max=len(steps) - 1, value=len(steps) - 1, aria_label="training step")
    return [tag("output"), tag("small", f" ({len(steps)} of {len(drawn)} grids)"), slider, *images]


def best_of(folder: Path, rows: list[dict]) -> tuple[Path, dict]:
    """Folder and row of the best setting with the most samples; without scores the newest samples, with {}."""
    made = sorted(folder.glob("*/samples.npz"), key=lambda path: path.stat().st_mtime)
    require(made, f"{folder}: no samples; make them with bash eval.sh {folder.parent}")
    best = max((row for row in rows if row["best"]), key=lambda row: row["num_samples"], default={})
    return folder / best.get("folder", made[-1].parent.name), best


def pick_samples(path: Path, count: int, each: int) -> dict[str, dict[int, Image.Image]]:
    """About `count` images of samples.npz, at most `each` of a class or caption: what they show -> index -> image.

    Raises UserError if the file, or captions.jsonl beside it, is damaged.
    """
    labels, groups = load_npz(path, ["arr_1"]).get("arr_1"), {}
    shown = (dict(enumerate(read_captions(path, None, read_npz_shape(path)[0][0]))) if labels is None else
             {index: f"class {labels[index]}" for index in np.argsort(labels, kind="stable").tolist()})
    for index, what in shown.items():
        groups.setdefault(what[:TEXT], []).append(index)
    each = min(each, max(map(len, groups.values())))
    chosen = {what: groups[what][:each] for what in spaced(list(groups), max(count // each, 1))}
    indices = sorted(index for among in chosen.values() for index in among)
    rows = dict(zip(indices, read_npz_rows(path, (range(i, i + 1) for i in indices)), strict=True))
    return {what: {index: Image.fromarray(rows[index][0]) for index in among} for what, among in chosen.items()}


def samples(folder: Path, rows: list[dict]) -> list[Html]:
    """Samples of the best setting by class or caption, with its scores."""
    place, row = best_of(folder, rows)
    about = [words(name, row[name]) for name in (*scores_of([row]), *SAID) if row.get(name) is not None]
    groups = pick_samples(place / "samples.npz", SAMPLES, EACH)
    return [tag("p", " · ".join(about) or "Not scored: give REF_BATCH to eval.sh."), tag("small", place.name),
            tag("div", *(figure(what, *one.values()) for what, one in groups.items()), class_="row")]


def neighbours(folder: Path, rows: list[dict], settings: dict) -> list[Html]:
    """Generated images with the training images whose stored class tokens are nearest to the generated one, by cosine.

    Raises UserError naming what is missing and the command that makes it.
    """
    npz = best_of(folder, rows)[0] / "samples.npz"
    require(npz.with_name("class_tokens.npz").exists(), f"{npz.parent}: no class tokens (of REG, by --save-cls-tokens)")
    require("data_dir" in settings, f"{folder.parent}: no args.json, which names the data set")
    data_dir, name = str(settings.get("data_dir")), str(settings.get("enc_type")).split(",")[0].strip()
    require(path := features_path(data_dir, name),
            f"{data_dir}: no stored class tokens of its images; python -m preprocessing.dataset_tools encode "
            f"--source={data_dir}/images --dest={data_dir}/{features_folder(name)} --enc-type={name}")
    data = LatentDataset(data_dir, features=[Features(path)], captions=settings.get("text_encoder") is not None)
    tokens, _ = read_class_tokens(npz.with_name("class_tokens.npz"), read_npz_shape(npz)[0][0])             # (N, E)
    chosen = spaced(range(len(data)), CANDIDATES)
    known = torch.stack([data[i][3]["class_token"] for i in chosen])                                        # (K, E)
    inside = [tag("p", f"Nearest of {len(known):,} of {len(data):,} images: cosine of class tokens, class or caption")]
    for what, one in pick_samples(npz, TOKENS, 1).items():
        (index, image), = one.items()
        cosines, nearest = torch.cosine_similarity(tokens[index], known).topk(min(NEAREST, len(known)))
        row = [figure(f"generated: {what}", image)]
        for cosine, (near, _, told, _) in zip(cosines, (data[chosen[i]] for i in nearest), strict=True):
            row.append(figure(f"{cosine:.3f} · {told}"[:TEXT], Image.fromarray(near.permute(1, 2, 0).numpy())))
        inside.append(tag("div", *row, class_="row"))
    return inside


def sweep(folder: Path, rows: list[dict]) -> list[Html]:
    """Plot and table of everything that was scored."""
    require(rows, f"{folder}: no scores; give REF_BATCH to eval.sh")
    return [picture(folder / "sweep.png", 2 * GRID_BYTES, alt="distances", width=640), tag("pre", as_text(rows))]


# ----------------------------------------------------------------------------------------------------------------- page

def page(experiment: Path) -> str:
    """The page of an experiment's folder. Raises UserError if it is none, or if its args.json is damaged."""
    args, log, grid, made = parts = [experiment / name for name in ("args.json", "metrics.jsonl", "grids", "samples")]
    require(any(map(Path.exists, parts)), f"{experiment}: holds no run; name a folder of train.py, as exps/reg-toy")
    settings = parse_json(read_patiently(args.read_bytes, str(args)), str(args)) if args.exists() else {}
    require(isinstance(settings, dict), f"{args}: holds no settings; correct it, or remove it")
    lines, rows, name = read_lines(log), read_rows(made), experiment.resolve().name
    drawn = {int(path.stem): path for path in grid.glob("*.png") if path.stem.isdecimal()}
    last = max([1, *drawn, *(line["step"] for line in lines)])
    about = [str(settings.get(key, "no args.json"))[:TEXT] for key in ("method", "model", "data_dir")]
    flags = "\n".join(f"{key[:TEXT]}: {str(value)[:TEXT]}" for key, value in settings.items())
    body = tag("body", tag("h1", name), tag("p", " · ".join([*about, f"step {last:,}"])),
               tag("div", chapter("grids", "Samples while training", grids, grid, drawn),
                   chapter("curves", "Curves", curves, log, lines, last), id="training"),
               chapter("samples", "Samples of the best setting", samples, made, rows),
               chapter("neighbours", "Training images nearest to the class token", neighbours, made, rows, settings),
               chapter("sweep", "Sweep", sweep, made, rows),
               tag("details", tag("summary", "Settings"), tag("pre", flags)), style=f"--last:{last};--step:{last}")
    return f"{HEAD}<title>{escape(name)}</title>{body}{SCRIPT}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m evaluations.gallery", description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", type=Path, metavar="EXP_DIR", help="experiment folder; gets gallery.html")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    experiment = parse_args(argv).experiment
    content = page(experiment).encode(errors="replace")           # half a surrogate pair has no UTF-8
    write_whole(experiment / "gallery.html", lambda partial: partial.write_bytes(content))
    say(f"wrote {experiment / 'gallery.html'} ({as_size(len(content))})")


if __name__ == "__main__":
    main()
