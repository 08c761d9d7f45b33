# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from a clean kernel, say what their files say, and look as they should."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from run_notebooks import METADATA, executed, main

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_LINES = 30  # of a cell: a screen
MOST_BYTES = 10**6
# What rounding and the machine have a part in; whole numbers and words have to be the same.
DECIMALS = re.compile(r"-?\d+\.\d*(e[-+]?\d+)?|-?\d+e[-+]?\d+")
NOISE = re.compile(r"Traceback|Warning|site-packages|(?<![\w.])/(home|root|tmp|usr|Users|work)/")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell):
    """Kinds of a cell's outputs, and their text without decimals and spacing."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append((output.name, " ".join(DECIMALS.sub("#", output.text).split())))
        else:
            found.append((output.output_type, *sorted(output.get("data", {}))))
    return found


def texts(cell):
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def test_there_are_seven():
    assert len(NOTEBOOKS) == 7


@pytest.mark.slow  # together they take two minutes of two cores
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_its_file_says(path, tmp_path):
    kept, new = nbformat.read(path, as_version=4), executed(path, tmp_path)
    for number, (old, cell) in enumerate(zip(code(kept), code(new), strict=True)):
        assert said(cell) == said(old), f"code cell {number}, which begins with\n{old.source[:200]}"


def test_outputs_are_kept_whole_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    assert notebook.metadata == METADATA
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in notebook.cells:
        assert cell.metadata == {}
    for cell in cells:
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        assert not any(NOISE.search(text) for text in texts(cell))


def test_cells_are_short_and_pictures_have_titles(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert sum(len(pictures(cell)) for cell in code(notebook)) >= 1
    functions = "\n".join(cell.source for cell in code(notebook) if "\ndef " in "\n" + cell.source)
    for cell in code(notebook):
        assert cell.source.count("\n") < MOST_LINES, cell.source
        if pictures(cell):
            drawn = cell.source + (functions if "subplots" not in cell.source else "")
            assert "title" in drawn, cell.source


def write(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_renewing_keeps_outputs_and_nothing_of_the_machine(tmp_path, capsys):
    # The kernel takes over neither the settings of the tests nor those of who runs them.
    ask = "import os; print('JAX_PLATFORMS', os.environ['JAX_PLATFORMS'], 'value', 0.1 + 0.2)"
    path = write(tmp_path / "small.ipynb", ask, "[1, 2]")
    main([str(path)])
    notebook = nbformat.read(path, as_version=4)
    assert "small.ipynb" in capsys.readouterr().out
    assert notebook.metadata == METADATA
    assert [cell.id for cell in notebook.cells] == ["cell-0", "cell-1"]
    first, second = notebook.cells
    assert said(first) == [("stdout", "JAX_PLATFORMS cpu value #")]
    assert second.outputs[0].data["text/plain"] == "[1, 2]" and second.metadata == {}


def test_a_cell_that_fails_is_an_error_and_the_file_stays(tmp_path):
    path = write(tmp_path / "bad.ipynb", "print('before')", "assert 1 > 2, 'never'")
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="never"):
        main([str(path)])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("loss 0.51 of 8\n", "loss  0.49 of 8", True),
        ("loss 3.1e-06", "loss 0.0e+00", True),
        ("8 tokens", "9 tokens", False),
        ("agrees 0.5", "DIFFERS 0.5", False),
    ],
)
def test_what_counts_as_the_same_text(old, new, same):
    stream = nbformat.v4.new_output
    cells = [
        nbformat.v4.new_code_cell("", outputs=[stream("stream", name="stdout", text=text)])
        for text in (old, new)
    ]
    assert (said(cells[0]) == said(cells[1])) is same


def test_a_lost_picture_is_seen():
    picture = nbformat.v4.new_output("display_data", data={"image/png": "", "text/plain": ""})
    cell, empty = nbformat.v4.new_code_cell("", outputs=[picture]), nbformat.v4.new_code_cell("")
    assert said(cell) != said(empty)
