"""Rules of the house: who imports whom, requirements that are used, commands of README and docs that parse, links."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import generate
import train
from evaluations import evaluator, sweep
from models import checkpoint
from models.sit import SiT_models
from preprocessing import dataset_tools

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train", "generate"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "toy").glob("*.md"))]

# Each part or module of the project, and what else of it that part may import.
EVERYTHING = {"train", "generate", "dataset", "loss", "samplers", "models", "preprocessing", "evaluations", "runtime"}
ALLOWED = {
    "runtime": {"runtime"},
    "models": {"models", "runtime"},
    "models.pipeline": {"models", "samplers", "runtime"},
    "loss": {"models.interpolant"},
    "samplers": {"models.interpolant", "runtime"},
    "dataset": {"models.cached_features", "runtime"},
    "generate": {"samplers", "dataset", "models", "runtime"},
    "preprocessing": {"preprocessing", "dataset", "models", "runtime"},
    "evaluations.sweep": {"evaluations", "generate", "models.checkpoint", "runtime"},
    "evaluations.gallery": {"evaluations", "dataset", "models.cached_features", "runtime"},
    "evaluations": {"evaluations", "models.encoders", "models.text", "preprocessing.crop", "runtime"},
    "train": EVERYTHING - {"generate"},
    "benchmarks": EVERYTHING | {"benchmarks", "toy"},
    "toy": EVERYTHING | {"toy"},
}
ENGINE = {"signal", "fcntl", "subprocess", "zipfile"}             # imported by runtime/ only, and by toy/
REGS_OWN = ("SiT", "SILoss", "cls_token", "class_token", "latents", "moments", "velocity")


def sources() -> dict[str, Path]:
    parts = ("models", "runtime", "preprocessing", "evaluations", "toy", "benchmarks")
    files = [*ROOT.glob("*.py"), *(path for part in parts for path in (ROOT / part).glob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, with the names that are imported from it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(imported: str) -> str | None:
    """The module of the project that an import names, or None."""
    modules = sources()
    return next((name for name in (imported, imported.rpartition(".")[0]) if name in modules), None)


def graph() -> dict[str, set[str]]:
    return {name: {module for module in map(ours, imports(path)) if module} - {name}
            for name, path in sources().items()}


def test_who_imports_whom():
    for name, imported in graph().items():
        allowed = ALLOWED.get(name) or ALLOWED[name.partition(".")[0]]
        for module in imported:
            assert module in allowed or module.partition(".")[0] in allowed, f"{name} imports {module}"


def test_imports_are_acyclic():
    left = graph()
    while left:
        free = {name for name, imported in left.items() if not imported & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: imported for name, imported in left.items() if name not in free}


def test_signals_locks_processes_and_zips_are_the_engines():
    for name, path in sources().items():
        if name.partition(".")[0] not in ("runtime", "toy"):
            assert not imports(path) & ENGINE and not {i.partition(".")[0] for i in imports(path)} & ENGINE, name


def test_the_engine_knows_nothing_of_reg():
    for name, path in sources().items():
        if name.startswith("runtime."):
            found = [word for word in REGS_OWN if re.search(rf"\b{word}\b", path.read_text())]
            assert not found, f"{name} names {found}"


def test_requirements_are_imported():
    names = {"pillow": "PIL", "torch-fidelity": "torch_fidelity"}
    required = {re.split(r"[>=<]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    used = {imported.partition(".")[0] for path in sources().values() for imported in imports(path)}
    # timm and torch-fidelity import torchvision, whose version must fit torch's
    assert {names.get(name, name) for name in required} <= used | {"torchvision"}


def test_pyproject_agrees_with_requirements_and_names_every_module():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    groups = project["project"]["optional-dependencies"]
    assert groups.keys() >= {"text", "parquet", "track"}
    required = (ROOT / "requirements.txt").read_text().split()
    assert sorted(required) == sorted(project["project"]["dependencies"] + groups["text"])
    tops = {name.partition(".")[0] for name in sources()}
    installed = project["tool"]["setuptools"]
    assert sorted(tops) == sorted(installed["py-modules"] + installed["packages"])


@pytest.mark.parametrize("module", ["train", "generate"])
def test_optional_libraries_are_imported_only_where_they_are_used(module):
    """A machine may lack diffusers until a picture is decoded; and what is slow to import is imported where needed."""
    lacking = "diffusers=None, wandb=None, tensorboard=None, torch_fidelity=None, timm=None, torchvision=None"
    program = f"import sys; sys.modules.update({lacking}); import {module}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ---- README and docs

def commands() -> list[list[str]]:
    """Every command in a bash block, or between backticks if it starts like one."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        inline = [code for code in re.findall(r"`([^`\n]+)`", text)
                  if re.match(r"([A-Z_]+=\S+ )*(bash|python|make) ", code)]
        for line in [*blocks.splitlines(), *inline]:
            if line.strip() and not line.lstrip().startswith("#") and "..." not in line:
                found[line.strip()] = shlex.split(line, comments=True)
    return list(found.values())


def parse_eval(arguments: list[str]) -> None:
    """eval.sh's flags: lists of values are the sweep's, every other flag is generate.py's."""
    args, passed_on = sweep.parse_args(arguments)
    sweep.expand({name: sweep.values(name, text) for name in sweep.SWEPT if (text := getattr(args, name)) is not None})
    generate.parse_args(["--ckpt", args.experiment, *passed_on])


def parse_module(module: str, arguments: list[str]) -> None:
    """A `python -m module ...` line."""
    if module == "runtime.launch":                                # takes what python takes
        return parse(["python", *arguments])
    if module == "preprocessing.dataset_tools":
        return dataset_tools.build_parser().parse_args(arguments)
    if module == "benchmarks":
        module = "benchmarks.__main__"
    {"evaluations.evaluator": evaluator, "models.checkpoint": checkpoint}.get(
        module, importlib.import_module(module)).parse_args(arguments)


def parse(command: list[str]) -> None:
    """Parse a command as the program would; raises SystemExit or AssertionError for one that it would refuse."""
    while "=" in command[0] and not command[0].startswith("-"):
        name = command.pop(0).partition("=")[0]
        places = ("train.sh", "eval.sh", "runtime/launch.py", "Makefile")
        assert any(name in (ROOT / place).read_text() for place in places)
    match command:
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["sbatch", *options] if options[0].startswith("--"):
            parse(["sbatch", *options[1:]])
        case ["bash", "train.sh", recipe, *flags] | ["srun", "bash", "train.sh", recipe, *flags] | [
                "sbatch", "train.sh", recipe, *flags]:
            assert re.search(rf"^    {recipe}\)", (ROOT / "train.sh").read_text(), re.MULTILINE)
            train.parse_args(flags)
        case ["bash", "eval.sh", *flags]:
            parse_eval(flags)
        case ["bash", "toy/compare.sh", *flags]:
            parse_module("toy.compare", flags)
        case ["bash", script, *_]:
            assert (ROOT / script).exists()
        case ["python", "train.py", *flags]:
            train.parse_args(flags)
        case ["python", "generate.py", *flags]:
            generate.parse_args(flags)
        case ["python" | "accelerate", *rest] if "-m" in rest:
            parse_module(*rest[rest.index("-m") + 1:][:1], rest[rest.index("-m") + 2:])
        case ["pip", "install", "-r", file]:
            assert (ROOT / file).exists()
        case ["pip", "install", *_] | ["git" | "cd" | "ln", *_]:
            pass
        case _:
            raise AssertionError(f"unknown command: {' '.join(command)}")


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_readme_and_docs_parse(command):
    parse(list(command))


def test_each_published_number_is_scored_where_it_was_trained():
    """In each row of docs/reproduce.md: the experiment that the train command writes, and a step that it saves."""
    page = (ROOT / "docs/reproduce.md").read_text()
    rows = re.findall(r"^\|.*\| `(.*train\.sh.*)` \| `(.*)` \|.*$", page, re.MULTILINE)
    for training, scoring in rows:
        environment, _, flags = training.rpartition("bash train.sh ")
        recipe, *flags = flags.split()
        args = train.parse_args(flags)
        method = environment.partition("METHOD=")[2].split(" ")[0] or "reg"
        name = args.exp_name if "--exp-name" in flags else f"{method}-{recipe}"
        scored, _ = sweep.parse_args(scoring.removeprefix("bash eval.sh ").split())
        assert scored.experiment == f"exps/{name}" and 0 < int(scored.steps) <= args.max_train_steps
        assert int(scored.steps) % args.checkpointing_steps == 0
    assert len(rows) == len({scoring for _, scoring in rows}) > 40


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_is_short():
    text = PAGES[0].read_text()
    assert text.count("\n") <= 120 and len(text.split()) <= 1200


# ---- scripts and recipes

@pytest.mark.parametrize("script", ["train.sh", "eval.sh", "toy/run.sh", "toy/run-t2i.sh", "toy/prepare.sh",
                                    "toy/compare.sh", ".ci/run", "tests/stress/slurm.sh"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_recipes_use_flags_that_exist():
    known = {"train.sh": set(vars(train.parse_args([]))), "eval.sh": set(vars(generate.parse_args(["--ckpt", "x"])))}
    for script, spelled in known.items():
        code = "\n".join(line.partition("#")[0] for line in (ROOT / script).read_text().splitlines())
        for flag in set(re.findall(r"--[a-z0-9-]+", code)) - {"--help"}:
            assert flag[2:].replace("-", "_") in spelled, f"{script}: {flag}"


def test_recipes_name_the_papers_depth():
    text = (ROOT / "train.sh").read_text()
    for name, depth in re.findall(r"--model (SiT-\S+) --encoder-depth (\d)", text):
        assert SiT_models[name].keywords["encoder_depth"] == int(depth)


def test_every_flag_of_a_program_is_read():
    for module in (train, generate):
        source = Path(module.__file__).read_text()
        required = ["--ckpt", "x"] if module is generate else []
        for name in vars(module.parse_args(required)):
            read = re.search(rf"\bargs\.{name}\b", source) or f'"{name}"' in source
            assert read, f"{module.__name__}: --{name} is read nowhere"
