"""The fast path: compiled, checkpointed and fused it gives the plain numbers, breaks no graph, waits for nothing."""

import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from loss import SILoss, weighted
from models.cached_features import FeaturesRecord
from models.conditioning import ClassLabels
from models.encoders import CachedEncoder, load_encoders
from models.vae import LatentSpace, load_codec
from runtime import run as disk
from runtime.speed import choose_same_kernels, compile_parts, compiler_works
from runtime.stopping import StopRequest
from tests.test_reference import FORWARD, distance, released_model, tensor, vectors
from tests.test_sit import inputs, randomised, small
from tests.test_train import Encoded

SPACE = LatentSpace(scale=1.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More would wait for each other at every small operator, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(model, count: int) -> list[tuple]:
    """What the loader gives `train.train`, with an outcome in each image's place (`Encoded`)."""
    generator = torch.Generator().manual_seed(7)
    _, _, labels, cls_token = inputs(model, batch=3)
    shapes = (3, 2 * model.in_channels, 8, 8), cls_token.shape, (3, 17, *model.config["z_dims"])
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]
    return [([{"class_token": token, "targets": targets}], moments, labels) for moments, token, targets in drawn]


def train_plainly(model, data: list[tuple], args) -> list[float]:
    """The steps of `train.train` in eager PyTorch, one parameter after the other."""
    ema, objective, losses = deepcopy(model), SILoss(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0, foreach=False, fused=False)
    for step, ((encoded,), moments, labels) in enumerate(data):
        train.reseed(args.seed, step, 0, 0)
        terms = objective(model, SPACE.sample(moments), dict(y=labels), [encoded["targets"]], encoded["class_token"])
        total = weighted(terms, args.cls, args.proj_coeff)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.data.mul_(args.ema_decay).add_(parameter.data, alpha=1 - args.ema_decay)
    return losses + [parameter.double().norm().item() for parameter in ema.parameters()]


@pytest.fixture(scope="module")
def compiled() -> tuple[dict, tuple, list[float], list[float]]:
    """Golden vectors, what the compiled and checkpointed network gives for them, and how it trains and should.

    In training mode, so that one compilation serves both.
    """
    v, args = vectors("reg_forward"), train.parse_args(["--learning-rate", "1e-3", "--ema-decay", "0.9"])
    model, data, losses = released_model(v).train(), batches(released_model(v), 10), []
    plainly = train_plainly(deepcopy(model), data, args)
    model.checkpointing = True
    assert compile_parts(model)
    model.y_embedder.eval()                                       # drops no label
    outputs = model(tensor(v["x"]), tensor(v["t"]), tensor(v["y"]), tensor(v["cls_token"]))
    model.y_embedder.train()

    AcceleratorState._reset_state(reset_partial_state=True)
    ema, run = deepcopy(model), disk.Run(0, len(data), StopRequest())
    run.every((1,), lambda step: losses.append(run.meter.read(lambda rows: rows, 3)[0]["loss"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0, fused=True)
    train.train(args, run, iter(data), SPACE, [Encoded], ClassLabels(5), model, ema, SILoss(compile=True),
                optimizer, Accelerator(cpu=True))
    return v, outputs, losses + [parameter.double().norm().item() for parameter in ema.parameters()], plainly


def test_golden_vectors_hold_when_compiled(compiled):
    v, (velocity, projected, cls_velocity), _, _ = compiled
    for ours, name in ((velocity, "out"), (projected[0], "zs0"), (cls_velocity, "cls_out")):
        assert distance(ours, v[name]) < FORWARD


def test_compiled_and_checkpointed_steps_are_the_plain_ones(compiled):
    """Losses of ten steps and the norms of the averaged weights: the fast path only rounds in another order."""
    fast, plainly = (torch.tensor(numbers) for numbers in compiled[2:])
    assert plainly[:10].std() > 0.01                              # from batch to batch the losses differ by more
    torch.testing.assert_close(fast, plainly, rtol=1e-5, atol=0)


def test_checkpointing_keeps_less_and_gives_the_same_gradient():
    model = randomised(small(class_dropout_prob=0.0)).train()
    x, t, y, c = inputs(model, batch=4)

    def gradient_and_kept() -> tuple[torch.Tensor, int]:
        kept = []
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.nbytes) or saved, lambda s: s):
            total = SILoss()(model, x, dict(y=y), None, c, t, x.flip(-1), c.flip(-1)).denoising.mean()
        total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), sum(kept)

    whole, kept = gradient_and_kept()
    model.checkpointing = True
    again, kept_less = gradient_and_kept()
    assert torch.equal(whole, again) and kept_less < kept / 2


# ---- nothing in the way

