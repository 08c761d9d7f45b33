# SPDX-License-Identifier: Apache-2.0
"""Weights as training programs leave them: prefixes of wrappers, Lightning, runs of a Trainer."""

import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
from helpers import mostly_slow
from tiny_checkpoints import read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.files.open import open_checkpoint

CASES = ("vivit cls", "vivit base", "mae base", "mae pretraining")
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "model.model.",
)


def refused(call, *args, error=vivit_jax.CheckpointError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def torch_tensors(path) -> dict:
    import torch

    return {name: torch.from_numpy(value) for name, value in read_safetensors(path).items()}


@pytest.fixture
def renamed(checkpoints, tmp_path):
    """A copy of a case whose tensors are named by a function, in safetensors or a .bin."""

    def make(case, name, kind="safetensors"):
        import torch
        from safetensors.numpy import save_file

        source = checkpoints.path(case)
        path = tmp_path / "renamed"
        path.mkdir()
        shutil.copy(source / "config.json", path)
        tensors = {name(old): value for old, value in read_safetensors(source).items()}
        if kind == "safetensors":
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
        else:
            held = {key: torch.from_numpy(value) for key, value in tensors.items()}
            torch.save(held, path / "pytorch_model.bin")
        return path

    return make


def same(a, b) -> bool:
    import jax

    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize("prefix", mostly_slow(PREFIXES, "module.", "_orig_mod.module."))
@pytest.mark.parametrize("case,kind", [("vivit cls", "safetensors"), ("mae base", "bin")])
def test_prefixes_of_wrappers_are_taken_off(checkpoints, renamed, case, kind, prefix):
    path = renamed(case, lambda name: prefix + name, kind)
    model, params = vivit_jax.from_pretrained(path)
    expected, held = vivit_jax.from_pretrained(checkpoints.path(case))
    assert model.config == expected.config and same(params, held)


def test_torch_compile_inside_a_model(checkpoints, renamed):
    """torch.compile of one part puts its prefix in the middle of a name."""
    path = renamed("vivit cls", lambda name: name.replace("vivit.", "vivit._orig_mod.", 1))
    _, params = vivit_jax.from_pretrained(path)
    assert same(params, vivit_jax.from_pretrained(checkpoints.path("vivit cls"))[1])


def test_commands_read_them_and_convert_writes_the_published_names(checkpoints, renamed, run):
    path = renamed("vivit cls", lambda name: f"module.{name}")
    status, out, _ = run("convert", path, path.parent / "out")
    assert status == 0 and "0 of them left out" in out
    assert same_tensors(
        read_safetensors(path.parent / "out"), read_safetensors(checkpoints.path("vivit cls"))
    )
    assert run("inspect", path)[0] == 0
    status, out, _ = run("verify", path)
    assert status == 0 and "agree" in out and "as converted to the hf layout" in out


@pytest.mark.parametrize("case", mostly_slow(CASES, "vivit cls", "mae base"))
def test_another_prefix_is_named(renamed, case):
    path = renamed(case, lambda name: f"student.{name}")
    message = refused(vivit_jax.from_pretrained, path)
    assert "the model's tensors are named student." in message
    assert "Save the state dict of student alone" in message and "\n" not in message


def test_two_copies_of_a_model_are_not_mixed(renamed):
    path = renamed("vivit cls", lambda name: name)
    from safetensors.numpy import save_file

    tensors = read_safetensors(path)
    tensors |= {f"module.{name}": value for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    message = refused(vivit_jax.from_pretrained, path)
    assert "are both classifier.bias without the prefixes of torch.compile" in message


# --- Lightning -----------------------------------------------------------------------------------


def lightning(tensors, prefix, **others):
    """What Lightning's Trainer saves around a state dict."""
    import torch

    state = {prefix + name: value for name, value in tensors.items()}
    moments = {i: {"step": 3.0, "exp_avg": t * 0} for i, t in enumerate(state.values())}
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 4, "_last_lr": [1e-4]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-4, "layers": [1, 2], "name": "vivit", "nothing": None},
        **others,
    }


@pytest.mark.parametrize("case,prefix", [
    ("vivit cls", "model."), ("vivit base", "net."), ("mae pretraining", "model._orig_mod."),
    ("mae base", ""),
])  # fmt: skip
def test_a_lightning_checkpoint(checkpoints, tmp_path, run, case, prefix):
    import torch

    source = checkpoints.path(case)
    path = tmp_path / "run"
    path.mkdir()
    shutil.copy(source / "config.json", path)
    torch.save(lightning(torch_tensors(source), prefix), path / "epoch=3-step=1200.ckpt")
    for opened in (path, path / "epoch=3-step=1200.ckpt"):
        _, params = vivit_jax.from_pretrained(opened)
        assert same(params, vivit_jax.from_pretrained(source)[1])
    status, out, _ = run("convert", path, tmp_path / "out")
    assert status == 0 and "hyper_parameters" in out and "training state" in out
    assert same_tensors(read_safetensors(tmp_path / "out"), read_safetensors(source))


