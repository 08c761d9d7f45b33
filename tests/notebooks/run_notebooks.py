# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks from a clean kernel; as a program it renews the outputs kept in their files:

python tests/notebooks/run_notebooks.py notebooks/*.ipynb
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# The kernel inherits nothing that changes numbers but this: tiny models spend seconds in the
# compiler for milliseconds of work, so it is lazy here as in the rest of the tests.
LAZY = "--xla_backend_optimization_level=0"
BUSY = ("04_pretrain_and_reconstruct",)  # whose steps take longer than their compilation
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path, directory: Path, seconds: int = 1800) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new kernel whose working directory is `directory`.

    No cell may take longer than `seconds`. Raises nbclient's CellExecutionError for one that fails,
    AssertionError for a picture that does not say what it shows.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
        record_timing=False,
        coalesce_streams=True,
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    own |= {"XLA_FLAGS": "" if path.stem in BUSY else LAZY, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as ipython:
        startup = Path(ipython) / "profile_default" / "startup"
        startup.mkdir(parents=True)
        here = str(Path(__file__).parent)
        watching = f"import sys; sys.path.append({here!r}); import figures; figures.watch()"
        (startup / "watch.py").write_text(f"{watching}; sys.path.pop(); del figures, sys\n")
        client.execute(env=own | {"IPYTHONDIR": ipython})
    for cell in notebook.cells:  # what callbacks raise does not stop the client
        for output in cell.get("outputs", ()):
            assert output.output_type != "error", f"{output.evalue}\n{cell.source}"
    return notebook


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from one machine to the next: kernels, times, names of cells."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def main(paths: list[str]) -> None:
    """Run each notebook and write it back."""
    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as directory:
            notebook = cleaned(executed(path, Path(directory)))
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
