"""A model of the step time on many GPUs: `python -m benchmarks.scaling` prints the table of SCALING.md. Computed, not measured.

A step on one of N GPUs is the longest of computing, the host's launches and the loader, plus what of the all-reduce the backward pass does
not hide, however long that takes.
"""

import argparse
from dataclasses import dataclass

# FLOPs of one image with its encoder, 256 px, forward and backward (benchmarks.train_step counts them), trained parameters, blocks.
MODELS = {"B/2": (196.2e9, 139.0e6, 12), "L/2": (544.6e9, 467.5e6, 24), "XL/2": (773.5e9, 685.0e6, 28)}
ENCODER = 46.3e9                 # of these FLOPs, the frozen encoder's, which has no backward pass


@dataclass(frozen=True)
class Machine:
    """What is assumed. Bytes/s are one direction of one GPU."""

    peak: float = 790e12         # bf16 FLOP/s
    share: float = 0.5           # of it that the step reaches: XL/2 on one H200 (RESULTS.md)
    per_node: int = 8            # GPUs
    nvlink: float = 0.8 * 450e9  # inside of a node
    network: float = 0.8 * 50e9  # between nodes: 400 Gbit/s for each GPU
    block: int = 86              # launches of a block, with its share of AdamW and EMA; as counted there for XL/2 and B/2
    others: int = 707            # of encoder, projector, losses, metering
    launch: float = 5e-6         # seconds that the host needs for one
    loader: float = 5000         # images/s for each GPU, fed by 16 cores


def step_time(model: str, gpus: int, batch: int, machine: Machine = Machine()) -> dict[str, float]:
    """Seconds of one step with `batch` images over all GPUs, and of its parts."""
    flops, parameters, blocks = MODELS[model]
    images, nodes, gradient = batch / gpus, max(1, gpus // machine.per_node), 4 * parameters               # float32
    compute = images * flops / (machine.share * machine.peak)
    inside = min(gpus, machine.per_node)
    # Reduce-scatter inside of a node, all-reduce of each GPU's part between nodes, all-gather inside: 2 (n-1)/n of the bytes each.
    exchange = (2 * (inside - 1) / inside * gradient / machine.nvlink
                + 2 * (nodes - 1) / nodes * gradient / inside / machine.network)
    host = (machine.block * blocks + machine.others) * machine.launch
    backward = 2 / 3 * (flops - ENCODER) / flops * max(compute, host)                                     # while gradients travel
    exposed, data = max(0.0, exchange - backward), images / machine.loader
    return {"step": max(compute, host, data) + exposed, "compute": compute, "host": host, "data": data, "exchange": exchange,
            "exposed": exposed}


def table() -> str:
    """Markdown: the paper's batch of 256 over all GPUs, and 32 images for each GPU."""
    lines = ["| model | GPUs | batch | compute ms | host ms | data ms | all-reduce ms, of it exposed | step ms | images/s | efficiency |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for model in MODELS:
        alone = 32 / step_time(model, 1, 32)["step"]
        for gpus, batch in ((8, 256), (64, 256), (256, 256), (64, 64 * 32), (256, 256 * 32)):
            found = step_time(model, gpus, batch)
            ms = {name: f"{1000 * seconds:.1f}" for name, seconds in found.items()}
            rate = batch / found["step"]
            lines.append(f"| {model} | {gpus} | {batch} | {ms['compute']} | {ms['host']} | {ms['data']} "
                         f"| {ms['exchange']}, {ms['exposed']} | {ms['step']} | {rate:,.0f} | {100 * rate / (gpus * alone):.0f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description="Print the computed table of SCALING.md.").parse_args()
    print(table())
