# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from a clean kernel, say what their files say, and look as they should."""

import re
from pathlib import Path

import figures
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from run_notebooks import METADATA, executed, main

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_LINES = 30  # of a cell: a screen
MOST_BYTES = 10**6
# Whole numbers and words have to be the same, decimals nearly: rounding has a part in them, and in
# what little training learns in a few steps. Errors of rounding are written with an exponent; one
# below ROUNDING is as good as another, and above it a power of ten is compared, not digits.
DECIMALS = re.compile(r"-?\d+\.\d*(?:e[-+]?\d+)?|-?\d+e[-+]?\d+")
# Times and rates are the machine's: a decimal followed by a unit of time, or by "something/s".
TIMES = re.compile(rf"(?:{DECIMALS.pattern})(?= ?(?:(?:ms|us|s|min|seconds?|minutes?)\b|\w+/s\b))")
RELATIVE, ABSOLUTE, ROUNDING = 0.05, 0.005, 1e-4
# Hundreds of steps carry another processor's rounding into every decimal.
TRAINED = ("03_finetune_your_clips", "04_pretrain_and_reconstruct", "05_attention", "08_nnx")
NOISE = re.compile(r"Traceback|Warning|site-packages|(?<![\w.])/(home|root|tmp|usr|Users|work)/")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_and_numbers(text):
    """The text with # for each decimal and without spacing, and the decimals as written."""
    text = TIMES.sub("(time)", text)
    return " ".join(DECIMALS.sub("#", text).split()), DECIMALS.findall(text)


def said(cell):
    """Of each output of a cell its kind, its text with # for decimals, and the decimals."""
    found = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            found.append((output.name, *text_and_numbers(output.text)))
        elif output.output_type == "execute_result":
            kinds = " ".join(sorted(data))
            found.append((kinds, *text_and_numbers(data.get("text/plain", ""))))
        else:
            found.append((output.output_type, " ".join(sorted(data)), []))
    return found


def near(old, new):
    """Whether two decimals, as written, differ by no more than rounding and machines explain."""
    a, b = float(old), float(new)
    if "e" in old + new:
        low, high = sorted(max(abs(value), ROUNDING) for value in (a, b))
        return high <= 10 * low
    return abs(a - b) <= max(ABSOLUTE, RELATIVE * abs(a))


def differences(old, new, decimals=True):
    """What of the outputs of two cells is not the same, one line each."""
    was, now = said(old), said(new)
    if [entry[:2] for entry in was] != [entry[:2] for entry in now]:
        return [f"{[entry[:2] for entry in now]}, kept: {[entry[:2] for entry in was]}"]
    if not decimals:
        return []
    pairs = [pair for x, y in zip(was, now, strict=True) for pair in zip(x[2], y[2], strict=True)]
    return [f"{b}, kept: {a}" for a, b in pairs if not near(a, b)]


def texts(cell):
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def test_there_are_eight():
    assert len(NOTEBOOKS) == 8


@pytest.mark.slow  # together they take two minutes of two cores
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_says_what_its_file_says(path, tmp_path):
    kept, new = nbformat.read(path, as_version=4), executed(path, tmp_path)
    for number, (old, cell) in enumerate(zip(code(kept), code(new), strict=True)):
        found = differences(old, cell, decimals=path.stem not in TRAINED)
        assert not found, f"code cell {number}, which begins with\n{old.source[:200]}"


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
        assert all(output.output_type != "error" for output in cell.outputs)
        assert not any(NOISE.search(text) for text in texts(cell))


def test_cells_are_short_and_there_are_pictures(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert sum(len(pictures(cell)) for cell in code(notebook)) >= 1
    for cell in code(notebook):
        assert cell.source.count("\n") < MOST_LINES, cell.source


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("", None),
        ("plot.set_title('')", "there is no title"),
        ("plot.set_xlabel('')", "the x axis of 'errors' has no name"),
        ("plot.set_ylabel(''); plot.set_yticks([0, 1], ['zero', 'one'])", None),
        ("bar.remove()", "without a colour bar"),
        ("bar.set_label('')", "a colour bar does not say"),
        ("bar.remove(); image.set_cmap('gray')", None),
    ],
)
def test_what_a_picture_has_to_say(change, told):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (plot, shown) = plt.subplots(1, 2)
    plot.plot([0, 1])
    plot.set(title="errors", xlabel="step", ylabel="loss")
    image = shown.imshow([[0, 1]])
    bar = figure.colorbar(image, label="attention")
    exec(change, dict(plot=plot, image=image, bar=bar))
    found = figures.problems(figure)
    plt.close(figure)
    assert told in found[0] if told else not found


