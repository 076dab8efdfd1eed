"""Pytest plugin that loads the stand-in driver; for a process of its own."""

import ctypes
import os
import warnings

import pytest


def load_driver():
    """Return the stand-in libcuda; by its soname PyCUDA takes it for the real one."""
    return ctypes.CDLL(os.environ["RTFOCUS_STANDIN_DRIVER"], ctypes.RTLD_GLOBAL)


def pytest_configure():
    """Load it before anything asks for libcuda.so.1."""
    load_driver()


@pytest.fixture(scope="session")
def driver():
    """The stand-in libcuda."""
    library = load_driver()
    library.standin_log.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session", autouse=True)
def machine(driver):
    """Make rtfocus see the stand-in's transforms, kernels and networks."""
    from gpu_standin_kit import pretend

    transforms = ctypes.CDLL(os.environ["RTFOCUS_STANDIN_CUFFT"])
    with pytest.MonkeyPatch.context() as patch:
        pretend(driver, transforms, patch.setattr)
        yield


@pytest.fixture(autouse=True)
def nothing_left(driver):
    """Every test frees what it made, in the right thread: PyCUDA warns otherwise."""
    before = driver.standin_live()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert driver.standin_live() == before
