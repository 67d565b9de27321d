"""What several test files share."""

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Fresh weights and inputs are the same in every run, whichever tests run before."""
    torch.manual_seed(0)


@pytest.fixture
def without_shape_checks():
    """As users run the library: jaxtyping's checks, which would refuse some bad input earlier, are off."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder of small notebooks, which the command of a batch uses, too."""
    from tests.small_notebooks import write_notebooks

    folder = write_notebooks(tmp_path / "notebooks")
    monkeypatch.setattr("atoplib.batch.__main__.NOTEBOOKS", folder)
    return folder


@pytest.fixture(scope="session")
def digits():
    """64 test digits (64, 3, 32, 32) in [0, 1] and their labels."""
    from atoplib.data import load_images

    return load_images("mnist5k", 64)


@pytest.fixture(scope="session")
def defences():
    """The kit's own MNIST networks: undefended, AP, AToP, AT. Not to be changed."""
    from atoplib.pretrained import load_pretrained

    return {name: load_pretrained("mnist", name) for name in ("undefended", "AP", "AToP", "AT")}
