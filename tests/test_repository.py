"""Rules of the house: who imports whom, requirements that are used, README commands that parse, files that are there."""

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
from tests.stress import kills
from toy import compare

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train", "generate"}
README = (ROOT / "README.md").read_text()

# Who imports whom: each part, or module, and what else of the project it may import.
ALLOWED = {
    "runtime": {"runtime"},
    "models": {"models", "runtime"},
    "loss": {"models.interpolant"},
    "samplers": {"models.interpolant", "runtime"},
    "dataset": {"models.cached_features", "runtime"},
    "generate": {"samplers", "models", "runtime", "evaluations"},
    "preprocessing": {"preprocessing", "dataset", "models", "runtime"},
    "evaluations": {"evaluations", "models.encoders", "preprocessing.crop", "runtime"},
    "train": {"dataset", "loss", "samplers", "models", "evaluations", "preprocessing", "runtime"},
    "benchmarks": {"benchmarks", "toy", "train", "generate", "dataset", "loss", "samplers", "models", "preprocessing", "evaluations",
                   "runtime"},
    "toy": {"toy", "benchmarks", "train", "generate", "dataset", "loss", "samplers", "models", "preprocessing", "evaluations", "runtime"},
}


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
    return {name: {module for module in map(ours, imports(path)) if module} - {name} for name, path in sources().items()}


def test_who_imports_whom():
    for name, imported in graph().items():
        allowed = ALLOWED.get(name) or ALLOWED[name.partition(".")[0]]
        for module in imported:
            assert module in allowed or module.partition(".")[0] in allowed, f"{name} imports {module}"


def test_nothing_but_benchmarks_imports_a_program():
    for name, imported in graph().items():
        assert name.startswith("benchmarks.") or not imported & PROGRAMS, f"{name} imports {imported & PROGRAMS}"


def test_imports_are_acyclic():
    left = graph()
    while left:
        free = {name for name, imported in left.items() if not imported & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: imported for name, imported in left.items() if name not in free}


def test_requirements_are_imported():
    names = {"pillow": "PIL"}
    required = {re.split(r"[>=<]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    used = {imported.partition(".")[0] for path in sources().values() for imported in imports(path)}
    assert {names.get(name, name) for name in required} <= used


@pytest.mark.parametrize("module", ["train", "generate"])
def test_optional_libraries_are_imported_only_where_they_are_used(module):
    """A machine may lack diffusers until a picture is decoded, and the trackers until they are asked for."""
    program = f"import sys; sys.modules.update(diffusers=None, wandb=None, tensorboard=None); import {module}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def readme_commands() -> list[list[str]]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    inline = [code for code in re.findall(r"`([^`\n]+)`", README) if re.match(r"([A-Z_]+=\S+ )*(bash|python) ", code)]
    lines = [line for line in [*blocks.splitlines(), *inline] if line.strip() and not line.startswith("#") and "..." not in line]
    return [shlex.split(line, comments=True) for line in lines]


def parse_eval(arguments: list[str]) -> None:
    """eval.sh's flags: lists of values are the sweep's, every other flag is generate.py's."""
    args, passed_on = sweep.parse_args(arguments)
    sweep.expand({name: sweep.values(name, text) for name in sweep.SWEPT if (text := getattr(args, name)) is not None})
    generate.parse_args(["--ckpt", args.experiment, *passed_on])


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_commands_parse(command):
    while "=" in command[0] and not command[0].startswith("-"):
        name = command.pop(0).partition("=")[0]
        assert any(name in (ROOT / place).read_text() for place in ("train.sh", "eval.sh", "runtime/launch.py"))
    if command[:3] == ["python", "-m", "runtime.launch"]:
        command[1:3] = []                                         # the launcher takes what python takes
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif command[:2] == ["bash", "train.sh"]:
        assert re.search(rf"^    {command[2]}\)", (ROOT / "train.sh").read_text(), re.MULTILINE)
        train.parse_args(command[3:])
    elif command[:2] == ["bash", "eval.sh"]:
        parse_eval(command[2:])
    elif command[:2] == ["bash", "toy/compare.sh"]:
        compare.parse_args([*command[2:], "--data-dir", "x", "--output", "x"])
    elif command[:2] == ["python", "train.py"]:
        train.parse_args(command[2:])
    elif command[:2] == ["python", "generate.py"]:
        generate.parse_args(command[2:])
    elif command[1:3] == ["-m", "preprocessing.dataset_tools"] or command[2:4] == ["-m", "preprocessing.dataset_tools"]:
        dataset_tools.build_parser().parse_args(command[command.index("preprocessing.dataset_tools") + 1:])
    elif command[1:4] == ["-m", "models.checkpoint", "export"]:
        checkpoint.parse_args(command[3:])
    elif command[1:3] == ["-m", "tests.stress.kills"]:
        kills.parse_args(command[3:])
    elif command[1:3] == ["-m", "benchmarks"]:
        importlib.import_module("benchmarks.__main__").parse_args(command[3:])
    elif command[2].startswith("benchmarks."):
        importlib.import_module(command[2]).parse_args(command[3:])
    elif command[1:3] == ["-m", "evaluations.evaluator"]:
        evaluator.parse_args(command[3:])
    else:
        assert command == ["pip", "install", "-r", "requirements.txt"] and (ROOT / "requirements.txt").exists()


def test_readme_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("script", ["train.sh", "eval.sh", "toy/run.sh", "toy/prepare.sh", "toy/compare.sh", ".ci/run"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def recipe_flags(script: str) -> list[str]:
    return re.findall(r"--[a-z0-9-]+", "\n".join(line.partition("#")[0] for line in (ROOT / script).read_text().splitlines()))


def test_recipes_use_flags_that_exist():
    known = {"train.sh": set(vars(train.parse_args([]))), "eval.sh": set(vars(generate.parse_args(["--ckpt", "x"])))}
    for script, spelled in known.items():
        for flag in set(recipe_flags(script)) - {"--help"}:
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
