# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints written by transformers, in every spelling and kind of file."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from helpers import torch_model

DIALECTS = {"vivit": ("hub", "memory"), "mae": ("hub", "memory", "key_bias")}
STORAGE = ("single", "sharded", "bin", "sharded bin")


def read_safetensors(directory) -> dict[str, np.ndarray]:
    """Every tensor of a directory, read by the safetensors library itself."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def same_tensors(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


@dataclasses.dataclass
class Checkpoints:
    root: Path

    def path(self, case: str, dialect: str = "hub", storage: str = "single", **changes) -> Path:
        """A directory that holds the case's model; do not change it, see `copy`."""
        name = "-".join([case, dialect, storage, *map(str, changes.values())]).replace(" ", "_")
        path = self.root / name
        if not path.exists():
            if storage in ("single", "sharded") and dialect != "key_bias":
                limit = {"max_shard_size": "20KB"} if storage == "sharded" else {}
                model = torch_model(case, **changes)
                model.save_pretrained(path, save_original_format=dialect == "hub", **limit)
            else:
                base = self.path(case, "hub" if dialect == "hub" else "memory", **changes)
                self._rewrite(base, path, dialect, storage)
        return path

    def _rewrite(self, base: Path, path: Path, dialect: str, storage: str) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(base / "model.safetensors")
        if dialect == "key_bias":
            biases = [name for name in tensors if name.endswith(".query.bias")]
            for seed, name in enumerate(biases):
                drawn = np.random.default_rng(seed).standard_normal(tensors[name].shape)
                key = name.replace(".query.", ".key.")
                tensors[key] = torch.from_numpy(drawn.astype(np.float32))
        path.mkdir()
        shutil.copy(base / "config.json", path)
        stem, save = (
            ("pytorch_model.bin", torch.save)
            if "bin" in storage
            else ("model.safetensors", lambda part, file: save_file(part, file, {"format": "pt"}))
        )
        if "sharded" not in storage:
            save(tensors, path / stem)
            return
        first, last = stem.split(".")
        weight_map = {}
        for i in range(2):
            part = {name: tensors[name] for name in sorted(tensors)[i::2]}
            shard = f"{first}-0000{i + 1}-of-00002.{last}"
            save(part, path / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / f"{stem}.index.json").write_text(json.dumps(index))

    def hub_tensors(self, case: str, **changes) -> dict[str, np.ndarray]:
        return read_safetensors(self.path(case, **changes))


def pop(*beginnings: str):
    """Damage: a function that removes the tensors, at least one, whose names begin so."""

    def edit(tensors):
        names = [name for name in tensors if name.startswith(beginnings)]
        assert names
        for name in names:
            del tensors[name]

    return edit


def put(name: str, shape, dtype: str = "float32"):
    """Damage: a function that puts zeros under a name."""
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})
