"""What a run is on disk: whole, readable without running code, and honest about what does not fit."""

import argparse
import pickle

import pytest
import torch

from models import checkpoint
from models.checkpoint import build_for_sampling, load_weights
from models.errors import UserError
from models.sit import SiT_models
from models.vae import LatentSpace
from tests.test_sit import inputs, randomised, small


def saved(folder, model, ema, step=7):
    optimizer = torch.optim.AdamW(model.parameters())
    return checkpoint.save(folder, model=model, ema=ema, optimizer=optimizer, scaler=None, args={"seed": 1}, step=step, draws=9,
                           latent_space=LatentSpace().to_record(), data="")


def released(model) -> dict:
    """A file as the released programs write it: their names, an argparse.Namespace."""
    names = {"cls_embedder.": "cls_projectors2.", "cls_norm.": "wg_norm."}
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = value
    return {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(path_type="cosine", cfg_prob=0.1), "steps": 400_000}


def same(a, b) -> bool:
    return all((value == b.state_dict()[name]).all() for name, value in a.state_dict().items())


def test_names_and_keys(tmp_path):
    model = small()
    path = saved(tmp_path, model, model)
    assert path == tmp_path / "checkpoints" / "0000007.pt"
    state = torch.load(path, weights_only=True)
    assert {"model", "ema", "opt", "args", "steps"} <= state.keys()
    assert state["args"] == {"seed": 1} and (state["steps"], state["draws"]) == (7, 9)
    assert [p.name for p in path.parent.iterdir()] == ["0000007.pt"]               # no partial file stays


def test_newest_is_the_highest_step(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (900_000, 50_000, 12_000_000):
        saved(tmp_path, small(), small(), step)
    (tmp_path / "checkpoints" / "99999999.pt.partial").touch()
    assert checkpoint.newest(tmp_path).name == "12000000.pt"
    assert checkpoint.find(tmp_path).name == "12000000.pt"


def test_rebuilds_the_model_from_the_file_alone(tmp_path):
    model, ema = small(qk_norm=True), randomised(small(qk_norm=True))
    state = checkpoint.read(saved(tmp_path, model, ema))
    rebuilt = build_for_sampling(state)
    assert not len(rebuilt.projectors) and not rebuilt.training
    torch.testing.assert_close(rebuilt(*inputs(rebuilt))[0], ema.eval()(*inputs(ema))[0])
    assert same(build_for_sampling(state, which="model"), small(qk_norm=True))


@pytest.mark.parametrize("cls_token_dim", [None, 48])
def test_released_files(tmp_path, cls_token_dim):
    size = "SiT-T/2"
    model = randomised(SiT_models[size](input_size=8, in_channels=4, num_classes=11, cls_token_dim=cls_token_dim, z_dims=(48,),
                                        projector_dim=16))
    torch.save(released(model), tmp_path / "0400000.pt")
    state = checkpoint.read(tmp_path / "0400000.pt")
    assert state["args"]["path_type"] == "cosine"
    rebuilt = build_for_sampling(state, size)
    torch.testing.assert_close(rebuilt(*inputs(rebuilt))[0], model.eval()(*inputs(model))[0])
    with pytest.raises(UserError, match="add --model"):
        build_for_sampling(state)
    with pytest.raises(UserError, match="SiT-B/2 has width 768"):
        build_for_sampling(state, "SiT-B/2")


def test_weights_come_as_file_content_or_bare_state_dict(tmp_path):
    source = randomised(small())
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    for given in (tmp_path / "bare.pth", source.state_dict(), released(source), saved(tmp_path, small(), source),
                  {f"module.{name}": value for name, value in source.state_dict().items()}):
        model = small()
        load_weights(model, given)
        assert same(model, source)


def test_projectors_are_dropped_only_when_the_model_has_none():
    load_weights(small(z_dims=()), small().state_dict())
    with pytest.raises(UserError, match=r"projectors\.1\.0\.bias is absent"):
        load_weights(small(z_dims=(12, 12)), small().state_dict())


@pytest.mark.parametrize(("change", "key", "cause"), [
    (dict(cls_token_dim=None), "cls_embedder.bias is absent", "class-token slot"),
    (dict(cls_token_dim=16), "cls_embedder.weight is of shape", "class-token slot"),
    (dict(input_size=16), "pos_embed is of shape", "resolution"),
    (dict(num_classes=9), "y_embedder.embedding_table.weight is of shape", "--num-classes"),
    (dict(in_channels=16), "final_layer.linear.bias is of shape", "latent channels"),
    (dict(qk_norm=True), "blocks.0.attn.k_norm.bias is of shape", "--qk-norm"),
    (dict(depth=4), "blocks.3.adaLN_modulation.1.bias is of shape", "size"),
    (dict(projector_dim=20), "projectors.0.0.bias is of shape", "--projector-dim"),
])
def test_what_does_not_fit_is_named_with_its_likely_cause(change, key, cause):
    with pytest.raises(UserError) as error:
        load_weights(small(), small(**change).state_dict())
    assert key in str(error.value) and cause in str(error.value) and "\n" not in str(error.value)


class Harmful:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({"ema": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "bad.pt")
    assert capsys.readouterr().out == ""


def test_files_in_the_format_before_zip_are_read(tmp_path):
    torch.save({"ema": small().state_dict()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load_weights(small(), tmp_path / "old.pt")


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    path = saved(tmp_path, small(), small())
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    for name in ("text.pt", "cut.pt", "tensor.pt", "nowhere.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.read(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint below"):
        checkpoint.find(tmp_path / "empty")
    with pytest.raises(UserError, match="no 'ema' weights"):
        load_weights(small(), {"weights": {}, "epoch": 3})
    with pytest.raises(UserError, match="not a SiT"):
        build_for_sampling({"ema": {"conv.weight": torch.zeros(1)}}, "SiT-T/2")
