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