def test_no_graph_breaks(encoder_folder, vae_folder):
    """SiT with its loss, the encoder and the halves of the VAE are one graph each."""
    model = randomised(small()).train()
    ((encoded,), moments, labels), = batches(model, 1)
    encoder, = load_encoders(f"local-dir:{encoder_folder}", "cpu", 32)
    vae, objective = load_codec(str(vae_folder)).vae, SILoss()
    assert vae.config.mid_block_add_attention

    def loss():
        return weighted(objective(model, moments[:, :3], dict(y=labels), [encoded["targets"]], encoded["class_token"]),
                        beta=0.03, lam=0.5)

    for function, args in ((loss, ()), (encoder.preprocess, (torch.zeros(2, 3, 64, 64, dtype=torch.uint8),)),
                           (encoder.model.forward_features, (torch.zeros(2, 3, 32, 32),)),
                           (vae.encoder, (torch.zeros(2, 3, 32, 32),)), (vae.decoder, (torch.zeros(2, 4, 8, 8),))):
        torch._dynamo.reset()
        found = torch._dynamo.explain(function)(*args)
        assert found.graph_break_count == 0 and found.graph_count == 1, found.break_reasons


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")


class NoReading(TorchDispatchMode):
    """Refuse what makes the host wait for the device: reading numbers, and shapes that depend on values."""

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()                       # a CPU's tensors are read without an operator
        for name in READS:
            self.patches.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"{name} waits"))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "aten.nonzero", "is_nonzero", "masked_select", "aten.unique", "aten.equal")
        masks = args[1] if str(function).startswith("aten.index.Tensor") else ()
        if any(name in str(function) for name in waits) or any(m is not None and m.dtype == torch.bool for m in masks):
            pytest.fail(f"{function} waits")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", ["item", "tolist", "cpu", "numpy", "__bool__", "__float__"])
def test_reading_is_noticed(read):
    with NoReading(), pytest.raises(pytest.fail.Exception, match="waits"):
        getattr(torch.ones(()), read)()


class Scaled(Accelerator):
    """Accelerate scales losses on a GPU only; on a CPU it takes a scaler, too."""

    def unscale_gradients(self, optimizer):
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)


@pytest.mark.parametrize(("checkpointing", "cached", "scaled"), [
    (False, False, False), (True, False, False), (False, True, True)])
def test_a_step_waits_for_nothing(encoder_folder, checkpointing, cached, scaled):
    """Images travel to the encoder as bytes; two steps of two micro-batches, from the batch to the meter."""
    args = train.parse_args(["--gradient-accumulation-steps", "2"])
    accelerator = Scaled(cpu=True, mixed_precision="bf16")
    encoders = load_encoders(f"local-dir:{encoder_folder}", "cpu", 32, grid=4)
    seen = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    if cached:
        record = FeaturesRecord("", "", None, 32, grid=4, width=32, class_token=True, dtype="float16")
        encoders = [CachedEncoder(record, 4)]
        seen = {"class_token": torch.ones(4, 32), "patches": torch.ones(4, 16, 32).half()}
    model = small(in_channels=4, cls_token_dim=32, z_dims=(32,))
    model.checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if scaled:
        accelerator.scaler = torch.amp.GradScaler("cpu")
    batch = [seen], torch.rand(4, 8, 8, 8), torch.tensor([0, 1, 2, 3])
    with NoReading():
        train.train(args, disk.Run(0, 2, StopRequest()), iter(4 * [batch]), SPACE, encoders, ClassLabels(5), model,
                    deepcopy(model), SILoss(), optimizer, accelerator)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_training_on_a_cpu_keeps_memory():
    """A block of 64 MiB is filled without page faults, unless the heap has grown: the best of twenty tells.

    In a process of its own: a heap has a history.
    """
    code = """import resource, torch, train
train.open_accelerator(train.resolve(train.parse_args(["--mixed-precision", "no"])))
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True,
                          capture_output=True, text=True)
    assert int(done.stdout.splitlines()[-1]) < 100                                         # 64 MiB are 16,384 pages


# ---- the compiler

def test_what_is_compiled(train_flags, encoder_folder, vae_folder):
    """Of SiT blocks, projectors and final layer; of an encoder its blocks and what precedes them; a VAE's halves."""
    encoder, = load_encoders(f"local-dir:{encoder_folder}", "cpu", 32)
    args = train.resolve(train.parse_args([*train_flags, "--compile", "--activation-checkpointing"]))
    model, *_ = train.open_networks(args, LatentSpace(downsampling=4), 32, ClassLabels(3), [encoder],
                                    torch.device("cpu"))
    vae = load_codec(str(vae_folder)).vae
    assert model.checkpointing and compile_parts(vae)
    compiled = {name for network in (model, encoder, vae) for name, module in network.named_modules()
                if module._compiled_call_impl is not None}
    assert compiled == {*(f"blocks.{i}" for i in range(6)), "projectors.0", "final_layer", "preprocess",
                        "model.blocks.0", "model.blocks.1", "encoder", "decoder"}


def test_without_a_compiler_training_continues_with_one_warning(capsys, tmp_path):
    compiler_works.cache_clear()
    torch._dynamo.reset()
    try:
        with inductor.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "force_disable_caches": True}):
            model = small()
            assert not compile_parts(model) and not compile_parts(model)
    finally:
        compiler_works.cache_clear()
    assert capsys.readouterr().err.count("torch.compile does not work here") == 1
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_all_processes_are_given_the_same_kernels():
    with inductor.patch(deterministic=False):
        choose_same_kernels()
        assert inductor.deterministic
