# Source of quickstart.ipynb, which `python -m tests.notebook` writes.
# ruff: noqa: E402
# %% [markdown]
# # From a checkpoint to a score
#
# REG denoises a pair: the image's latents, and the *class token* of a frozen image encoder. This notebook loads a
# checkpoint, samples pairs, looks at them, guides them and scores them, in a few minutes on two CPU cores.
# `make toy` (12 to 24 minutes) makes the files that it reads. For another run change the three names below.

# %%
import os
from pathlib import Path

EXPERIMENT = "exps/reg-toy"                       # a folder of train.py, or a checkpoint file
REFERENCE = "data/toy/reference.npz"              # real images to score against
FEATURES = "local-dir:toy/networks/features"      # the network that scores; "inception" for a FID

os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "generate.py").exists()))

# %% [markdown]
# ## Load
# A checkpoint describes itself: its architecture, the space of its latents and how it was trained. The weights are
# the averaged ones (EMA).

# %%
import torch

from dataset import LatentDataset
from evaluations.features import load_extractor
from evaluations.scoring import evaluate
from models import checkpoint
from models.conditioning import ClassLabels
from models.encoders import load_encoders
from models.vae import LatentSpace, load_codec
from runtime.pictures import grid_of
from samplers import Sampling, sample_images

state = checkpoint.read(EXPERIMENT)
trained, space = state["args"], LatentSpace.from_record(state["latent_space"])
model = checkpoint.build_for_sampling(state)
codec = load_codec(space.decoder)
codec.use_space(space, EXPERIMENT)
print(trained["method"], trained["model"], "step", state["steps"], model.config)

# %% [markdown]
# ## Sample
# Image i follows from (seed, i) alone. `conditions` says what it shows: here every class in turn. The third result
# is the class token that was generated with each image.

# %%
conditions = ClassLabels(model.num_classes, labels="balanced")
how = dict(mode="ode", num_steps=25)
images, labels, tokens = sample_images(model, codec, range(16), Sampling(**how), conditions)  # (B, 3, R, R), B, (B, E)
grid_of(images, 8, [f"class {label}" for label in labels])

# %% [markdown]
# ## Look at the pair
# Do image and class token agree? The encoder reads the token off the finished image; the cosine to the generated
# token says how well the two halves of the pair fit. Then the training image whose class token is nearest to the
# generated one, among 1,024 from all over the data: generated images above, their neighbours below.

# %%
encoder = load_encoders(trained["enc_type"], "cpu", images.shape[-1])[0]
print("cosine of the pair:", torch.cosine_similarity(tokens, encoder(images)[0]).numpy().round(2))

data = LatentDataset(trained["data_dir"])
known = torch.stack([data[i][0] for i in range(0, len(data), -(-len(data) // 1024))])  # (K, 3, R, R), of every class
values, nearest = torch.cosine_similarity(tokens[:8, None], encoder(known)[0], dim=2).max(dim=1)       # (8,), (8,)
grid_of(torch.cat([images[:8], known[nearest]]), 8, ["generated"] * 8 + [f"cosine {one:.2f}" for one in values])

# %% [markdown]
# ## Guide
# Classifier-free guidance extrapolates from the unconditional velocity to the conditional one, of latents and class
# token alike. Rows: scale 1 (none), 2.3 (the published one) and 5. The noise of a column is the same.

# %%
guided = {scale: sample_images(model, codec, range(256), Sampling(**how, cfg_scale=scale), conditions)[0]
          for scale in (1.0, 2.3, 5.0)}
grid_of(torch.cat([made[:8] for made in guided.values()]), 8, [f"scale {one}" for one in guided for _ in range(8)])

# %% [markdown]
# ## Score
# The Frechet distance to the reference by scale: lower is better. It compares at equal numbers of samples only: these
# are 256, papers take 50,000 (`bash eval.sh EXP_DIR`).

# %%
extractor = load_extractor(FEATURES)
{scale: evaluate(REFERENCE, made.permute(0, 2, 3, 1).numpy(), extractor)[extractor.key]
 for scale, made in guided.items()}
