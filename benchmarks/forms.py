"""Other exact forms of a block's parts beside those in use: attention, norm, GELU, one CUDA graph: `--only forms`.

257 tokens fill tiles for 320 or 384 in attention kernels, and a compiled norm reads XL's rows twice. Each row says how
long a form takes, and its time over that of the form in use.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from benchmarks import harness
from benchmarks.sampling import evaluate, random_inputs, random_network
from generate import make_ready
from models.sit import SiT_models, modulate
from models.vae import LatentSpace

SIZES = {"cuda": {"model": "SiT-XL/2", "batch_size": 64, "compile": True},
         "cpu": {"model": "SiT-S/2", "batch_size": 4, "compile": False}}
# Settings of PyTorch's inductor for the norm.
NORMS = {"coordinate descent": {"coordinate_descent_tuning": True}, "several kernels": {"triton.multi_kernel": 1}}
Function = Callable[..., torch.Tensor]


def queries_apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of (B, heads, 1+N, d) each, with the class token's query apart from the patches'."""
    rows = [F.scaled_dot_product_attention(part, k, v) for part in (q[:, :, :1], q[:, :, 1:])]
    return torch.cat(rows, dim=2)                                                         # (B, heads, 1+N, d)


def keys_apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flex: Function = flex_attention) -> torch.Tensor:
    """`queries_apart` with N keys for the patches, whose result and the class token's value are mixed.

    The class token's share is exp(a) / (exp(a) + exp(b)) = sigmoid(a - b), with a the score of its key and b the
    logarithm of the sum over the patches' keys.
    """
    patches, more = flex(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], return_aux=AuxRequest(lse=True))  # (B, heads, N, d)
    score = (q[:, :, 1:] * k[:, :, :1]).sum(dim=-1).float() * q.shape[-1] ** -0.5         # (B, heads, N)
    share = torch.sigmoid(score - more.lse).unsqueeze(-1).to(v.dtype)                     # (B, heads, N, 1)
    first = F.scaled_dot_product_attention(q[:, :, :1], k, v)                             # (B, heads, 1, d)
    return torch.cat([first, torch.lerp(patches, v[:, :, :1], share)], dim=2)             # (B, heads, 1+N, d)


def patches_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What SiT computes: attention of the N patches, without the class token."""
    return F.scaled_dot_product_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])          # (B, heads, N, d)


def norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A block's modulated norm: x (B, T, D), shift and scale (B, D)."""
    return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)                # (B, T, D)


def gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The first half of a block's MLP, x (B, T, D)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")                          # (B, T, 4 D)


def gelu_in_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`gelu` as one product of cuBLASLt. On a CPU PyTorch takes GELU's exact form here, up to 5e-4 away."""
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])


def forward(form: Function, inputs: list[torch.Tensor]) -> None:
    with torch.no_grad():
        form(*(one.detach() for one in inputs))


def both_ways(form: Function, inputs: list[torch.Tensor]) -> None:
    """The form and its gradients."""
    torch.autograd.grad(form(*inputs).sum(), inputs)


def measure(device: torch.device, model: str, batch_size: int, compile: bool, resolution: int = 256,
            repeats: int = 20) -> harness.Table:
    """The table: parts of one block on `batch_size` images, and the whole network without gradients."""
    size, space, bf16 = SiT_models[model].keywords, LatentSpace(), harness.has_fast_bf16(device)
    side, width, heads = resolution // space.downsampling, size["hidden_size"], size["num_heads"]
    tokens, precision = 1 + (side // size["patch_size"]) ** 2, "bf16" if bf16 else "fp32"
    table = harness.Table("forms", {"model": model, "batch_size": batch_size, "tokens": tokens, "compile": compile,
                                    "precision": precision}, device)

    def compiled(function: Function, **options: object) -> Function:
        return torch.compile(function, dynamic=False, options=options) if compile else function

    def compare(part: str, forms: dict[str, Callable[[], object]]) -> None:
        seconds = harness.timed(forms, device, repeats)
        for name, taken in seconds.items():
            share = median(taken) / median(seconds["in use"])
            table.add(f"{part}, {name}", {"ours": taken}, formula=f"{share:.3f} of the form in use")

    network, whole = (random_network(model, side, space.channels, device) for _ in range(2))
    make_ready(network, device, precision, compile)
    make_ready(whole, device, precision, compiled=False)
    graph = torch.compile(whole, dynamic=False, mode="reduce-overhead") if compile else whole
    given = random_inputs(network, batch_size)
    compare("network", {"in use": partial(evaluate, network, precision, given),
                        "one CUDA graph": partial(evaluate, graph, precision, given)})

    random = partial(torch.randn, device=device, dtype=torch.bfloat16 if bf16 else torch.float32, requires_grad=True)
    q, k, v = (random(batch_size, heads, tokens, width // heads) for _ in range(3))
    x, shift, scale = random(batch_size, tokens, width), random(batch_size, width), random(batch_size, width)
    weight, bias = random(4 * width, width), random(4 * width)
    use = {"in use": F.scaled_dot_product_attention}
    norms = {"in use": compiled(norm)} | {name: compiled(norm, **options) for name, options in NORMS.items()}
    gelus = {"in use": compiled(gelu), "in the product": gelu_in_product}
    apart = use | {"SiT's": patches_alone, "queries apart": queries_apart}
    flex = use | {"keys apart": partial(keys_apart, flex=compiled(flex_attention))}
    plan = [("attention", apart, [q, k, v], forward), ("attention and gradients", apart, [q, k, v], both_ways),
            ("norm and gradients", norms, [x, shift, scale], both_ways), ("GELU", gelus, [x, weight, bias], forward),
            ("attention by flex_attention", flex, [q, k, v], forward)]
    if device.type == "cuda":                                     # on a CPU it has no gradients
        plan.append(("attention by flex_attention and gradients", flex, [q, k, v], both_ways))
    for part, forms, inputs, run in plan:
        compare(part, {name: partial(run, form, inputs) for name, form in forms.items()})
    return table
