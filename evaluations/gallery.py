"""Write one HTML page about a run: curves, grids over steps, samples, their nearest training images, sweep, settings.

    python -m evaluations.gallery EXP_DIR

EXP_DIR/gallery.html is made from the run's files alone. It holds its pictures and loads nothing: it can be sent as it
is. Letters: G generated images, K training images, E encoder width.
"""

import argparse
import base64
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dataset import IMAGES, find_store, read_image
from evaluations.class_tokens import read_class_tokens
from evaluations.clip import read_captions
from evaluations.images import READERS
from evaluations.report import PROTOCOL, SETTINGS, as_text, read_rows, scores_of, words
from models.cached_features import Features, features_folder, features_path
from runtime.arguments import Parser
from runtime.catalogue import Catalogue
from runtime.files import as_size, read_patiently, write_whole
from runtime.log import read_lines
from runtime.messages import UserError, notice, say, without_traceback
from runtime.npz import load_npz, read_npz_rows, read_npz_shape
from runtime.stores import IMAGE_EXTENSIONS, decode_image, parse_json, shown

# What keeps the page below 20 MB: numbers of pictures, and the most bytes of each.
GRIDS, GRID_BYTES = 40, 150_000
BEST, SAMPLES, EACH, SAMPLE_BYTES = 3, 144, 6, 25_000      # settings; images of all, and of one class or prompt
TOKENS, NEAREST, CANDIDATES = 8, 5, 10_000                 # generated tokens, images of each, training images compared
POINTS, CURVES, TEXT = 300, 40, 300                        # of a curve; letters of a caption or a setting
WIDTH, HEIGHT = 200, 60                                    # of a curve
LARGEST = 1e15                                             # of a number in a curve

STYLE = """
:root{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}
body{max-width:1280px;margin:2rem auto;padding:0 1rem}
h1{margin:0}h2{margin:2.5rem 0 .5rem}p,pre,dl{margin:.5rem 0}pre{overflow-x:auto;font-size:12px}
small,figcaption,.missing,dt{color:GrayText;font-size:12px}.missing{border-left:3px solid orange;padding:.3rem .8rem}
figure{margin:0}.row{display:flex;flex-wrap:wrap;gap:1rem 1.4rem}.row img{width:92px;margin-right:3px}
.row figure{max-width:min-content;min-width:92px}.few figure{max-width:max-content}.row .token{margin-right:1rem}
.small{image-rendering:pixelated}#training{display:grid;gap:0 2rem}#training img,input{width:100%}
@media(min-width:900px){#training{grid-template-columns:2fr 3fr;align-items:start}#grids{position:sticky;top:0}}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:1rem}
svg{width:100%;overflow:visible;fill:none;stroke:#2a78c8;stroke-width:1.5;border-bottom:1px solid GrayText}
.at{stroke:orange}circle{fill:#2a78c8}b{float:right}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1rem}dd{margin:0;overflow-wrap:anywhere}
"""

SCRIPT = """
const slider = document.querySelector("input"), grids = [...document.querySelectorAll("#grids img")]
const step = grid => grid.dataset.step
const show = () => {
  grids.forEach((grid, i) => grid.hidden = i != slider.value)
  const now = step(grids[slider.value])
  document.querySelector("output").textContent = `step ${now}`
  for (const line of document.querySelectorAll(".at"))
    line.setAttribute("transform", `translate(${now / document.body.dataset.last * line.dataset.width})`)
}
const jump = () => {
  const i = grids.findIndex(grid => location.hash == `#step=${step(grid)}`)
  if (i >= 0) slider.value = i
  show()
}
if (slider) {
  slider.oninput = show
  slider.onchange = () => location.replace(`#step=${step(grids[slider.value])}`)
  onhashchange = jump
  jump()
}
"""


# ------------------------------------------------------------------------------------------------------------- elements

