# SPDX-License-Identifier: Apache-2.0
"""Backends as a `device` parameter, fixed seeds, and the hypothesis profile of the suite."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from dsa_ext import _C

hypothesis.settings.register_profile(
    "dsa", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("dsa")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops(*names): the ops whose backends `device` runs over")


def _devices(ops: tuple[str, ...]) -> list:
    """Run on "cpu" always; on "cuda" where a GPU is and each of the ops has a CUDA kernel."""
    cuda = {kernel["op"] for kernel in _C.kernels() if kernel["device"] == "cuda"}
    devices = [pytest.param("cpu", id="cpu")]
    if torch.cuda.is_available() and cuda and cuda.issuperset(ops):
        devices.append(pytest.param("cuda", id="cuda", marks=pytest.mark.gpu))
    return devices


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("ops")
        metafunc.parametrize("device", _devices(marker.args if marker else ()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20250929)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a developer's DSA_FORCE_KERNEL or DSA_LOG out of the tests."""
    monkeypatch.delenv("DSA_FORCE_KERNEL", raising=False)
    monkeypatch.delenv("DSA_LOG", raising=False)
