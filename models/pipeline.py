"""REG as a pipeline of diffusers: network and VAE in one folder, sampled by the solvers of samplers.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from models.card import public
from models.conditioning import ClassLabels, Conditions, open_captions
from models.hub import CARD, CONFIG, TRANSFORMER, VAE, HubNetwork, find, save_folder, shift_of, space_of, write_card
from models.mmdit import MMDiT
from models.sit import SiT
from models.text import DEFAULT
from models.vae import WEIGHTS, Codec, load_codec
from runtime.files import read_object
from runtime.messages import UserError
from runtime.stores import shown
from samplers import Sampling, sample_images

Generator = torch.Generator | np.random.Generator


@dataclass
class Pairs(BaseOutput):
    """Samples: `images` as asked for, and the class tokens generated with them (B, E), float32, or None."""

    images: list[Image.Image] | np.ndarray | torch.Tensor
    class_tokens: torch.Tensor | None


class REGPipeline(DiffusionPipeline):
    """Components: `transformer`, a SiT or MMDiT with its `record`, and `vae`, which decodes its latents.

    `text_encoder`: name or folder of the text encoder of an MMDiT; None: as recorded.
    """

    def __init__(self, transformer: HubNetwork, vae: torch.nn.Module, text_encoder: str | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self._text_encoder, self._captions = text_encoder, None

    @classmethod
    def of(cls, transformer: HubNetwork, text_encoder: str | None = None,
           vae: str | Path | None = None) -> "REGPipeline":
        """A pipeline with `vae`, or that of the network's record. Raises UserError if it has another latent space."""
        space = space_of(transformer.record or {})
        codec = load_codec(str(vae or space.decoder))
        codec.use_space(space, "the checkpoint")
        return cls(transformer, codec.vae, text_encoder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, text_encoder: str | None = None,
                        vae: str | Path | None = None, **where) -> "REGPipeline":
        """The pipeline in a folder of `save_pretrained` or in a repository of the hub; of a network's folder, with the
        VAE of the hub that it names. `vae`: another one, hub id or folder.

        diffusers' own loader is not used: it imports what a folder names. `where` and errors: as
        `HubNetwork.from_pretrained`.
        """
        path = find(pretrained_model_name_or_path, **where)
        captions = "context_dim" in str(read_object(path.with_name(CONFIG)).get("architecture"))
        transformer = (MMDiT if captions else SiT).from_pretrained(path)
        own = path.absolute().parent.parent / VAE
        if vae is not None or path.parent.name != TRANSFORMER or not own.is_dir():
            return cls.of(transformer, text_encoder, vae)
        return cls(transformer, load_codec(str(own)).vae, text_encoder)

    push_to_hub = HubNetwork.push_to_hub

    def save_pretrained(self, save_directory: str | Path, *, model_card_kwargs: dict | None = None, config=None):
        """Write model_index.json, transformer/, vae/ and the card; the other arguments are for `push_to_hub`."""
        for old in (CARD, f"{VAE}/{WEIGHTS}.safetensors"):        # an older pipeline is not mixed with this one
            Path(save_directory, old).unlink(missing_ok=True)
        save_folder(self.transformer, Path(save_directory, TRANSFORMER))
        self.vae.register_to_config(_name_or_path=public(self.vae.config.get("_name_or_path", "")))
        self.vae.save_pretrained(Path(save_directory, VAE))
        saved = Path(save_directory, VAE, f"{WEIGHTS}.safetensors")               # readable for its owner alone
        saved.chmod(saved.with_name(CONFIG).stat().st_mode)
        self.save_config(save_directory)
        write_card(self.transformer, Path(save_directory), diffusers=True, **(model_card_kwargs or {}))

    def __call__(self, class_labels: Sequence[int] | int | None = None, prompt: Sequence[str] | str | None = None,
                 num_inference_steps: int = Sampling.num_steps, guidance_scale: float | None = None,
                 class_token_guidance_scale: float | None = None, guidance_interval: tuple[float, float] | None = None,
                 generator: Generator | Sequence[Generator] | None = None, output_type: str = "pil") -> Pairs:
        """Draw an image and its class token for each class label or prompt, by Euler-Maruyama as published.

        Args:
            guidance_scale, guidance_interval: of the latents, and the times t at which it acts; None: as published.
            class_token_guidance_scale: None: as guidance_scale; 0: conditional only.
            generator: torch.Generator, or one for each image. With `[samplers.image_rng(seed, i) for i in ...]` the
            images are those of generate.py, to the bit where batch and machine are equal.
            output_type: "pil"; "np" (B, R, R, 3) or "pt" (B, 3, R, R), float32 in [0, 1].
        Raises UserError for what the network was not trained to show, and for impossible settings.
        """
        space = space_of(record := self.transformer.record or {})
        conditions, count = self._conditions(class_labels, prompt)
        trained = record.get("args", {})
        scale = conditions.published["cfg_scale"] if guidance_scale is None else guidance_scale
        low, high = guidance_interval or (0.0, conditions.published["guidance_high"])
        dropped = trained.get("cfg_prob", self.transformer.config.get("class_dropout_prob"))
        if class_token_guidance_scale is not None and self.transformer.cls_token_dim is None:
            raise UserError("class_token_guidance_scale: the network has no class token; leave it out")
        if (not scale >= 1 or scale > 1 and dropped == 0 or not 0 <= low <= high <= 1
                or not isinstance(num_inference_steps, int | np.integer) or num_inference_steps < 1):
            raise UserError(f"guidance_scale {scale}, guidance_interval {low, high}, num_inference_steps "
                            f"{num_inference_steps}: expected a scale of at least 1 (1 where no condition was dropped "
                            "in training), 0 <= low <= high <= 1 and at least one step")
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"output_type {output_type}: expected pil, np or pt")
        how = Sampling(num_steps=num_inference_steps, cfg_scale=scale, cls_cfg_scale=class_token_guidance_scale,
                       guidance_low=low, guidance_high=high, path_type=trained.get("path_type", "linear"),
                       time_shift=shift_of("the network", record))
        codec = Codec(self.vae, space.vae)
        # The network's numbers decide: those of the VAE may be in a file that a pipeline does not carry.
        codec.use_space(replace(space, stats="the network's"), "the network")
        images, _, class_tokens = sample_images(self.transformer, codec, range(count), how, conditions,
                                                rngs_of(generator, count))               # (B, 3, R, R), _, (B, E)
        if output_type == "pil":
            return Pairs([Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()], class_tokens)
        images = images.float() / 255
        return Pairs(images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy(), class_tokens)

    def _conditions(self, class_labels: Sequence[int] | int | None, prompt: Sequence[str] | str | None
                    ) -> tuple[Conditions, int]:
        """What the images show, on the device, and the number of images."""
        record, captions = self.transformer.record or {}, isinstance(self.transformer, MMDiT)
        wanted, other = (prompt, class_labels) if captions else (class_labels, prompt)
        if wanted is None or other is not None:
            raise UserError(f"the network was trained with {'captions' if captions else 'class labels'}: give "
                            f"{'prompt' if captions else 'class_labels'} alone")
        if captions:
            if self._captions is None or self._captions.null_states.device != self.device:  # the encoder is loaded once
                text = record.get("text")
                name = self._text_encoder or (text or {}).get("encoder", DEFAULT)
                self._captions = open_captions((), name, None, self.device, text, "the checkpoint",
                                               self.transformer.context_dim, order="in-order")
            prompts = [wanted] if isinstance(wanted, str) else list(wanted)
            return replace(self._captions, prompts=prompts), len(prompts)
        given, seen = np.atleast_1d(wanted), tuple(record.get("classes") or ()) or None
        labels = tuple(given.tolist()) if given.dtype.kind in "iu" and given.ndim == 1 else ()
        if not labels or not set(labels) <= {*(seen or range(self.transformer.num_classes))}:
            raise UserError(f"class_labels {shown(str(wanted))[:60]}: expected numbers from 0 to "
                            f"{self.transformer.num_classes - 1}{', of classes that had training images' * bool(seen)}")
        return ClassLabels(self.transformer.num_classes, classes=labels, seen=seen, device=self.device), len(labels)


def rngs_of(generator: Generator | Sequence[Generator] | None, count: int) -> list[np.random.Generator]:
    """A source of randomness for each image: NumPy's as they are, or seeded by a draw from PyTorch's."""
    given = list(generator) if isinstance(generator, list | tuple) else [generator] * count
    if len(given) != count or not all(isinstance(one, Generator | None) for one in given):
        raise UserError(f"generator: {len(given)} for {count} images; give one torch.Generator, or one for each")
    return [one if isinstance(one, np.random.Generator) else np.random.default_rng(
        torch.randint(2**62, (2,), generator=one, device=one.device if one else None).tolist()) for one in given]
