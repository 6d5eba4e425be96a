"""Execute the notebooks of this folder in place: `python tutorials/execute.py [NOTEBOOK ...]`, all of them unless named.

What is saved says what a reader has to see and nothing about the run: no progress bars, warnings, execution times or versions,
so that executing again changes little.
"""

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> float:
    """Execute one notebook in a temporary folder and save it with its outputs; returns the seconds it took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the notebook stays as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name=KERNEL["name"],
            timeout=None,  # a cell takes as long as the machine needs
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    seconds = time.perf_counter() - started
    partial = path.with_suffix(".partial")
    nbformat.write(cleaned(notebook), partial)
    partial.replace(path)
    return seconds


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from run to run."""
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02}", NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if shown(output)]
    return notebook


def shown(output: NotebookNode) -> bool:
    """Whether an output is for the reader: no warning or progress bar, which go to stderr or are widgets."""
    return output.get("name") != "stderr" and WIDGET not in output.get("data", {})


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all, and say how long each took."""
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb")):
        print(f"{path.name}: {execute(path):.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
