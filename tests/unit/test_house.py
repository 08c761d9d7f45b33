# SPDX-License-Identifier: Apache-2.0
"""The plan of the packages: floors, no circles, few loose files, imports at the top of a file."""

import ast
import collections
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vivit_jax", "checkpoints_convert")
# The only imports allowed inside functions, and why each is not at the top of its file.
LATE = {
    "torch": "extra torch, and 4 s to import",
    "transformers": "extra torch, and 1 s to import",
    "av": "0.2 s to import, and only what opens a video needs it",
    "PIL": "only what reads or draws pictures needs it",
    "matplotlib": "0.5 s to import, and only what draws needs it",
    "grain": "3 s to import, and only what trains needs it",
    "absl": "grain's flags, which must be marked as parsed in processes of workers",
    "orbax": "3 s to import, and only what trains needs it",
    "huggingface_hub": "extra hub",
    "flatbuffers": "extra export",
    "fsspec": "only what opens a link needs it",
    "jax2onnx": "extra onnx, and 2 s to import",
    "onnxruntime": "extra onnx",
    "array_record": "grain brings it, but not on Windows",
    "tensorboardX": "extra tensorboard",
    "fcntl": "Python has it on POSIX systems only",
    "resource": "Python has it on POSIX systems only",
}
# Modules that import others by name, and why.
BY_NAME = {
    "vivit_jax/__init__.py": "public names load on first use",
    "vivit_jax/train/__init__.py": "public names load on first use",
    "vivit_jax/console/program.py": "only the command that was asked for is imported",
    "vivit_jax/processes.py": "a process of its own imports the module of the function it runs",
    "checkpoints_convert/verify.py": "asks whether the extra's packages are there",
}


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def lint(root: Path) -> subprocess.CompletedProcess:
    """What import-linter says of the packages below a directory, with its pyproject.toml."""
    code = "import sys; from importlinter.cli import lint_imports as f; sys.exit(f(no_cache=True))"
    env = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    args = [sys.executable, "-P", "-c", code]
    return subprocess.run(args, cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the packages in which a test plants a fault."""
    root = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_rooms_import_from_lower_floors_only_and_in_no_circle():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "planted, verdict, named",
    [
        (
            {"layers/planted.py": "import vivit_jax.train.loop"},
            "A room imports from lower floors only",
            ("vivit_jax.layers is not allowed to import vivit_jax.train",),
        ),
        (
            {"data/planted.py": "from checkpoints_convert import rules"},
            "A room imports from lower floors only",
            ("vivit_jax.data is not allowed to import checkpoints_convert",),
        ),
        # An import inside a function counts too.
        (
            {"recipes/planted.py": "def f():\n    import vivit_jax.models.build"},
            "A room imports from lower floors only",
            ("vivit_jax.recipes is not allowed to import vivit_jax.models",),
        ),
        (
            {"train/a.py": "from . import b", "train/b.py": "import vivit_jax.train.a"},
            "No circles",
            (".a -> .b", ".b -> .a"),
        ),
        (
            {
                "data/video/a.py": "from vivit_jax.data.datasets import b",
                "data/datasets/b.py": "import vivit_jax.data.video.a",
            },
            "No circles",
            (".video -> .datasets",),
        ),
    ],
)
def test_an_import_that_climbs_or_goes_round_is_named(copy, planted, verdict, named):
    paths = [copy / "vivit_jax" / name for name in planted]
    try:
        for path, line in zip(paths, planted.values(), strict=True):
            path.write_text(f"{line}\n")
        done = lint(copy)
    finally:
        for path in paths:
            path.unlink()
    assert done.returncode == 1, done.stdout + done.stderr
    assert verdict in re.findall(r"^(.*) BROKEN$", done.stdout, re.MULTILINE)
    assert any(name in done.stdout for name in named), done.stdout


def test_every_room_has_its_floor():
    """A new room must be in the contract, or it could import from anywhere."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (floors,) = [each["layers"] for each in settings["contracts"] if each["type"] == "layers"]
    placed = {name.strip() for floor in floors for name in floor.split("|")}
    rooms = {
        f"vivit_jax.{path.stem}"
        for path in (ROOT / "vivit_jax").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists())
        and path.stem not in ("__init__", "__main__")
    }
    assert rooms | {"checkpoints_convert"} == placed


def test_few_files_lie_loose_at_the_root():
    loose = sorted(path.name for path in (ROOT / "vivit_jax").glob("*.py"))
    assert len(loose) <= 13, loose


def late_imports(text: str) -> set[str]:
    """Top-level names of what the functions of a file import."""
    found = set()
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add("." if node.level else node.module.split(".")[0])
    return found


def test_late_imports_are_found_in_functions_alone():
    text = """
        import os
        if TYPE_CHECKING:
            import numpy as np
        class A:
            def f(self):
                with x:
                    import torch.nn as nn, json
                return lambda: None
        async def g():
            def h():
                from PIL.Image import open
                from . import b
    """
    assert late_imports(textwrap.dedent(text)) == {"torch", "json", "PIL", "."}


def test_functions_import_heavy_and_optional_packages_only():
    found = {
        path.relative_to(ROOT).as_posix(): late_imports(path.read_text()) for path in modules()
    }
    # `--version` and errors of usage need no jax.
    for name in ("vivit_jax/console/devices.py", "vivit_jax/console/run.py"):
        assert found.pop(name) <= {*LATE, "jax"}
    other = {name: names - set(LATE) for name, names in found.items() if names - set(LATE)}
    assert not other, f"to the top of the file: {other}"
    assert set().union(*found.values()) == set(LATE)  # no reason is left without an import


def test_only_the_public_names_import_packages_for_type_checkers_alone():
    """The contracts leave such imports out, so that one might climb unseen."""
    found = collections.defaultdict(set)
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                names = re.findall(
                    r"^(?:from|import) ([\w.]+)", ast.unparse(node.body), re.MULTILINE
                )
                found[path.relative_to(ROOT).as_posix()] |= {name.split(".")[0] for name in names}
    assert found.pop("vivit_jax/__init__.py") == set(PACKAGES)
    assert found.pop("vivit_jax/train/__init__.py") == {"vivit_jax"}
    assert found and not [name for name, roots in found.items() if roots & {"", *PACKAGES}]


def test_modules_that_import_by_name_are_known():
    calls = re.compile(r"\b(import_module|__import__)\(")
    found = {p.relative_to(ROOT).as_posix() for p in modules() if calls.search(p.read_text())}
    assert found == set(BY_NAME)


def test_places_in_contributing_exist():
    """Each place of a list exists, and one of the files holds each name in backticks."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    prose, *blocks = re.split(r"^```", text, flags=re.MULTILINE)
    prose, blocks = "".join([prose, *blocks[1::2]]), blocks[::2]
    lists = [block.strip().splitlines() for block in blocks if block.startswith("\n")]
    kinds = "a family, a layout, an augmentation, a backend, a metric, an outcome, a command"
    assert len(lists) == 7, kinds
    for line in (line for lines in lists for line in lines):
        place, what = line.split(maxsplit=1)
        found = [path for path in ROOT.glob(re.sub(r"<\w+>", "*", place)) if path.exists()]
        assert found, place
        for name in re.findall(r"`(\w+)`", what):
            held = re.compile(rf"\b{name}\b")
            assert any(held.search(path.read_text()) for path in found), f"{place}: {name}"
    named = re.findall(r"`([\w.]+/[\w./]*)`", prose)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing
