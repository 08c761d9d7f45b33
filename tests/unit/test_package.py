# SPDX-License-Identifier: Apache-2.0
"""What an index shows of the package: .ci/run builds it; this reads how it is made."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOOK = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
README = (ROOT / "README.md").read_text()


def on_an_index(text: str) -> str:
    """A page as hatch-fancy-pypi-readme substitutes it."""
    for each in HOOK["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    return text


def test_the_readme_on_an_index_has_no_link_into_the_repository():
    shown = on_an_index(README)
    targets = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert targets and all(target.startswith("https://") for target in targets)
    assert "![" not in shown and "docs/pictures" not in shown
    assert "docs/training.md" in shown and "More (docs/measurements.md)" in shown
    headings = [line for line in README.splitlines() if line.startswith("#")]
    assert [line for line in shown.splitlines() if line.startswith("#")] == headings
    # The table of pictures and the line that says what they are: nothing else is gone.
    assert 0 < len(README.splitlines()) - len(shown.splitlines()) <= 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "| ![a](x.png) | ![b](y.png) |\n|---|---|\n\nWhat it is,\nof whom.\n\n## Next\n",
            "## Next\n",
        ),
        ("see [docs/a.md](docs/a.md)", "see docs/a.md"),
        (
            "[more](docs/a.md#part-two), [paper](https://a.b/c)",
            "more (docs/a.md), [paper](https://a.b/c)",
        ),
        ("![there](https://a.b/c.png) ![here](c.png)", "![there](https://a.b/c.png) here"),
        ("[up](#top) and a [list]", "[up](#top) and a [list]"),
    ],
)
def test_what_is_substituted(text, expected):
    assert on_an_index(text) == expected


def test_metadata():
    project = PYPROJECT["project"]
    assert project["dynamic"] == ["readme"] and "readme" not in project
    pythons = [c for c in project["classifiers"] if re.fullmatch(r".* :: 3\.\d+", c)]
    assert [c.rsplit(" ", 1)[1] for c in pythons] == ["3.11", "3.12", "3.13"]
    assert "Typing :: Typed" in project["classifiers"]
    assert not [c for c in project["classifiers"] if c.startswith("License")]  # the field says it
