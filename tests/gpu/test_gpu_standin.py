"""The GPU processor on a stand-in driver: order, threads, memory and arithmetic.

Speed and overlap need a GPU (tests marked ``gpu``, bench/gpu.py). The suites run in
a process of their own, because a stand-in libcuda stays loaded.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_standin_kit import build_standin, why_impossible

HERE = Path(__file__).parent
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    if (why := why_impossible()) is not None:
        pytest.skip(why)
    return build_standin(tmp_path_factory.mktemp("standin"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"order {seed}")
def test_streams_slots_and_failures(standin, seed):
    # What is left or launched does not depend on the order: looked for once.
    once = "leave_nothing or leaves_ or goes_on or launches or one_tile or sees_less"
    options = () if seed == SEEDS[0] else ("-k", f"not ({once})")
    run_suite(standin, HERE / "standin" / "suite_processor.py", seed, *options)


def test_gpu_processor_keeps_the_contract_of_processors(standin):
    contract = HERE.parent / "contract" / "test_processor_contract.py"
    # That estimates do not wait takes 150 iterations to show by the clock, too many
    # for the stand-in; suite_processor.py shows it by the order of the copies.
    # Of several that share the frames, what is between them: order and end.
    several = "own_results or wakes_those"
    chosen = f"gpu and not do_not_wait and (not gpus or {several})"
    run_suite(standin, contract, 3, "-k", chosen)


def run_suite(standin, path, seed, *options):
    """Run pytest on the stand-in; fails with its output."""
    environment = os.environ | {
        "RTFOCUS_STANDIN_DRIVER": str(standin["driver"]),
        "RTFOCUS_STANDIN_CUFFT": str(standin["cufft"]),
        "RTFOCUS_STANDIN_KERNELS": str(standin["kernels"]),
        "RTFOCUS_STANDIN_SEED": str(seed),
        "OMP_NUM_THREADS": "1",
        # Where pytest finds the plugin before it has read its configuration.
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "gpu_standin_plugin"]
    command += [str(path), *options]
    done = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