@pytest.mark.slow
@pytest.mark.parametrize("show", ["plt.show()", "None;"])
def test_a_picture_that_does_not_say_what_it_shows_fails_its_notebook(tmp_path, show):
    draw = "import matplotlib.pyplot as plt\nplt.plot([0, 1]);"
    named = f"{draw} plt.title('a'), plt.xlabel('b'), plt.ylabel('c');"
    good, _ = code(executed(write(tmp_path / "a.ipynb", f"{named} {show}", "1"), tmp_path))
    assert len(pictures(good)) == len(good.outputs) == 1
    path = write(tmp_path / "b.ipynb", f"{draw} {show}", "1")
    with pytest.raises(AssertionError, match="there is no title; the x axis of 'a plot' has no na"):
        executed(path, tmp_path)


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
    assert said(first) == [("stdout", "JAX_PLATFORMS cpu value #", ["0.30000000000000004"])]
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
        ("loss 0.511 of 8\n", "loss  0.509 of 8", True),
        ("loss 0.51 of 8", "loss 0.61 of 8", False),
        ("1.28 GiB", "2.56 GiB", False),
        ("[-2.05  2.67]", "[-2.05 -2.67]", False),
        ("PyTorch [0.5 0.6]", "PyTorch [0.5 0.6 0.7]", False),
        ("difference 3.1e-06", "difference 0.0e+00", True),
        ("difference 3.1e-06", "difference 2.0e-02", False),
        ("CAUGHT 2.8e-02", "CAUGHT 3.1e-02", True),
        ("CAUGHT 2.3e+00", "CAUGHT 2.3e-02", False),
        ("took 1.5 s, 20.1 ms", "took 9.5 s, 80.7 ms", True),
        ("12.5 clips/s", "99.5 clips/s", True),
        ("1.5 samples", "9.5 samples", False),
        ("8 tokens", "9 tokens", False),
        ("agrees 0.5", "DIFFERS 0.5", False),
    ],
)
@pytest.mark.parametrize("kind", ["stream", "execute_result"])
def test_what_counts_as_the_same_text(old, new, same, kind):
    def cell(text):
        fields = {"name": "stdout", "text": text}
        if kind == "execute_result":
            fields = {"data": {"text/plain": text}, "execution_count": 1}
        return nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output(kind, **fields)])

    assert (not differences(cell(old), cell(new))) is same


def test_a_wrong_number_in_a_kept_file_is_found():
    kept = nbformat.read(ROOT / "notebooks" / "07_mesh.ipynb", as_version=4)
    wrong = nbformat.from_dict(kept)
    (cell,) = (c for c in code(wrong) if any("1.28 GiB" in t for t in texts(c)))
    assert not differences(cell, cell)
    right = nbformat.from_dict(cell)
    cell.outputs[0].text = cell.outputs[0].text.replace("1.28 GiB", "1.82 GiB")
    assert differences(right, cell) == ["1.82, kept: 1.28"]


def test_the_text_of_a_figure_is_not_compared():
    def cell(text):
        data = {"image/png": "", "text/plain": text}
        return nbformat.v4.new_code_cell(
            "", outputs=[nbformat.v4.new_output("display_data", data=data)]
        )

    assert not differences(cell("<Figure 0.5>"), cell("<Figure 0.9>"))


def test_a_lost_picture_is_seen():
    picture = nbformat.v4.new_output("display_data", data={"image/png": "", "text/plain": ""})
    cell, empty = nbformat.v4.new_code_cell("", outputs=[picture]), nbformat.v4.new_code_cell("")
    assert differences(cell, empty) and not differences(cell, cell)
