# SPDX-License-Identifier: Apache-2.0
"""One small whole input of every kind of file that is read, and how its reader is asked.

An input is a directory. `KINDS` says which of its files is damaged and what reads it; a reader
returns a digest of what it read, so that two reads can be compared, and raises AssertionError where
what it read contradicts itself.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vivit_jax.errors import UserError

VIDEOS = {
    "h264.mp4": "libx264", "hevc.mkv": "libx265", "vp9.webm": "libvpx-vp9", "vp8.webm": "libvpx",
    "mpeg4.avi": "mpeg4", "h264.ts": "libx264", "mpeg4.mov": "mpeg4", "h264.avi": "libx264",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """The damaged file's path, its reader, and whether checksums rule out any other result."""

    file: str
    read: Callable[[Path], Any]
    checked: bool = False


def digest(value: Any) -> str:
    """A digest of results."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                sha.update(f"{key!r}:".encode(errors="backslashreplace"))
                add(below)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            sha.update(f"{value.dtype}{value.shape}".encode())
            sha.update(np.ascontiguousarray(value).tobytes())
        else:
            sha.update(repr(value).encode(errors="backslashreplace"))

    add(value)
    return sha.hexdigest()[:16]


# --- readers ----------------------------------------------------------------------------------


def weights(path: Path) -> dict[str, np.ndarray]:
    from checkpoints_convert.files.open import open_checkpoint

    read = {}
    for name, tensor in open_checkpoint(path).tensors.items():
        read[name] = tensor.read()
        assert read[name].shape == tuple(tensor.shape), name
        assert read[name].dtype == tensor.dtype, name
    return read


def model(path: Path) -> dict[str, Any]:
    """A load except the drawing of fresh weights."""
    from checkpoints_convert.pretrained import plan_load
    from vivit_jax.config import config_from_dict

    plan = plan_load(path.parent, None)
    config = plan.model.config
    if config.model_type in ("vivit", "videomae"):
        values = config.to_dict()
        assert config_from_dict(values, warn=False).to_dict() == values
    return {"config": config.to_dict(), "rows": len(plan.rows)}


def processor(path: Path) -> dict[str, Any]:
    from vivit_jax import VideoProcessor

    found = VideoProcessor.from_pretrained(path.parent)
    values = found.to_dict()
    assert VideoProcessor.from_dict(values).to_dict() == values
    sides = [*found.size.values(), *found.crop_size.values()]
    if max(sides) < 300:
        clip = np.arange(2 * 20 * 24 * 3, dtype=np.uint8).reshape(2, 20, 24, 3)
        pixels = found(clip)
        assert pixels.dtype == np.float32 and pixels.ndim == 5
        values["pixels"] = digest(pixels)
    return values


def video(path: Path) -> dict[str, Any]:
    from vivit_jax import probe_video, read_video

    info = probe_video(path)
    frames = read_video(path, indices=range(info.num_frames))
    assert len(frames) == info.num_frames
    assert frames.shape[1:] == (info.height, info.width, 3), (frames.shape, info)
    last = read_video(path, indices=[info.num_frames - 1])
    assert np.array_equal(last[0], frames[-1]), "the last frame alone is another"
    return {"frames": frames, "fps": info.fps}


def picture(path: Path) -> np.ndarray:
    from vivit_jax.data.datasets.dataset import read_dataset, read_whole

    (example,) = read_dataset(path.parent.parent).examples
    return read_whole(example)


def array(path: Path) -> np.ndarray:
    from vivit_jax.data.datasets.arrays import open_array

    return np.asarray(open_array(path))


def clip_list(path: Path) -> list:
    from vivit_jax.data.datasets.dataset import read_dataset

    found = read_dataset(path)
    return [repr(example) for example in found.examples]


def label_map(path: Path) -> tuple:
    from checkpoints_convert.start.label_map import read_label_map

    return read_label_map(path)


def recipe(path: Path) -> Any:
    from vivit_jax.recipes.settings import from_dict, to_dict
    from vivit_jax.train.storage.run_directory import saved_recipe

    found = to_dict(saved_recipe(path.parent))
    assert to_dict(from_dict(json.loads(json.dumps(found)))) == found
    return found


def run_model(path: Path) -> Any:
    from vivit_jax.train.start.initial_model import described_model
    from vivit_jax.train.start.preprocessing import described_preprocessing
    from vivit_jax.train.storage.run_directory import saved_recipe

    found = described_model(path)
    described_preprocessing(path, saved_recipe(path.parent), found.config)
    return repr(found.config)


def report(path: Path) -> str:
    from vivit_jax.train.pages.report import write_report

    return write_report(path.parent).read_text(encoding="utf-8")


def features(path: Path) -> Any:
    from vivit_jax.inference.feature_file import read_metadata

    return read_metadata(path)


# --- kinds ------------------------------------------------------------------------------------

KINDS: dict[str, Kind] = {
    "config.json": Kind("hf/config.json", model),
    "vivit config.json": Kind("vivit/config.json", model),
    "preprocessor": Kind("hf/preprocessor_config.json", processor),
    "safetensors": Kind("hf/model.safetensors", weights),
    "safetensors of a model": Kind("hf/model.safetensors", model),
    "index json": Kind("sharded/model.safetensors.index.json", weights),
    "bin": Kind("bin/pytorch_model.bin", weights, checked=True),
    "bin before 1.6": Kind("old/pytorch_model.bin", weights),
    "pth": Kind("videomae/checkpoint.pth", weights, checked=True),
    "pickle of a bin": Kind("pickle/pytorch_model.bin", weights),
    "npz": Kind("npz/weights.npz", weights),
    "compressed npz": Kind("npz/small.npz", weights),
    "msgpack": Kind("scenic/checkpoint_0", weights),
    "label map": Kind("labels/map.json", label_map),
    "list": Kind("lists/train.txt", clip_list),
    "csv list": Kind("lists/train.csv", clip_list),
    "recipe.json": Kind("run/recipe.json", recipe),
    "model.json": Kind("run/model.json", run_model),
    "metrics": Kind("run/metrics.jsonl", report),
    "bad clips": Kind("run/bad_clips.json", report),
    "features safetensors": Kind("features/a.safetensors", features),
    "features npz": Kind("features/b.npz", features),
    "npy clip": Kind("arrays/clip.npy", array),
    "npz clip": Kind("arrays/clip.npz", array),
    "png frame": Kind("png/frames/0001.png", picture),
    "jpg frame": Kind("jpg/frames/0001.jpg", picture),
    "webp frame": Kind("webp/frames/0001.webp", picture),
    "gif": Kind("videos/clip.gif", video),
    "animated webp": Kind("videos/clip.webp", video),
    **{name: Kind(f"videos/{name}", video) for name in VIDEOS},
}  # fmt: skip


def _faulty(fault: Callable[[], Any]) -> Kind:
    """A reader that succeeds once, on the undamaged input, and then never again."""
    calls = itertools.count()
    return Kind("labels/map.json", lambda path: fault() if next(calls) else None)


def _raise(error: Exception) -> None:
    raise error


def _busy() -> None:
    end = time.process_time() + 1
    while time.process_time() < end:
        pass


# What the harness must notice, for its own test.
FAULTS = {
    "crash": _faulty(os.abort),
    "hang": _faulty(_busy),
    "memory": _faulty(lambda: np.ones(2**23).sum()),
    "raise": _faulty(lambda: _raise(KeyError("x"))),
    "lines": _faulty(lambda: _raise(UserError("one\ntwo"))),
    "random": _faulty(lambda: os.urandom(8)),
    "checked": dataclasses.replace(_faulty(lambda: 1), checked=True),
    "one line": _faulty(lambda: _raise(UserError("one"))),
}


def make(root: Path) -> None:
    """Write every input below `root`."""
    _checkpoints(root)
    _run(root)
    _data(root)


def _checkpoints(root: Path) -> None:
    import jax
    import torch
    from tiny import SMALL_VIDEOMAE
    from tiny_recipes import CLASSES

    import vivit_jax
    from checkpoints_convert.convert import convert_checkpoint
    from vivit_jax.models.build import abstract_params, build_model

    drawn = np.random.default_rng(0)

    def draw(leaf):
        return drawn.standard_normal(leaf.shape).astype(np.float32)

    configs = {
        "hf": vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, num_labels=CLASSES),
        "vivit": vivit_jax.VivitConfig(
            image_size=16, num_frames=4, tubelet_size=(2, 8, 8), hidden_size=16,
            num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            id2label=("a", "b", "c"), num_labels=3, layer_norm_eps=1e-6,
        ),
    }  # fmt: skip
    processors = {
        "hf": vivit_jax.VideoProcessor.videomae(size=16, crop_size=16),
        "vivit": vivit_jax.VideoProcessor.vivit(size=16, crop_size=16),
    }
    for name, config in configs.items():
        module = build_model(config, "classification")
        params = jax.tree.map(draw, abstract_params(module))
        vivit_jax.save_pretrained(root / name, module, params, processors[name])
    convert_checkpoint(root / "hf", root / "sharded", max_shard_size="10KB")
    authors = ("layer_norm_eps=1e-6", "fc_norm_eps=1e-6")
    convert_checkpoint(root / "hf", root / "videomae", to_layout="videomae", settings=authors)
    convert_checkpoint(root / "vivit", root / "scenic", to_layout="scenic")
    tensors = weights(root / "hf")
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    for name, archive in (("bin", True), ("old", False)):
        (root / name).mkdir()
        torch.save(state, root / name / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    # Damaged inside, with checksums of the damaged content.
    (root / "pickle").mkdir()
    with zipfile.ZipFile(root / "bin" / "pytorch_model.bin") as archive:
        (root / "pickle" / "pytorch_model.bin").write_bytes(archive.read("pytorch_model/data.pkl"))
    (root / "npz").mkdir()
    np.savez(root / "npz" / "weights.npz", **tensors)
    np.savez_compressed(root / "npz" / "small.npz", **tensors)


def _run(root: Path) -> None:
    from tiny_recipes import FINETUNE

    from vivit_jax.inference.feature_file import RowWriter
    from vivit_jax.recipes.checks import model_config
    from vivit_jax.recipes.settings import to_dict
    from vivit_jax.train.log import MetricLog
    from vivit_jax.train.start.preprocessing import described, preprocessing

    run = root / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps(to_dict(FINETUNE), indent=2))
    config = model_config(FINETUNE)
    values = {
        "head": "classification",
        "config": config.to_dict(),
        "execution": {
            f.name: getattr(config, f.name)
            for f in dataclasses.fields(config)
            if f.metadata.get("execution")
        },
        "start": [],
        "preprocessing": described(preprocessing(FINETUNE, config)),
    }
    (run / "model.json").write_text(json.dumps(values, indent=2))
    log = MetricLog(run)
    for step in range(1, 6):
        log.write("train", step, {"loss": 1.0 / step, "lr": 1e-3, "gradient_norm": float("nan")})
    log.write("evaluate", 5, {"accuracy": 0.5})
    log.write("event", 5, {"text": "done"})
    log.close()
    bad = {"read": 10, "left_out": 1, "clips": {"a.mp4": "damaged"}, "validation": {}}
    (run / "bad_clips.json").write_text(json.dumps(bad))
    (root / "features").mkdir()
    for name in ("a.safetensors", "b.npz"):
        with RowWriter(root / "features" / name) as writer:
            for _ in range(2):
                writer.add(features=np.ones(3, np.float32))
            writer.finish({"model": "x", "settings": {"a": 1}})


def _data(root: Path) -> None:
    from clips import painted, write_clip
    from PIL import Image

    (root / "labels").mkdir()
    (root / "labels" / "map.json").write_text(json.dumps(list(range(0, 40, 2))))
    (root / "lists").mkdir()
    lines = [f"video_{i}.mp4 {i % 5}" for i in range(20)]
    (root / "lists" / "train.txt").write_text("\n".join(["# clips", *lines]) + "\n")
    (root / "lists" / "train.csv").write_text("\n".join(line.replace(" ", ",") for line in lines))
    (root / "videos").mkdir()
    for name, codec in VIDEOS.items():
        write_clip(root / "videos" / name, 12, codec, gop=6)
    pictures = [Image.fromarray(painted(i)) for i in range(6)]
    for ending in ("gif", "webp"):
        path = root / "videos" / f"clip.{ending}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    for ending in ("png", "jpg", "webp"):
        folder = root / ending / "frames"
        folder.mkdir(parents=True)
        for i in range(3):
            pictures[i].save(folder / f"{i + 1:04}.{ending}")
    (root / "arrays").mkdir()
    clip = np.stack([painted(i) for i in range(6)])
    np.save(root / "arrays" / "clip.npy", clip)
    np.savez_compressed(root / "arrays" / "clip.npz", clip)


def placed(kind: str, root: Path, work: Path, data: bytes) -> Path:
    """Copies an input with other bytes in the kind's file; returns that file's path."""
    file = (KINDS | FAULTS)[kind].file
    top = Path(file).parts[0]
    shutil.rmtree(work, ignore_errors=True)
    if top in ("videos", "arrays", "features"):
        (work / top).mkdir(parents=True)
    else:
        shutil.copytree(root / top, work / top)
    path = work / file
    path.write_bytes(repacked(root, data) if kind == "pickle of a bin" else data)
    return path


def repacked(root: Path, pickled: bytes) -> bytes:
    """The .bin with another pickle."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(root / "bin" / "pytorch_model.bin") as source,
        zipfile.ZipFile(out, "w") as target,
    ):
        for name in source.namelist():
            data = pickled if name.endswith("/data.pkl") else source.read(name)
            target.writestr(name, data)
    return out.getvalue()
