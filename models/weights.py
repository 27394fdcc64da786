"""What files of others are checked for before a network is built from them: record, architecture, weights.

A record is a checkpoint's content (models/checkpoint.py) or a part of it.
"""

import argparse
import datetime
import inspect
import math
import re
from pathlib import Path, PurePath

import numpy as np
import torch
from torch import nn

from models.vae import LatentSpace
from runtime.catalogue import MAX_CLASSES
from runtime.messages import UserError
from runtime.run import Damaged
from runtime.stores import shown

# Types of the entries, where a file has them. `draws` counted batches in older checkpoints, whose `steps` left skipped
# ones out.
KINDS = {"args": dict | argparse.Namespace, "steps": int, "draws": int, "processes": int, "architecture": dict,
         "data": str, "encoders": list, "classes": list, "scores": list, "text": dict, "model": dict, "ema": dict,
         "opt": dict, "scaler": dict | None}
LARGEST = MAX_CLASSES                # of any number in an architecture


def require_record(path: Path, state: dict, network: type[nn.Module]) -> None:
    """Raise Damaged or UserError unless the entries of `state` are what they should be, and those of `network`.

    Settings of other types than JSON's become text.
    """
    for name, kind in KINDS.items():
        value = state.get(name)
        if name in state and (not isinstance(value, kind) or kind is int and not 0 <= value < 2**63):
            expected = "a number of at least 0" if kind is int else getattr(kind, "__name__", kind)
            raise Damaged(f"{path}: {name} is of type {type(value).__name__}, expected {expected}; use another file")
    for name, kind in (("encoders", str), ("classes", int), ("scores", list)):
        if not all(type(one) is kind and (kind is not int or 0 <= one < MAX_CLASSES) for one in state.get(name, ())):
            raise Damaged(f"{path}: {name} holds other things than {kind.__name__}; use another file")
    if "args" in state:
        args = state["args"] if isinstance(state["args"], dict) else vars(state["args"])
        state["args"] = {str(name): _as_json(value) for name, value in args.items()}
    if "architecture" in state:
        _require_architecture(path, state["architecture"], network)
    if "latent_space" in state:
        LatentSpace.from_record(state["latent_space"], str(path))
    if "text" in state:
        _require_text(path, state["text"])
        if "architecture" in state and state["architecture"].get("context_dim") != state["text"]["width"]:
            raise Damaged(f"{path}: its network and its text encoder do not fit; use another file")


def _as_json(value: object) -> str | int | float | bool | None:
    """A setting as JSON has it; of a type that no setting has, its name."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str | int | float | None):
        return value
    written = isinstance(value, PurePath | torch.device | torch.dtype | datetime.date | datetime.timedelta)
    return str(value) if written else type(value).__name__


def _require_text(path: Path, found: dict) -> None:
    """Raise Damaged unless this names a text encoder and holds the states of its empty caption."""
    null, shape = found.get("null"), (found.get("length"), found.get("width"))
    named = all(isinstance(found.get(name), str) for name in ("encoder", "sha256"))
    if not (named and isinstance(null, torch.Tensor) and null.ndim == 2 and null.shape == shape):
        raise Damaged(f"{path}: does not describe its text encoder; use another file")
    plain_weights({"null": null})


def _require_architecture(path: Path, found: dict, network: type[nn.Module]) -> None:
    """Raise Damaged unless these are a network's constructor arguments, each of its type and a possible number."""

    def fits(value: object, kind: type) -> bool:
        if kind == tuple[int, ...]:
            return isinstance(value, list | tuple) and len(value) < 100 and all(fits(one, int) for one in value)
        if kind is bool or value is None:
            return isinstance(value, kind)
        return type(value) is int and 0 < value <= LARGEST or kind is type(value) is float and 0 <= value <= LARGEST

    kinds = {name: one.annotation for name, one in inspect.signature(network.__init__).parameters.items()
             if name != "self"}
    wrong = [name for name, kind in kinds.items() if name not in found or not fits(found[name], kind)]
    if wrong or found.keys() != kinds.keys():
        raise Damaged(f"{path}: the architecture is not described by the arguments of {network.__name__} ("
                      f"{', '.join(wrong) or 'it has others'}); use another file")


def is_state_dict(state: dict) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


