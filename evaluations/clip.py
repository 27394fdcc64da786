"""CLIP score: 100 max(0, cos(image, caption)) of a CLIP's embeddings, averaged over the images.

Hessel et al., arXiv 2104.08718, without their factor 2.5. Letters: N images, B batch, L tokens, P embedding width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from evaluations.extraction import PIECE, all_threads, measure
from evaluations.features import Extractor
from evaluations.images import ImageSet
from evaluations.metrics import side_by_side
from models.encoders import sha256_of_parameters
from models.text import load_pretrained, states_shape, tokenize
from runtime.files import read_patiently
from runtime.messages import UserError, notice
from runtime.speed import full_precision
from runtime.stores import parse_json

METRIC = "clip_score"


class Clip(torch.nn.Module):
    """A CLIP in float32 with its own tokenizer and image processor: uint8 (B, 3, H, W) -> embeddings (B, P)."""

    def __init__(self, name: str):
        """Load a folder, or a hub id's cache or download. Raises UserError if it is no CLIP, incomplete or damaged."""
        super().__init__()
        kind, self.length, _ = states_shape(name, flag="--clip")
        if kind != "clip":
            raise UserError(f"--clip {name}: is a {kind}; give a CLIP with its image tower")
        self.tokenizer, self.processor, self.network = load_pretrained(name, "--clip", "AutoTokenizer",
                                                                       "AutoImageProcessor", "CLIPModel")
        self.name = Path(name).resolve().name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.processor(images=list(images.cpu()), return_tensors="pt").pixel_values.to(images.device)
        return self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def of_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) -> embeddings (B, P). Padding needs no mask: it follows the end token, which is the text."""
        return self.network.text_projection(self.network.text_model(input_ids=tokens).pooler_output)


def read_captions(sample: Path, file: Path | None, count: int | None) -> list[str]:
    """Captions of `sample`, from `file`, else from captions.jsonl beside it or, of a folder, in it or beside it.

    Raises UserError unless it has `count` lines {"index": i, "caption": "..."} in order; the index may be left out.
    """
    places = [folder / "captions.jsonl" for folder in (sample, sample.parent)]
    path, captions = file or next(filter(Path.is_file, places), places[1]), []
    if not path.is_file():
        raise UserError(f"{path}: not found, and --clip needs captions; name their file with --captions")
    for i, line in enumerate(read_patiently(path.read_bytes, str(path)).rstrip().split(b"\n")):
        entry = parse_json(line, f"{path}: line {i + 1}")
        text = entry.get("caption") if isinstance(entry, dict) and entry.get("index", i) == i else None
        if not isinstance(text, str):
            raise UserError(f'{path}: line {i + 1} is not {{"index": {i}, "caption": "..."}}; correct it')
        captions.append(text)
    if len(captions) != count:
        raise UserError(f"{path}: {len(captions)} captions for {count or 'no'} images; name the file of the same run")
    return captions


def clip_score(images: ImageSet, captions: list[str], clip: Clip, device: torch.device, batch_size: int) -> dict | None:
    """The score of images with their captions (N) and the weights' hash, on the first process; None on others."""
    network = Extractor(clip.to(device), device, clip.name, sha256_of_parameters(clip), None)
    seen = measure(images, network, batch_size, {"pooled"}).pooled                # (N, P)
    if seen is None:
        return None
    tokens, _, cut = tokenize(clip.tokenizer, captions, clip.length)              # (N, L)
    pieces = tokens.to(device).split(PIECE if device.type == "cpu" else 256)
    if cut:
        notice(f"{cut} of {len(captions)} captions are cut to the {clip.length} tokens that {clip.name} reads")
    with full_precision(device), all_threads():
        read = torch.cat(side_by_side(clip.of_text, pieces, device))
    cosines = F.cosine_similarity(seen.double(), read.double()).clamp(min=0).cpu()       # (N,)
    return {f"{METRIC}_{clip.name}": float(100 * cosines.numpy().mean()), "clip_weights_sha256": network.weights_sha256}
