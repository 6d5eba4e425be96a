"""One of the notebooks, executed as `make tutorials` executes all of them."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copy

import nbformat

TUTORIALS = Path(__file__).parents[2] / "tutorials"


def test_a_notebook_executes_and_shows_what_its_saved_form_shows(tmp_path):
    spec = importlib.util.spec_from_file_location("execute", TUTORIALS / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    saved = TUTORIALS / "4_which_features_interact.ipynb"
    path = Path(copy(saved, tmp_path))
    with ThreadPoolExecutor(1) as pool:  # a thread of its own: an open browser has this one's event loop
        pool.submit(execute.execute, path).result()  # raises where a cell does
    again, before = (nbformat.read(one, as_version=4).cells for one in (path, saved))
    assert [cell.source for cell in again] == [cell.source for cell in before]
    kinds = [
        [[output.output_type for output in cell.get("outputs", [])] for cell in cells] for cells in (again, before)
    ]
    assert kinds[0] == kinds[1]
    assert sum(map(len, kinds[0])) > 5
