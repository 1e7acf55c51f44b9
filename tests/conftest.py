"""What holds for every test: no network, one thread, fixed seeds, and where the folders beside the repository are."""

import os

# Read when the libraries are first imported, so before any test module is. Child processes inherit them.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import vlm  # noqa: F401, I001  puts the torchvision cure in place before transformers or peft is imported

import fcntl
import random
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests that start several processes run one at a time over all workers, module fixtures included. (The groups of pytest-xdist 3.8 do nothing under pytest 9.2.)"""
    if not item.get_closest_marker("ranks"):
        return (yield)
    with open(__file__) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root, of the module's own. A module that needs another one has a `root` of its own."""
    return tiny.data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mixed_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root that also has Parquet and tar files, of the module's own."""
    return tiny.mixed_root(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Reference tensors, one folder per case."""
    return _folder("VLM_GOLDEN", "golden")


@pytest.fixture(scope="session")
def field_folder() -> Path:
    """Inputs that broke others."""
    return _folder("VLM_FIELD", "field")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Small data sets of real pictures."""
    return _folder("VLM_DATA", "data")


def _folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names (it must be there), else ../shared/NAME beside the repository (the test is skipped without it)."""
    named = os.environ.get(variable)
    if named is not None:
        if not Path(named).is_dir():
            pytest.fail(f"{variable} names {named!r}, which is no folder")
        return Path(named)
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.parent.name}/{name} beside the repository, and {variable} is not set")
    return folder
