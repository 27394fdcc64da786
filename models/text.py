"""Frozen text encoders from transformers: captions -> states, for models/mmdit.py.

CLIP's text tower gives its last hidden states after the final norm, as in Stable Diffusion; T5's encoder its last ones.
Padding is attended by MMDiT: the states always have the encoder's length.
"""

from pathlib import Path

import torch

from runtime.messages import UserError, notice

CLIP_LENGTH = 77             # tokens of CLIP's position table
T5_LENGTH = 128
T5_FAMILY = ("t5", "mt5", "umt5")


class TextEncoder:
    """A frozen text encoder on its device.

    Attributes: `name`, hub id or folder; `length` L, tokens per caption; `width` W of a state.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", length: int | None = None):
        """Load tokenizer and weights from a folder, the hub's cache or the hub; bf16 on CUDA, else float32.

        Raises UserError if a file is missing or damaged, or if it is no text encoder of CLIP's or T5's kind.
        """
        import transformers  # slow to import, and needed for captions only

        transformers.utils.logging.set_verbosity_error()          # CLIP's image tower is "unexpected" in a long table
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            kind = config.model_type
            if kind in ("clip", "clip_text_model"):
                network = transformers.CLIPTextModel
            elif kind in T5_FAMILY:
                network = getattr(transformers, f"{kind.upper()}EncoderModel")
            else:
                raise UserError(f"--text-encoder {name}: a {kind}; give a CLIP or a T5 encoder")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.network, found = network.from_pretrained(name, use_safetensors=True, dtype=torch.float32,
                                                          output_loading_info=True)
            if found["missing_keys"]:
                raise UserError(f"--text-encoder {name}: lacks {len(found['missing_keys'])} weights, for example "
                                f"{min(found['missing_keys'])}; download it again")
        except (OSError, ValueError, RuntimeError) as error:      # UserError is a ValueError
            if isinstance(error, UserError):
                raise
            raise UserError(f"--text-encoder {name}: cannot be loaded ({str(error).strip().splitlines()[0]}); give a "
                            "hub id, or a folder with weights (safetensors) and tokenizer files") from error
        text = getattr(config, "text_config", config)
        longest = getattr(text, "max_position_embeddings", None)  # None: T5, whose positions are relative
        self.length = length or longest or T5_LENGTH
        if longest is not None and self.length > longest:
            raise UserError(f"--text-length {length}: {name} has {longest} positions; give at most {longest}")
        self.name, self.masked, self.truncated = name, kind in T5_FAMILY, False
        self.width = text.d_model if self.masked else text.hidden_size
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.network.eval().requires_grad_(False).to(device, dtype)

    @torch.no_grad()
    def states(self, captions: list[str]) -> torch.Tensor:
        """Captions (n) -> states (n, L, W), float32 on the device. Says once that captions are cut to L tokens."""
        if not self.truncated and any(len(ids) > self.length for ids in self.tokenizer(captions).input_ids):
            self.truncated = True
            notice(f"captions of more than {self.length} tokens are cut to what {self.name} reads")
        tokens = self.tokenizer(captions, padding="max_length", max_length=self.length, truncation=True,
                                return_tensors="pt").to(self.network.device)                 # (n, L) each
        mask = {"attention_mask": tokens.attention_mask} if self.masked else {}
        return self.network(input_ids=tokens.input_ids, **mask).last_hidden_state.float()    # (n, L, W)

    def require_width(self, width: int, length: int, path: Path | str) -> None:
        """Raise UserError unless states are (length, width), as the checkpoint `path` was trained with."""
        if (self.width, self.length) != (width, length):
            raise UserError(f"--text-encoder {self.name}: gives {self.length} states of width {self.width}, {path} was "
                            f"trained with {length} of {width}; use its own text encoder")
