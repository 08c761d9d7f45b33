# SPDX-License-Identifier: Apache-2.0
"""The public names: none is lost, and editors and type checkers see those that exist."""

import ast
from pathlib import Path

import pytest

import checkpoints_convert
import vivit_jax
import vivit_jax.train

# A name leaves this list only with an entry in CHANGELOG.md that says what takes its place.
PUBLIC = (
    "CheckpointError", "ConfigError", "Mask", "MissingExtra", "PRESETS", "UserError",
    "VideoClassifier", "VideoError", "VideoMAEConfig", "VideoMAEForPreTraining",
    "VideoMAEForVideoClassification", "VideoMAEModel", "VideoProcessor", "VivitConfig",
    "VivitForVideoClassification", "VivitModel", "dual_mask", "export_model", "extract_features",
    "from_nnx", "from_pretrained", "gather_classes", "init_from_image_model",
    "init_from_pretraining", "init_from_video_model", "map_attention", "probe_video",
    "random_mask", "read_label_map", "read_video", "read_video_pyav", "reconstruct",
    "running_cell", "sample_frame_indices", "save_pretrained", "to_nnx", "tube_mask",
)  # fmt: skip
PUBLIC_IN_TRAIN = (
    "Augment", "Callback", "ClipConfig", "Dataset", "EarlyStop", "Event", "Outcome", "Profile",
    "Recipe", "RunOptions", "TrainState", "apply_settings", "evaluate", "from_objects",
    "read_dataset", "read_params", "recipe_named", "train",
)  # fmt: skip
NAMES = [(vivit_jax, PUBLIC), (vivit_jax.train, PUBLIC_IN_TRAIN)]


@pytest.mark.parametrize("package, names", NAMES)
def test_no_public_name_is_lost(package, names):
    assert sorted(package.__all__) == sorted(names)
    assert set(names) <= set(dir(package))
    for name in names:
        assert getattr(package, name) is not None, name


def imports_for_type_checkers(package) -> dict[str, str]:
    """What `if TYPE_CHECKING:` imports in a package's __init__.py: module by name."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert all(isinstance(node, ast.ImportFrom) and node.level == 0 for node in block.body)
    names = [(alias, node.module) for node in block.body for alias in node.names]
    assert all(alias.asname is None for alias, _ in names)
    return {alias.name: module for alias, module in names}


@pytest.mark.parametrize("package, names", NAMES)
def test_type_checkers_see_what_is_loaded_on_first_use(package, names):
    assert imports_for_type_checkers(package) == package._PUBLIC
    assert package.__all__ == sorted(package._PUBLIC)


@pytest.mark.parametrize("package", [vivit_jax, checkpoints_convert])
def test_packages_say_that_they_are_typed(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("package", [vivit_jax, vivit_jax.train])
def test_a_name_that_is_not_public(package):
    told = f"module '{package.__name__}' has no attribute 'VivitModels'"
    with pytest.raises(AttributeError, match=told):
        _ = package.VivitModels
