"""The fast path is the plain one: compiled, checkpointed and fused it gives the same numbers, breaks no graph and waits for nothing."""

import json
import os
import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

import loss
import train
from benchmarks import plain
from loss import SILoss
from models import checkpoint
from models.cached_features import FeaturesRecord
from models.encoders import CachedEncoder, load_encoders
from models.vae import LatentSpace, load_codec
from runtime import speed as compiling
from runtime.log import Meter, Skips
from runtime.speed import choose_same_kernels, compile_parts
from tests.test_reference import FORWARD, distance, released_model, tensor, vectors
from tests.test_sit import inputs, randomised, small
from tests.test_train import run, two_processes

ROOT = Path(__file__).parents[1]
STEPS = 200


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two would wait for each other at every small operator, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(model, count: int, batch: int = 4) -> list[dict]:
    """Arguments of SILoss with all that is random in them."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        x, t, y, c = inputs(model, batch=batch)
        noise = [torch.randn(like.shape, generator=generator) for like in (x, c, torch.empty(batch, 17, 12), x, c)]
        found.append(dict(images=noise[3], time_input=torch.rand(batch, generator=generator), model_kwargs=dict(y=y), cls_token=noise[4],
                          noises=noise[0], cls_noises=noise[1], zs=[noise[2]]))
    return found


def permuted(batch: dict) -> dict:
    """The same batch in another order: equal in exact arithmetic, another order of every sum over samples."""
    def turn(value):
        return {k: turn(v) for k, v in value.items()} if isinstance(value, dict) else [v.flip(0) for v in value] \
            if isinstance(value, list) else value.flip(0)
    return turn(batch)


def train_plainly(model, data: list[dict], args) -> list[float]:
    ema, optimizer, losses = deepcopy(model), plain.adamw(model, args), []
    for batch in data:
        losses.append(plain.step(model, ema, optimizer, plain.objective(), [batch], args).item())
    return losses + [parameter.double().norm().item() for parameter in ema.parameters()]


def train_fast(model, data: list[dict], args) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, ema, losses = Accelerator(cpu=True), deepcopy(model), []
    model.checkpointing = args.activation_checkpointing
    assert compile_parts(model)
    objective, optimizer = SILoss(compile=True), train.open_optimizer(model, args)
    for batch in data:
        _, total = train.backward(accelerator, model, objective, batch, args, last=True)
        train.update(model, ema, optimizer, None, args)
        losses.append(total.item())
    return losses + [parameter.double().norm().item() for parameter in ema.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_hundred_steps_agree_with_the_plain_way(checkpointing):
    """Losses of 200 steps and the norms of the averaged weights differ no more than by ten times what another order of sums alone does.

    That yardstick is the plain way itself on the same batches with their samples in another order. AdamW divides by the gradient's size,
    so that rounding errors grow with the steps; both ways start from one of a few units in the last place of float32.
    """
    flags = ["--learning-rate", "1e-3", "--ema-decay", "0.99", *(["--activation-checkpointing"] if checkpointing else [])]
    args = train.parse_args(flags)
    start = randomised(small(class_dropout_prob=0.0)).train()
    data = batches(start, STEPS)
    plainly = torch.tensor(train_plainly(deepcopy(start), data, args), dtype=torch.float64)
    reordered = torch.tensor(train_plainly(deepcopy(start), [permuted(batch) for batch in data], args), dtype=torch.float64)
    fast = torch.tensor(train_fast(deepcopy(start), data, args), dtype=torch.float64)
    yardstick = ((reordered - plainly) / plainly).abs().max().item()
    print("largest relative difference:", ((fast - plainly) / plainly).abs().max().item(), "yardstick:", yardstick)
    assert 0 < yardstick < 1e-3                                   # the loss itself moves by tens of per cent from batch to batch
    assert ((fast - plainly) / plainly).abs().max() < 10 * yardstick


@torch.no_grad()
def test_golden_vectors_hold_when_compiled():
    v = vectors("reg_forward")
    model = released_model(v)
    assert compile_parts(model)
    velocity, projected, cls_velocity = model(tensor(v["x"]), tensor(v["t"]), tensor(v["y"]), tensor(v["cls_token"]))
    for ours, name in ((velocity, "out"), (projected[0], "zs0"), (cls_velocity, "cls_out")):
        assert distance(ours, v[name]) < FORWARD


def test_checkpointing_keeps_less_and_gives_the_same_gradient():
    model = randomised(small(class_dropout_prob=0.0)).train()
    batch, = batches(model, 1)

    def gradient_and_kept() -> tuple[torch.Tensor, int]:
        kept = 0

        def pack(saved):
            nonlocal kept
            kept += saved.nbytes
            return saved

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            total = train.total_loss(SILoss()(model, **batch), train.parse_args([]))
        total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), kept

    whole, kept = gradient_and_kept()
    model.checkpointing = True
    again, kept_less = gradient_and_kept()
    assert torch.equal(whole, again) and kept_less < kept / 2


# ---- nothing in the way

def test_no_graph_breaks(encoder_folder, vae_folder):
    """SiT with its loss, each compiled part of it, of the encoder and of the VAE, the alignment and the encoder are one graph each."""
    model = randomised(small()).train()
    batch, = batches(model, 1)
    encoder, = load_encoders(f"local-dir:{encoder_folder}", "cpu", 32)
    vae = load_codec(str(vae_folder)).vae
    assert vae.config.mid_block_add_attention
    settings, objective, tokens = train.parse_args([]), SILoss(), torch.zeros(2, 17, 32)
    for function, args in ((lambda: train.total_loss(objective(model, **batch), settings), ()),
                           (model.blocks[0], (tokens, torch.zeros(2, 32))),
                           (model.final_layer, (tokens, torch.zeros(2, 32))), (model.projectors[0], (tokens,)),
                           (loss.alignment_loss, ([tokens], [tokens])),
                           (encoder.model.forward_features, (torch.zeros(2, 3, 32, 32),)),
                           (vae.encoder, (torch.zeros(2, 3, 32, 32),)), (vae.decoder, (torch.zeros(2, 4, 8, 8),)),
                           (encoder.preprocess, (torch.zeros(2, 3, 64, 64, dtype=torch.uint8),)), (encoder.model.blocks[0], (tokens,))):
        torch._dynamo.reset()
        found = torch._dynamo.explain(function)(*args)
        assert found.graph_break_count == 0 and found.graph_count == 1, found.break_reasons


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading numbers, and shapes that depend on values."""

    def __enter__(self):
        # A CPU's tensors are read without an operator.
        self.patches = pytest.MonkeyPatch()
        for name in READS:
            self.patches.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"{name} waits for the device"))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten.unique", "aten.equal")
        assert not any(name in str(function) for name in waits), f"{function} waits for the device"
        if str(function).startswith("aten.index.Tensor"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as index waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", ["item", "tolist", "cpu", "numpy", "__bool__", "__float__"])
def test_what_reads_is_noticed(read):
    with NoReading(), pytest.raises((AssertionError, pytest.fail.Exception), match="waits for the device"):
        getattr(torch.ones(()), read)()


@pytest.mark.parametrize(("checkpointing", "cached", "scaled"), [(False, False, False), (True, False, False), (False, True, True)])
def test_a_step_waits_for_nothing(encoder_folder, checkpointing, cached, scaled):
    """From the loader's batch to the meter, as train.py's loop does it, with two micro-batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    args = train.parse_args(["--mixed-precision", "bf16", "--gradient-accumulation-steps", "2"])
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.scaler = torch.amp.GradScaler("cpu") if scaled else None
    encoders, features = load_encoders(f"local-dir:{encoder_folder}", "cpu", 32, grid=4), []
    if cached:
        record = FeaturesRecord("an encoder", "", "", None, resolution=32, grid=4, width=32, class_token=True, dtype="float16")
        encoders, features = [CachedEncoder(record, 4)], [{"class_token": torch.ones(4, 32), "patches": torch.ones(4, 16, 32).half()}]
    model = small(in_channels=4, cls_token_dim=32, z_dims=(32,)).train()
    model.checkpointing = checkpointing
    ema, optimizer, meter, skips = deepcopy(model), train.open_optimizer(model, args), Meter(), Skips(20)
    prepared, objective = accelerator.prepare(model), SILoss()
    images, moments, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.rand(4, 8, 8, 8), torch.tensor([0, 1, 2, 3])
    with NoReading():
        for _ in range(2):
            for micro in range(2):
                train.reseed(0, 0, micro, 0)
                batch = train.prepare_batch(images, moments, labels, LatentSpace(), encoders, args, accelerator, features)
                terms, total = train.backward(accelerator, prepared, objective, batch, args, last=micro == 1)
                train.add_terms(meter, terms, total)
            grad_norm = train.update(model, ema, optimizer, accelerator.scaler, args)
            meter.add("grad_norm", grad_norm)
            skips.note(train.named([terms], grad_norm))


def test_images_travel_as_bytes(encoder_folder, monkeypatch):
    """A quarter of the traffic: what is sent to the device is uint8, and becomes numbers there."""
    seen = []
    encoder, = load_encoders(f"local-dir:{encoder_folder}", "cpu", 32)
    monkeypatch.setattr(encoder.preprocess, "forward", lambda images: seen.append(images.dtype) or torch.zeros(2, 3, 32, 32))
    args = train.parse_args([])
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    train.prepare_batch(images, torch.rand(2, 8, 4, 4), labels, LatentSpace(), [encoder], args, Accelerator(cpu=True))
    assert seen == [torch.uint8]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_is_kept_between_runs():
    """In a process of its own: after a few, blocks of 64 MiB are filled without page faults, and without the call they never are."""
    program = """if True:
        import resource, sys, torch
        from runtime.speed import keep_memory
        if sys.argv[1] == "keep":
            keep_memory()
        for _ in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(2**24).fill_(1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = [int(subprocess.run([sys.executable, "-c", program, way], cwd=ROOT, capture_output=True, text=True, check=True,
                                 env={**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}).stdout) for way in ("keep", "leave")]
    assert faults[0] < 100 < faults[1]                            # 64 MiB are 16,384 pages


def test_training_on_a_cpu_keeps_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "keep_memory", lambda: asked.append(True))
    AcceleratorState._reset_state(reset_partial_state=True)
    train.open_accelerator(train.resolve(train.parse_args(["--mixed-precision", "no"])))
    assert asked == [True]


# ---- the flags

def require_same(plainly: dict[str, torch.Tensor], fast: dict[str, torch.Tensor]) -> None:
    """After two steps of AdamW at 1e-4. Where a gradient is nearly zero, its sign and so a whole step may differ; on average none does."""
    assert plainly.keys() == fast.keys()
    apart = torch.cat([(fast[name] - value).flatten().abs() for name, value in plainly.items()])
    assert apart.max() <= 2 * 2 * 1e-4 and apart.mean() < 1e-6


def require_same_losses(plainly: Path, fast: Path) -> None:
    logs = [(folder / "run" / "metrics.jsonl").read_text() for folder in (plainly, fast)]
    first, second = ([json.loads(line) for line in log.splitlines()] for log in logs)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        for name in ("denoising_loss", "cls_loss", "align_cosine", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name            # float32 sums in another order


def test_compile_and_checkpointing_train_the_same_weights(train_flags, tmp_path):
    """The flags reach the run: blocks are compiled, or run again, and two steps end within rounding of the plain run's weights."""
    train_flags = [*train_flags, "--logging-steps", "1"]
    plain_run = run([*train_flags, "--output-dir", str(tmp_path / "a")])
    fast_run = run([*train_flags, "--output-dir", str(tmp_path / "b"), "--compile", "--activation-checkpointing"])
    assert fast_run["args"]["compile"] is True and plain_run["args"]["compile"] is False
    require_same(plain_run["model"], fast_run["model"])
    require_same_losses(tmp_path / "a", tmp_path / "b")


def test_a_compiled_run_resumes_to_the_bit(train_flags, tmp_path):
    flags = [*train_flags, "--compile"]
    straight = run([*flags, "--output-dir", str(tmp_path / "a")], steps=2)
    run([*flags, "--output-dir", str(tmp_path / "b")], steps=1)
    resumed = run([*flags, "--output-dir", str(tmp_path / "b")], steps=2)
    assert all(torch.equal(straight[part][name], resumed[part][name]) for part in ("model", "ema") for name in straight[part])


def test_two_processes_train_compiled_what_they_train_plainly(train_flags, tmp_path):
    """DDP's hooks find the gradients of compiled blocks: the same losses, and weights apart by rounding alone."""
    found = {}
    train_flags = [*train_flags, "--logging-steps", "1"]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        flags = [*train_flags, "--output-dir", str(tmp_path / name), "--max-train-steps", "2", *more]
        two_processes("train.py", *flags, TORCHINDUCTOR_COMPILE_THREADS="1")
        found[name] = checkpoint.read(tmp_path / name / "run" / "checkpoints" / "0000002.pt")["model"]
    require_same(found["plain"], found["compiled"])
    require_same_losses(tmp_path / "plain", tmp_path / "compiled")


def test_without_a_compiler_training_goes_on_with_one_warning(train_flags, tmp_path):
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                   "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    done = subprocess.run([sys.executable, "train.py", *train_flags, "--compile", "--max-train-steps", "1"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile does not work here") == 1 and "Traceback" not in done.stderr


def test_what_is_compiled(encoder_folder, vae_folder):
    """Of SiT the blocks, projectors and final layer; of an encoder the blocks and what makes its input of images; of a VAE its halves."""
    networks = model, encoder, vae = small(), *load_encoders(f"local-dir:{encoder_folder}", "cpu", 32), load_codec(str(vae_folder)).vae
    assert all(map(compile_parts, networks))
    compiled = {name for network in networks for name, module in network.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {*(f"blocks.{i}" for i in range(len(model.blocks))), "projectors.0", "final_layer", "preprocess",
                        *(f"model.blocks.{i}" for i in range(len(encoder.model.blocks))), "encoder", "decoder"}


def test_all_processes_are_given_the_same_kernels(monkeypatch):
    from torch._inductor import config

    new, old = (config, "deterministic", True), (config.triton, "autotune_pointwise", False)
    place, name, chosen = new if hasattr(config, "deterministic") else old
    monkeypatch.setattr(place, name, not chosen)
    choose_same_kernels()
    assert getattr(place, name) is chosen


@torch.no_grad()
def test_a_compiled_encoder_gives_the_same_features(encoder_folder):
    """But for float32's rounding, of images that are resized, too."""
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, compiled = (load_encoders(f"local-dir:{encoder_folder}", "cpu", 32)[0] for _ in range(2))
    assert compile_parts(compiled)
    for look in (lambda encoder: encoder.preprocess(images), lambda encoder: encoder.features(images, True)[1]):
        torch.testing.assert_close(look(plain), look(compiled), rtol=1e-4, atol=1e-5)


def test_the_compiler_is_asked_once(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    compiling.compiler_works.cache_clear()
    try:
        model = small()
        assert not compile_parts(model) and not compile_parts(model)
    finally:
        compiling.compiler_works.cache_clear()
    assert capsys.readouterr().err.count("warning: torch.compile does not work here (no compiler)") == 1
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_ddp_keeps_gradients_once_and_searches_nothing():
    """Gradients are views of what is exchanged, and no step looks for parameters without one: every parameter has its part in the loss."""
    AcceleratorState._reset_state(reset_partial_state=True)
    handler = train.open_accelerator(train.resolve(train.parse_args(["--mixed-precision", "no"]))).ddp_handler
    assert handler.gradient_as_bucket_view and not handler.find_unused_parameters
    model = randomised(small()).train()
    batch, = batches(model, 1)
    train.total_loss(SILoss()(model, **batch), train.parse_args([])).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_log_tells_the_gpus_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert train.peak_memory(torch.device("cuda")) == {"peak_memory_gib": 1.5}
    assert train.peak_memory(torch.device("cpu")) == {}
