# SPDX-License-Identifier: Apache-2.0
"""The public names: none is lost, and editors and type checkers see those that exist."""

import ast
from pathlib import Path

import pytest

import checkpoints_convert
import vivit_jax

# A name leaves this list only with an entry in CHANGELOG.md that says what takes its place.
PUBLIC = (
    "CheckpointError", "ConfigError", "Mask", "MissingExtra", "PRESETS", "UserError",
    "VideoClassifier", "VideoError", "VideoMAEConfig", "VideoMAEForPreTraining",
    "VideoMAEForVideoClassification", "VideoMAEModel", "VideoProcessor", "VivitConfig",
    "VivitForVideoClassification", "VivitModel", "dual_mask", "export_model", "extract_features",
    "from_pretrained", "gather_classes", "init_from_image_model", "init_from_pretraining",
    "init_from_video_model", "map_attention", "probe_video", "random_mask", "read_label_map",
    "read_video", "read_video_pyav", "reconstruct", "running_cell", "sample_frame_indices",
    "save_pretrained", "tube_mask",
)  # fmt: skip


def test_no_public_name_is_lost():
    assert sorted(vivit_jax.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(vivit_jax))
    for name in PUBLIC:
        assert getattr(vivit_jax, name) is not None, name


def imports_for_type_checkers() -> dict[str, str]:
    """What `if TYPE_CHECKING:` imports in vivit_jax/__init__.py: module by name."""
    tree = ast.parse(Path(vivit_jax.__file__).read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert all(isinstance(node, ast.ImportFrom) and node.level == 0 for node in block.body)
    names = [(alias, node.module) for node in block.body for alias in node.names]
    assert all(alias.asname is None for alias, _ in names)
    return {alias.name: module for alias, module in names}


def test_type_checkers_see_what_is_loaded_on_first_use():
    assert imports_for_type_checkers() == vivit_jax._PUBLIC
    assert vivit_jax.__all__ == sorted(vivit_jax._PUBLIC)


@pytest.mark.parametrize("package", [vivit_jax, checkpoints_convert])
def test_packages_say_that_they_are_typed(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()


def test_a_name_that_is_not_public():
    with pytest.raises(AttributeError, match="module 'vivit_jax' has no attribute 'VivitModels'"):
        _ = vivit_jax.VivitModels
