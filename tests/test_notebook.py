"""examples/fedu.ipynb, executed in a copy of the clone's files."""

import os
import shutil

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbconvert is not installed")
preprocessors = pytest.importorskip("nbconvert.preprocessors", reason="nbconvert is not installed")


def test_the_notebook_runs_from_its_folder(tmp_path, monkeypatch):
    for name in ("assets", "methods", "ops", "report", "runtime"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "examples").mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # so that the runs have several processes, forked from the kernel
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a notebook's kernel sets it
    notebook = nbformat.read(ROOT / "examples/fedu.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"rounds": 2', '"rounds": 1')
    preprocessors.ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": tmp_path / "examples"}})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in shown for shown in data) == 1  # the curves
    assert data[-1]["text/plain"] == "True" and any("torch.Size([10, 128])" in shown["text/plain"] for shown in data)
    assert sorted(os.listdir(tmp_path / "runs")) == ["notebook-fedu", "notebook-images", "notebook-single"]
    texts = "".join(output.text for output in outputs if "text" in output)
    assert texts.count("holds the run") == 2 and "1-NN accuracy" in texts
