"""Frozen text encoders from transformers: captions -> states, for models/mmdit.py.

CLIP's text tower gives its last hidden states after the final norm, as in Stable Diffusion; T5's encoder its last ones.
Padding is attended by MMDiT: the states always have the encoder's length.
"""

import hashlib
import json

import torch

from models.encoders import sha256_of_parameters
from runtime.messages import UserError, notice

DEFAULT = "openai/clip-vit-large-patch14"
T5_LENGTH = 128              # tokens; T5's positions are relative
MAX_LAYERS = 256             # of an encoder; published ones have up to 48
T5_FAMILY = ("t5", "mt5", "umt5")


def states_shape(name: str, length: int | None = None, flag: str = "--text-encoder") -> tuple[str, int, int]:
    """What `name`'s config.json says: kind of encoder, tokens L per caption (`length` if given) and width W of a state.

    Raises UserError if it cannot be read, is no text encoder of CLIP's or T5's kind, or has fewer positions.
    """
    if name == DEFAULT:                                           # so that a dry run needs no network
        kind, longest, width = "clip", 77, 768
    else:
        config, = load_pretrained(name, flag, "AutoConfig")
        kind, text = config.model_type, getattr(config, "text_config", config)
        if kind not in ("clip", "clip_text_model", *T5_FAMILY):
            raise UserError(f"{flag} {name}: is a {kind}; give a CLIP or a T5 encoder")
        if (layers := _most_layers(config.to_dict())) > MAX_LAYERS:
            raise UserError(f"{flag} {name}: its config.json asks for {layers} layers; give another encoder")
        longest, width = getattr(text, "max_position_embeddings", None), text.hidden_size
    if longest is not None and length is not None and length > longest:
        raise UserError(f"--text-length {length}: {name} has {longest} positions; give at most {longest}")
    return kind, length or longest or T5_LENGTH, width


def load_pretrained(name: str, flag: str, *parts: str) -> list:
    """Parts of a folder, of the hub's cache or of the hub, by their classes in transformers; networks in float32.

    Weights are read from safetensors, and code is never taken from there. Raises UserError if a part is missing,
    incomplete or damaged.
    """
    import transformers  # slow to import, and needed for captions only

    transformers.utils.logging.set_verbosity_error()              # CLIP's image tower is "unexpected" in a long table
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = [getattr(transformers, part).from_pretrained(name, trust_remote_code=False)
                  for part in parts if part.startswith("Auto")]
        for part in parts[len(loaded):]:                          # networks, behind their tokenizer
            network, found = getattr(transformers, part).from_pretrained(name, use_safetensors=True,
                                                                         dtype=torch.float32, output_loading_info=True)
            if found["missing_keys"]:
                raise ValueError(f"no weight {min(found['missing_keys'])}")
            loaded.append(network.eval().requires_grad_(False))
            words = getattr(network.config, "text_config", network.config).vocab_size
            if 2 * len(loaded[0]) < words:                        # transformers makes an empty one of missing files
                raise ValueError(f"a tokenizer of {len(loaded[0])} tokens; its files are missing")
    except Exception as error:                                    # damaged files can make transformers raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag} {name}: cannot be loaded ({reason}); give a hub id, or a folder with config.json, "
                        "weights (safetensors) and tokenizer files") from error
    return loaded


def _most_layers(config: dict) -> int:
    """The largest number of layers in a config: transformers builds each before it looks at the weights."""
    return max((_most_layers(value) if isinstance(value, dict) else value for name, value in config.items()
                if isinstance(value, dict) or isinstance(value, int) and "layers" in name), default=0)


def tokenize(tokenizer, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Captions (n) -> token ids (n, L), their mask (n, L), and how many captions are cut to the length L."""
    found = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    full = found.attention_mask.all(dim=1).any()                  # only a caption without padding can have been longer
    cut = sum(len(ids) > length for ids in tokenizer(captions).input_ids) if full else 0
    return found.input_ids, found.attention_mask, cut


class TextEncoder:
    """A frozen text encoder on its device.

    Attributes: `name`, hub id or folder; `length` L, tokens per caption; `width` W of a state; `sha256` of weights
    and vocabulary.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", length: int | None = None):
        """Load tokenizer and weights from a folder, the hub's cache or the hub; bf16 on CUDA, else float32.

        Raises UserError as `states_shape` and `load_pretrained`.
        """
        self.name = name
        kind, self.length, self.width = states_shape(name, length)
        self.masked, self.truncated = kind in T5_FAMILY, False
        network = f"{kind.upper()}EncoderModel" if self.masked else "CLIPTextModel"
        self.tokenizer, self.network = load_pretrained(name, "--text-encoder", "AutoTokenizer", network)
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        self.sha256 = hashlib.sha256(f"{sha256_of_parameters(self.network)} {vocabulary}".encode()).hexdigest()
        self.network.to(device, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)

    @torch.no_grad()
    def states(self, captions: list[str]) -> torch.Tensor:
        """Captions (n) -> states (n, L, W), float32 on the device. Says once that captions are cut to L tokens."""
        tokens, mask, cut = tokenize(self.tokenizer, captions, self.length)                   # (n, L), (n, L)
        if cut and not self.truncated:
            self.truncated = True
            notice(f"captions of more than {self.length} tokens are cut to what {self.name} reads")
        device = self.network.device
        if device.type == "cuda":                                 # from other memory a copy would wait for the device
            tokens, mask = tokens.pin_memory(), mask.pin_memory()
        tokens, mask = (one.to(device, non_blocking=True) for one in (tokens, mask))
        with torch.autocast(device.type, enabled=False):          # the same states in training and sampling
            found = self.network(input_ids=tokens, attention_mask=mask if self.masked else None)
        return found.last_hidden_state.float()                                                # (n, L, W)