class Html(str):
    """Text that is HTML already. `tag` escapes every other text."""


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """An element with what is inside of it; an underscore in an attribute's name is a hyphen, the last one is none."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    content = "".join(part if isinstance(part, Html) else escape(str(part)) for part in inside)
    return Html(f"<{name}{given}>{content}" + f"</{name}>" * (name not in ("img", "input", "meta")))


def picture(image: Image.Image, limit: int, alt: str, **attributes: object) -> Html:
    """An image as WebP of at most `limit` bytes: lossless if that fits, else at a lower quality, else smaller."""
    image = image.convert("RGB")
    image.thumbnail((2048, 2048))
    look = {"class_": "small"} if min(image.size) <= 300 else {}
    while True:
        for how in ({"lossless": True}, {"quality": 85}, {"quality": 60}):
            data = io.BytesIO()
            image.save(data, "webp", **how)
            if data.tell() <= limit:
                source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
                return tag("img", src=source, alt=alt, **look, **attributes)
        image = image.reduce(2)


def open_picture(path: Path) -> Image.Image:
    """A picture of the run. Raises UserError if it is missing or damaged."""
    return decode_image(read_patiently(path.read_bytes, str(path)), str(path))


def spaced(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, with the first and the last one."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def words_of(what: int | str) -> str:
    """A class or a caption."""
    return what[:TEXT] if isinstance(what, str) else f"class {what}"


# ------------------------------------------------------------------------------------------------------------- chapters

def chapter(title: str, build: Callable[..., Sequence[Html]], *given: object, **attributes: object) -> Html:
    """A chapter of the page, which says in its place what is missing or damaged."""
    try:
        inside = build(*given)
    except UserError as error:
        notice(f"{title}: {error}")
        inside = [tag("p", str(error), class_="missing")]
    return tag("section", tag("h2", title), *inside, **attributes)


def curves(path: Path, lines: list[dict], last: int) -> list[Html]:
    """A panel for each number in the lines of metrics.jsonl: scores of samples first, then what training logs."""
    if not lines:
        raise UserError(f"{path}: no line of a log; --logging-steps writes them")
    written = sum(bool(line.strip()) for line in path.read_bytes().splitlines())
    scores, logs = ([line for line in lines if ("loss" in line) == logged] for logged in (False, True))
    note = "" if scores else "No scores while training: --eval-steps and --ref-batch log them. "
    note += f"{written - len(lines)} damaged lines are left out." * (written > len(lines))
    names = dict.fromkeys(name for line in scores + logs for name in line if name != "step")
    points = {name: [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)
                     and abs(line[name]) < LARGEST] for name in names}                    # a nan is not below
    panels = [curve(name, found, last) for name, found in points.items() if found]
    return [tag("p", note), tag("div", *panels[:CURVES], class_="panels")]


def curve(name: str, points: list[tuple[int, float]], last: int) -> Html:
    """One number over steps from 0 to `last`."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    places = [(f"{step / last * WIDTH:.1f}", f"{HEIGHT - (value - low) / (high - low or 1) * HEIGHT:.1f}")
              for step, value in spaced(points, POINTS)]
    dots = [tag("circle", cx=x, cy=y, r=2) for x, y in places] if len(places) <= 20 else []
    drawing = tag("svg", tag("polyline", points=" ".join(map(",".join, places))), *dots,
                  tag("line", class_="at", y2=HEIGHT, data_width=WIDTH), viewBox=f"0 0 {WIDTH} {HEIGHT}")
    return tag("figure", tag("b", f"{values[-1]:.4g}"), name[:TEXT], drawing,
               tag("figcaption", f"{low:.4g} to {high:.4g}"))


def grids(files: dict[int, Path]) -> list[Html]:
    """The grids of EMA samples by step, of which a slider shows one."""
    if not files:
        raise UserError("no grids/ of samples while training; --sampling-steps writes them")
    steps = spaced(list(files), GRIDS)
    images = [picture(open_picture(files[step]), GRID_BYTES, f"samples at step {step}", data_step=step,
                      **({} if step == steps[-1] else {"hidden": ""})) for step in steps]
    slider = tag("input", type="range", min=0, max=len(steps) - 1, value=len(steps) - 1, aria_label="training step")
    return [tag("p", tag("output", f"step {steps[-1]}"), tag("small", f" {len(steps)} of {len(files)} grids")), slider,
            *images]