def plain_weights(state: dict) -> dict[str, torch.Tensor]:
    """A state dict without DataParallel's prefix `module.` and torch.compile's `_orig_mod.`, wherever they are.

    Raises UserError for what is no dense tensor, for tensors that claim more numbers than are stored, and if two
    entries have one name.
    """
    plain, claimed, stored = {}, 0, {}
    for name, tensor in state.items():
        if (not is_state_dict({name: tensor}) or tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta
                or tensor.is_quantized or tensor.is_complex() or not tensor.numel()):
            raise UserError(f"{shown(str(name))} is no plain tensor (dense, real, not empty): name another file")
        storage = tensor.untyped_storage()
        claimed, stored[storage.data_ptr()] = claimed + tensor.numel() * tensor.element_size(), storage.nbytes()
        plain[re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", name)] = tensor
    if len(plain) < len(state):
        raise UserError("two of the weights have one name without the prefixes module. and _orig_mod.: name another "
                        "file")
    if claimed > sum(stored.values()):
        raise UserError("the weights claim more numbers than are stored: name another file")
    broken = next((name for name, tensor in plain.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{shown(broken)} holds numbers that are not finite: name another file or checkpoint")
    return plain


def sizes_in(weights: dict[str, torch.Tensor]) -> dict:
    """The constructor arguments that the weights' shapes tell: all but the number of heads and training's.

    Raises UserError if they are no weights of SiT or MMDiT.
    """
    try:
        _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        _, tokens, width = weights["pos_embed"].shape
        if "context_embedder.weight" in weights:
            own = {"context_dim": weights["context_embedder.weight"].shape[1]}
        else:
            own = {"num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1}
        slot = weights["cls_embedder.weight"].shape[1] if "cls_embedder.weight" in weights else None
        side = math.isqrt(tokens - (slot is not None))
    except KeyError as error:
        raise UserError(f"the checkpoint lacks {error.args[0]}: it is no SiT or MMDiT of REG, REPA or this program"
                        ) from None
    except (ValueError, IndexError, TypeError):
        raise UserError("the checkpoint's embeddings have other dimensions than SiT's: name another file") from None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {"hidden_size": width, "depth": depth, "patch_size": patch, "in_channels": channels, **own,
            "input_size": side * patch, "cls_token_dim": slot,
            "qk_norm": any(f"blocks.0.attn.{name}.weight" in weights for name in ("q_norm", "norm_q"))}


def build(network: type[nn.Module], architecture: dict, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The network with its weights, in evaluation mode, on the CPU.

    Raises UserError if the weights have other sizes than the architecture says: it is never larger than its file.
    """
    found = sizes_in(weights)
    for name, size in found.items():
        if size != architecture[name]:
            raise UserError(f"the checkpoint's architecture says {name} {architecture[name]}, its weights {size}: use "
                            "another file")
    try:
        with torch.device("meta"):                                # nothing is allocated until the shapes agree
            model = network(**architecture)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError("the checkpoint's architecture cannot be built "
                        f"({error or architecture}): use another file") from error
    load_strictly(model, weights)
    return model.eval()


def load_strictly(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load weights whose names and shapes are the model's. Projectors are dropped if the model has none.

    A model on the meta device is moved to the CPU. Raises UserError naming the first wrong key and the likely cause.
    """
    if not len(model.projectors):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("projectors.")}
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        here, there = expected.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            found = "absent" if there is None else f"of shape {tuple(there.shape)}"
            wanted = "no such parameter" if here is None else f"shape {tuple(here.shape)}"
            doubled = name.startswith("final_layer.linear.") and there is not None and len(there) == 2 * len(here)
            raise UserError(f"{shown(name)} is {found} in the checkpoint, the model has {wanted}: "
                            f"{LEARN_SIGMA if doubled else _likely_cause(name)}")
    if model.pos_embed.is_meta:
        model.to_empty(device="cpu")
    model.load_state_dict(weights)


LEARN_SIGMA = ("it predicts a variance, too (learn_sigma of SiT's and DiT's own releases, whose time runs otherwise); "
               "use a checkpoint of REG, REPA or this program")
CAUSES = {
    ("cls_embedder", "cls_norm", "final_layer.linear_cls"):
        "only one of them has a class-token slot (REG) of this width; choose the same --method and --enc-type",
    ("pos_embed",): "the resolution, the patch size or the class-token slot differs; choose the "
                    "same --model and --method",
    ("y_embedder",): "the number of classes differs, or one of them has captions; choose the same --num-classes and "
                     "--model",
    ("context_embedder",): "the text encoder's width differs, or one of them has class labels; choose the same "
                           "--text-encoder and --model",
    ("projectors",): "the encoders, --projector-dim or --proj-coeff differ; choose those of the checkpoint",
    ("x_embedder", "final_layer"):
        "the patch size, width or number of latent channels differs; choose the same --model and VAE",
}


def _likely_cause(name: str) -> str:
    """The most common mistake when this parameter does not fit."""
    usual = "only one of them has --qk-norm" if "_norm" in name else "the model's size differs; choose the same --model"
    return next((cause for prefixes, cause in CAUSES.items() if name.startswith(prefixes)), usual)