def test_hyperparameters_of_lightnings_own_class_and_paths(checkpoints, tmp_path, monkeypatch):
    import torch

    class AttributeDict(dict):
        pass

    module = types.ModuleType("lightning.fabric.utilities.data")
    AttributeDict.__module__, AttributeDict.__qualname__ = module.__name__, "AttributeDict"
    module.AttributeDict = AttributeDict
    for name in ("lightning", "lightning.fabric", "lightning.fabric.utilities", module.__name__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = checkpoints.path("vivit cls")
    hyper = AttributeDict(lr=0.1, root=pathlib.PurePosixPath("/data"), here=pathlib.Path("a/b"))
    state = lightning(torch_tensors(source), "model.", hyper_parameters=hyper)
    shutil.copy(source / "config.json", tmp_path)
    torch.save(state, tmp_path / "last.ckpt")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    _, params = vivit_jax.from_pretrained(tmp_path)
    assert same(params, vivit_jax.from_pretrained(source)[1])


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_hyperparameters_that_could_run_code_are_refused(checkpoints, tmp_path, capsys):
    import torch

    source = checkpoints.path("vivit cls")
    shutil.copy(source / "config.json", tmp_path)
    state = lightning(torch_tensors(source), "model.", hyper_parameters={"a": Harmful()})
    torch.save(state, tmp_path / "last.ckpt")
    message = refused(vivit_jax.from_pretrained, tmp_path)
    assert "holds more than tensors, and unpickling that could run code" in message
    assert "this ran" not in capsys.readouterr().out


def test_a_lightning_checkpoint_of_the_authors_model(tmp_path):
    import torch
    from tiny_authors import state, torch_state

    tensors = torch_state(state("fine-tuned"))
    torch.save(lightning(tensors, "net."), tmp_path / "last.ckpt")
    torch.save(tensors, tmp_path / "bare.pth")
    settings = {"config": {"num_attention_heads": 4, "num_frames": 4, "image_size": 32}}
    found = [
        vivit_jax.from_pretrained(tmp_path / name, **settings)[1]
        for name in ("last.ckpt", "bare.pth")
    ]
    assert same(*found)


def test_ckpt_of_other_programs(tmp_path):
    import torch
    from flax import serialization

    torch.save({"w": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert open_checkpoint(tmp_path / "old.ckpt").tensors["w"].read().tolist() == [1, 1]
    (tmp_path / "flax.ckpt").write_bytes(serialization.to_bytes({"w": np.ones(2, np.float32)}))
    assert open_checkpoint(tmp_path / "flax.ckpt").tensors["w"].shape == (2,)
    np.savez(tmp_path / "a.npz", w=np.ones(2, np.float32))
    (tmp_path / "a.npz").rename(tmp_path / "numpy.ckpt")
    assert open_checkpoint(tmp_path / "numpy.ckpt").tensors["w"].shape == (2,)
    (tmp_path / "text.ckpt").write_text("hello")
    assert "unknown kind of file" in refused(open_checkpoint, tmp_path / "text.ckpt")


def test_containers_of_other_scripts(checkpoints, tmp_path):
    import torch

    source = checkpoints.path("vivit cls")
    shutil.copy(source / "config.json", tmp_path)
    tensors = torch_tensors(source)
    held = vivit_jax.from_pretrained(source)[1]
    for container in ("model", "state_dict", "model_state_dict"):
        path = tmp_path / "best.pth"
        torch.save({container: tensors, "optimizer": {"lr": 0.1}, "epoch": 3}, path)
        assert same(vivit_jax.from_pretrained(path)[1], held)
    torch.save({"ema": tensors, "online": tensors, "epoch": 3}, path)
    message = refused(vivit_jax.from_pretrained, path)
    assert "holds a model in each of ema, online; save the state dict of one" in message
    torch.save({**tensors, "epoch": 3}, path)
    assert "not a flat state dict, it also holds: epoch" in refused(vivit_jax.from_pretrained, path)


# --- directories of runs -------------------------------------------------------------------------


def test_the_output_of_a_trainer_names_its_checkpoints(checkpoints, tmp_path):
    out = tmp_path / "trainer-output"
    (out / "runs").mkdir(parents=True)
    (out / "checkpoint-20").mkdir()  # without weights
    shutil.copytree(checkpoints.path("vivit cls"), out / "checkpoint-500")
    message = refused(vivit_jax.from_pretrained, out)
    assert message == (
        f"{out} holds no weights of its own but checkpoints of a run; name one, "
        f"{out / 'checkpoint-500'}"
    )
    shutil.copytree(checkpoints.path("vivit cls"), out / "checkpoint-1000")
    message = refused(vivit_jax.from_pretrained, out)
    assert f"name one, {out / 'checkpoint-1000'} (or checkpoint-500)" in message
    vivit_jax.from_pretrained(out / "checkpoint-1000")


@pytest.mark.parametrize("inside", ["", "version_0", "lightning_logs/version_1"])
def test_the_output_of_lightning_names_its_checkpoints(tmp_path, inside):
    place = tmp_path / inside / "checkpoints"
    place.mkdir(parents=True)
    (place / "epoch=3-step=1200.ckpt").write_bytes(b"")
    message = refused(vivit_jax.from_pretrained, tmp_path)
    assert f"name one, {place / 'epoch=3-step=1200.ckpt'}" in message


@pytest.mark.parametrize("naming", ["hf", "timm"])
def test_an_image_model_behind_a_wrapper(images, tmp_path, naming):
    from safetensors.numpy import load_file, save_file

    source = images.path(naming)
    path = tmp_path / "image"
    path.mkdir()
    if source.is_dir():
        shutil.copy(source / "config.json", path)
    tensors = load_file(source / "model.safetensors" if source.is_dir() else source)
    tensors = {f"module.{name}": value for name, value in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {"num_frames": 4, "num_attention_heads": 4}
    made = [vivit_jax.init_from_image_model(p, config=config) for p in (source, path)]
    assert same(made[0].params, made[1].params)