def pick_samples(folder: Path, count: int, each: int) -> dict[int | str, dict[int, Image.Image]]:
    """About `count` images, at most `each` of a class or caption: what they show -> index -> image.

    Raises UserError if samples.npz or the captions are missing or damaged.
    """
    path = folder / "samples.npz"
    shape, dtype = read_npz_shape(path)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{path}: {dtype} {shape}; expected uint8 (N, H, W, 3)")
    labels = load_npz(path, ["arr_1"]).get("arr_1")
    groups: dict[int | str, list[int]] = {}
    for index, what in enumerate(read_captions(path, None, shape[0]) if labels is None else labels.tolist()):
        groups.setdefault(what, []).append(index)
    each = min(each, max(map(len, groups.values())))
    kinds = spaced(list(groups) if labels is None else sorted(groups), max(count // each, 1))
    chosen = {what: groups[what][:each] for what in kinds}
    indices = sorted(index for among in chosen.values() for index in among)
    rows = read_npz_rows(path, (range(index, index + 1) for index in indices))
    images = {index: Image.fromarray(row[0]) for index, row in zip(indices, rows, strict=True)}
    return {what: {index: images[index] for index in among} for what, among in chosen.items()}


def samples(best: dict[Path, dict]) -> list[Html]:
    """Samples of each of the best settings by class or caption, with the settings and scores of `best` rows."""
    inside = []
    for folder, row in best.items():
        about = [words(name, row[name]) for name in (*SETTINGS, *scores_of([row]))
                 if row.get(name) is not None and name not in ("checkpoint", "experiment", *PROTOCOL[3:])]
        figures = [tag("figure", *(picture(image, SAMPLE_BYTES, f"sample {i}") for i, image in images.items()),
                       tag("figcaption", words_of(what)), class_=f"of{len(images)}")
                   for what, images in pick_samples(folder, SAMPLES // len(best), EACH).items()]
        inside += [tag("p", " · ".join(about) or "not scored: give REF_BATCH to eval.sh"),
                   tag("small", folder.name), tag("div", *figures, class_="row few")]
    return inside


def neighbours(folder: Path, settings: dict) -> list[Html]:
    """Generated images with the training images whose stored class tokens have the largest cosine to the generated one.

    Raises UserError naming what is missing and the command that makes it.
    """
    if settings.get("method") != "reg":
        raise UserError(f"method {settings.get('method')}: only REG generates a class token")
    data, enc_type = Path(str(settings.get("data_dir"))), str(settings.get("enc_type")).split(",")[0].strip()
    if not (folder / "class_tokens.npz").exists():
        raise UserError(f"{folder.name}: no class_tokens.npz; give its eval.sh or generate.py command again with "
                        "--save-cls-tokens")
    source, path = find_store(data, IMAGES), features_path(data, enc_type)
    if path is None:
        raise UserError(f"{data}: no stored class tokens of the training images; python -m preprocessing.dataset_tools "
                        f"encode --source={source.path} --dest={data / features_folder(enc_type)} --enc-type={enc_type}")
    features, images = Features(path), Catalogue(source, IMAGE_EXTENSIONS)
    tokens, _ = read_class_tokens(folder / "class_tokens.npz", read_npz_shape(folder / "samples.npz")[0][0])
    if not features.record.class_token or features.record.width != tokens.shape[1]:
        raise UserError(f"{path}: holds no class tokens of {tokens.shape[1]} numbers; encode again")
    rows = spaced(range(len(features.names)), CANDIDATES)
    with ThreadPoolExecutor(READERS) as pool:
        known = torch.stack([*pool.map(lambda row: features.read(features.names[row])["class_token"], rows)])     # (K, E)

    inside = [tag("p", f"A generated image, and the training images nearest to its generated class token by cosine, among "
                       f"{len(rows):,} of {len(features.names):,}.")]
    for what, among in pick_samples(folder, TOKENS, 1).items():
        (index, image), = among.items()
        cosines, nearest = F.cosine_similarity(tokens[index], known).topk(min(NEAREST, len(rows)))
        figures = [tag("figure", picture(image, SAMPLE_BYTES, f"sample {index}"), tag("figcaption", words_of(what)),
                       class_="token")]
        for cosine, key in zip(cosines.tolist(), (features.keys[rows[i]] for i in nearest.tolist()), strict=True):
            at = np.flatnonzero(images.keys == key)
            if not len(at):
                raise UserError(f"{source.path}: lacks the image {shown(key)} of {path}; encode again")
            found = images.captions[at[0]] if isinstance(what, str) else int(images.labels[at[0]])
            near = Image.fromarray(read_image(source, images.names[at[0]]).transpose(1, 2, 0))
            figures.append(tag("figure", picture(near, SAMPLE_BYTES, shown(key)),
                               tag("figcaption", tag("strong", f"{cosine:.3f}"), f" {words_of(found)}")))
        inside.append(tag("div", *figures, class_="row"))
    return inside


def sweep(folder: Path, rows: list[dict]) -> list[Html]:
    """The plot and the table of everything that was scored."""
    if not rows:
        raise UserError(f"{folder}: no scores; give REF_BATCH to eval.sh")
    return [picture(open_picture(folder / "sweep.png"), 4 * GRID_BYTES, "distance over guidance scale"),
            tag("pre", as_text(rows))]


def settings_table(settings: dict) -> list[Html]:
    """The content of args.json."""
    if not settings:
        raise UserError("no args.json; train.py writes it")
    pairs = [(tag("dt", name), tag("dd", str(value)[:TEXT])) for name, value in settings.items()]
    return [tag("details", tag("summary", f"{len(settings)} settings of train.py"),
                tag("dl", *(part for pair in pairs for part in pair)))]


# ----------------------------------------------------------------------------------------------------------------- page

def read_settings(path: Path) -> dict:
    """The content of args.json, {} without one. Raises UserError if it is damaged."""
    settings = parse_json(read_patiently(path.read_bytes, str(path)), str(path)) if path.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not an object; train.py writes it again when it goes on")
    return settings


def best_of(folder: Path, rows: list[dict]) -> dict[Path, dict]:
    """The folders of the best of comparable rows and their rows; without scores the newest samples, with no row."""
    if rows:
        return {folder / row["folder"]: row for row in reversed(rows) if row["best"]}
    made = sorted(folder.glob("*/samples.npz"), key=lambda path: path.stat().st_mtime)
    return {path.parent: {} for path in made[-1:]}


def page(experiment: Path) -> str:
    """The page of an experiment's folder. Raises UserError if it is none, or its args.json is damaged."""
    parts = [experiment / name for name in ("args.json", "metrics.jsonl", "grids", "samples")]
    if not any(path.exists() for path in parts):
        raise UserError(f"{experiment}: no experiment, has none of {', '.join(path.name for path in parts)}; name the "
                        "folder of a run, as exps/reg-toy")
    settings, lines = read_settings(parts[0]), [line for line in read_lines(parts[1]) if 0 <= line["step"] < LARGEST]
    drawn = {int(path.stem): path for path in sorted(parts[2].glob("*.png")) if re.fullmatch("[0-9]{7,15}", path.stem)}
    last = max([1, *drawn, *(line["step"] for line in lines)])
    rows = read_rows(parts[3])
    best = dict([*best_of(parts[3], rows).items()][:BEST])

    def of_best(build: Callable, *given: object) -> list[Html]:
        if not best:
            raise UserError(f"{parts[3]}: no samples; make them with bash eval.sh {experiment}")
        return build(*given)

    name = experiment.resolve().name
    about = [str(settings.get(key))[:TEXT] for key in ("method", "model", "data_dir", "enc_type") if settings.get(key)]
    training = tag("div", chapter("Grids", grids, drawn, id="grids"), chapter("Curves", curves, parts[1], lines, last),
                   id="training")
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    head = [tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width"), tag("title", name), tag("style", Html(STYLE))]
    body = [tag("h1", name), tag("p", " · ".join([*about, f"step {last:,}"])), training,
            chapter("Samples of the best setting", of_best, samples, best),
            chapter("Nearest training images of the class token", of_best,
                    lambda: neighbours(next(iter(best)), settings)),
            chapter("Sweep", sweep, parts[3], rows), chapter("Settings", settings_table, settings),
            tag("script", Html(SCRIPT))]
    return "<!doctype html>" + tag("html", *head, tag("body", *body, data_last=last), lang="en")


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
