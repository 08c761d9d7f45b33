# SPDX-License-Identifier: Apache-2.0
"""The two sides of a comparison: this library and transformers, on the same weights and inputs.

A side is made from a `Work` and a directory with its weights. `warm_up` compiles, runs a first step
and returns its output; `run` runs one more step to its end. `moments` are Adam's first moments
after the first step, 0.1 of the gradients, by the tensor names on disk. `compilation` takes the
time of a warm step.
"""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors.numpy import load_file

from checkpoints_convert.pretrained import from_pretrained, save_pretrained
from checkpoints_convert.verify import check_torch, load_transformers, quiet
from vivit_jax.benchmark.agreement import sensitive_params
from vivit_jax.benchmark.work import OPTIMIZER, Work, initial_state, inputs_of, program
from vivit_jax.config import architecture
from vivit_jax.errors import UserError
from vivit_jax.layers.platform import platform
from vivit_jax.models.build import build_model, fresh_params

OURS = "vivit_jax"
PURPOSE = "vivit-jax benchmark --against torch"
TORCH = ("eager", "sdpa", "compile")  # the last is torch.compile with sdpa


class Runnable(Protocol):
    """Something that can be timed."""

    @property
    def name(self) -> str: ...

    def run(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Compilation:
    """The seconds to make the program.

    Tracing and lowering come before XLA compiles; PyTorch does not separate them. A second row of
    this library finds some functions already traced.
    """

    seconds: float  # all together
    cached: bool  # loaded from the persistent compilation cache
    trace_seconds: float | None = None  # Python to jaxpr
    lower_seconds: float | None = None  # jaxpr to StableHLO
    xla_seconds: float | None = None


class Side(Runnable, Protocol):
    """One way to do a work."""

    work: Work

    def warm_up(self) -> np.ndarray: ...

    def moments(self) -> dict[str, np.ndarray] | None: ...

    def compilation(self, step_seconds: float) -> Compilation | None: ...


def write_weights(work: Work, directory: Path, seed: int = 0) -> None:
    """Write an HF directory with the `sensitive_params` of the work's model, in float32."""
    config = dataclasses.replace(work.config, dtype="float32", param_dtype="float32")
    model = build_model(config, work.head)
    save_pretrained(directory, model, sensitive_params(fresh_params(model, seed), config, seed))


class JaxSide:
    """This library; `name` tells several attentions apart."""

    def __init__(self, work: Work, directory: Path, name: str = OURS):
        self.name, self.work, self.directory = name, work, directory
        self._state: Any = None

    def warm_up(self) -> np.ndarray:
        config = self.work.config
        execution = ("dtype", "param_dtype", "attention", "scan_layers", "remat")
        self.program = program(self.work)
        _, params = from_pretrained(
            self.directory,
            head=self.work.head,
            **{name: getattr(config, name) for name in execution},
        )
        self.inputs = jax.device_put(inputs_of(self.work))
        clock = [time.perf_counter()]
        traced = self.program.step.trace(self.program.state, self.program.inputs)
        clock.append(time.perf_counter())
        lowered = traced.lower()
        clock.append(time.perf_counter())
        with _cache_hits() as hits:
            self._step = lowered.compile()
        clock.append(time.perf_counter())
        parts = np.diff(clock).tolist()
        self._compilation = Compilation(clock[-1] - clock[0], bool(hits), *parts)
        self._state = initial_state(self.program, params)
        del params
        return np.asarray(self._run(), np.float32)

    def _run(self):
        if self.work.kind == "forward":
            return self._step(self._state, self.inputs)
        self._state, loss = self._step(self._state, self.inputs)
        return loss

    def run(self) -> None:
        jax.block_until_ready((self._run(), self._state))

    def compilation(self, step_seconds: float) -> Compilation | None:
        return self._compilation

    def moments(self) -> dict[str, np.ndarray] | None:
        if self.work.kind == "forward":
            return None
        assert self._state is not None, "the side is not warm"
        (_, optimizer_state) = self._state
        return _as_tensors(
            lambda path: save_pretrained(path, self.program.model, optimizer_state[0].mu)
        )


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Hits in the persistent compilation cache during the block."""
    hits = []

    def listen(event: str, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


class TorchSide:
    """transformers with one kind of attention, or compiled by `torch.compile`."""

    def __init__(self, work: Work, directory: Path, variant: str):
        if variant not in TORCH:
            raise UserError(f"--against torch variants are {list(TORCH)}, got {variant!r}")
        self.name, self.work, self.variant = f"torch {variant}", work, variant
        self.directory = directory

    def warm_up(self) -> np.ndarray:
        import torch

        work = self.work
        self.device = "cuda" if platform() == "gpu" else "cpu"  # where this library runs
        if self.device == "cuda":  # float32 in TensorFloat32, as JAX multiplies it by default
            torch.set_float32_matmul_precision("high")
        dtype = getattr(torch, work.config.dtype)
        name = architecture(work.config.model_type, work.head)
        attention = "eager" if self.variant == "eager" else "sdpa"
        model = load_transformers(
            self.directory, name, PURPOSE, attention=attention, dtype=work.config.param_dtype
        ).to(self.device)
        self.model = model.eval() if work.kind == "forward" else model.train()
        self._call = torch.compile(self.model) if self.variant == "compile" else self.model
        self.inputs = self._inputs(torch)
        self.optimizer = None
        self._context = contextlib.nullcontext
        if work.kind != "forward":
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
                lr=OPTIMIZER["learning_rate"],
                betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
                eps=OPTIMIZER["eps"],
                weight_decay=OPTIMIZER["weight_decay"],
                fused=True,
            )
            if dtype != torch.float32:
                self._context = lambda: torch.autocast(self.device, dtype)
        start = time.perf_counter()
        first = self._run()
        self._first_seconds = time.perf_counter() - start
        return first.float().cpu().numpy()

    def _inputs(self, torch) -> dict[str, Any]:
        arrays = inputs_of(self.work)
        clip = np.ascontiguousarray(arrays["pixel_values"].transpose(0, 1, 4, 2, 3))
        tensors = {"pixel_values": torch.from_numpy(clip)}
        if self.work.kind == "forward":
            dtype = getattr(torch, self.work.config.dtype)
            tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
        if "labels" in arrays:
            tensors["labels"] = torch.from_numpy(arrays["labels"].astype(np.int64))
        if "mask" in arrays:
            tensors["bool_masked_pos"] = torch.from_numpy(np.array(arrays["mask"].to_bool()))
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _run(self):
        import torch

        if self.work.kind == "forward":
            with torch.inference_mode():
                out = self._call(**self.inputs).logits
        else:
            assert self.optimizer is not None
            self.optimizer.zero_grad(set_to_none=True)
            with self._context():
                loss = self._call(**self.inputs).loss
            loss.backward()
            self.optimizer.step()
            out = loss.detach()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return out

    def run(self) -> None:
        self._run()

    def compilation(self, step_seconds: float) -> Compilation | None:
        if self.variant != "compile":
            return None
        # It compiles in the first step. Its cache of earlier runs cannot be seen.
        return Compilation(max(0.0, self._first_seconds - step_seconds), False)

    def moments(self) -> dict[str, np.ndarray] | None:
        if self.optimizer is None:
            return None
        import torch
        import transformers

        # save_pretrained renames tensors, so moments are saved in place of the weights.
        kept = {}
        with torch.no_grad():
            for parameter in self.model.parameters():
                state = self.optimizer.state.get(parameter)
                moment = state["exp_avg"] if state else torch.zeros_like(parameter)
                kept[parameter], parameter.data = parameter.data, moment
            try:
                with quiet(transformers):
                    return _as_tensors(self.model.save_pretrained)
            finally:
                for parameter, data in kept.items():
                    parameter.data = data


def _as_tensors(save: Callable[[Path], object]) -> dict[str, np.ndarray]:
    """The tensors that `save(directory)` writes, by name."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        save(path)
        files = sorted(path.glob("*.safetensors"))
        return {k: v.astype(np.float32) for file in files for k, v in load_file(file).items()}


def check_work(work: Work) -> None:
    """Raise MissingExtra or UserError if the work has no PyTorch side."""
    check_torch(PURPOSE)
    import torch

    place = platform()
    if place == "tpu" or (place == "gpu" and not torch.cuda.is_available()):
        raise UserError(
            f"--against torch: JAX runs on {place} and this PyTorch {torch.__version__} does not; "
            "install one that does, or set JAX_PLATFORMS=cpu"
        )
    if not work.config.in_transformers:
        raise UserError(
            f"--against torch: transformers does not have {work.name}; it has joint ViViT and "
            "VideoMAE without cosine attention and layer scale"
        )
    if work.dual_masks and work.kind == "pretrain":
        raise UserError(
            f"--against torch: transformers has no dual masks, which {work.name} is pre-trained "
            "with; use a videomae-v1 model"
        )


def share_the_gpu() -> None:
    """Keep JAX from reserving most of a GPU's memory; call before JAX looks for devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
