"""Runs the notebooks of docs/, each in an empty folder: for their test, or in place by `python -m tests.notebooks`."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def executed(path):
    """The notebook run from top to bottom; the first error of a cell is raised. What went to stderr is left out."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=resources).execute()
    notebook.metadata.language_info = {"name": "python"}  # and no version of whoever ran it last
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for each in NOTEBOOKS:
        nbformat.write(executed(each), each)
