"""The kernels compiled for the host, once per session."""

import pytest
from gpu_host_kit import HostMemory, HostWork, kernel_library


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    """Shared library with every kernel as a host function."""
    return kernel_library(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def work(host_kernels):
    return HostWork(host_kernels)


@pytest.fixture
def memory():
    return HostMemory()
