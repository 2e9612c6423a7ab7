# SPDX-License-Identifier: Apache-2.0
"""cmake/DsaCuda.cmake: whether a build has CUDA, by DSA_CUDA and the nvcc that is found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DSA_CUDA = Path(__file__).parents[2] / "cmake" / "DsaCuda.cmake"
CMAKE = shutil.which("cmake")

# Stands in for CMake's look at a compiler, so that no nvcc is needed.
FOUND = """
macro(enable_language)
  set(CMAKE_CUDA_COMPILER_VERSION ${nvcc})
endmacro()
macro(find_package)
endmacro()
"""


def configure(tmp_path: Path, option: str, nvcc: str | None) -> subprocess.CompletedProcess[str]:
    if CMAKE is None:
        pytest.skip("needs cmake")
    script = tmp_path / "configure.cmake"
    script.write_text(f"{FOUND}\ninclude({DSA_CUDA})\nmessage(STATUS with=${{DSA_WITH_CUDA}})\n")
    compiler = "NOTFOUND" if nvcc is None else "nvcc"
    options = [f"-DDSA_CUDA={option}", f"-DCMAKE_CUDA_COMPILER={compiler}", f"-Dnvcc={nvcc}"]
    command = [CMAKE, *options, "-P", str(script)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("option", ["AUTO", "ON"])
def test_a_known_nvcc_builds_cuda(tmp_path, option):
    for nvcc in ("12.5.40", "13.0.88"):
        result = configure(tmp_path, option, nvcc)
        assert (result.returncode, result.stderr) == (0, "")
        assert "with=ON" in result.stdout


@pytest.mark.parametrize(("nvcc", "got"), [(None, "none"), ("12.4.131", "12.4.131")])
def test_no_nvcc_or_an_old_one(tmp_path, nvcc, got):
    """An error where CUDA was asked for; else a build without it, not in silence."""
    wanted = f"expected nvcc 12.5 or newer on PATH or in CUDACXX, got {got}"
    forced = configure(tmp_path, "ON", nvcc)
    assert forced.returncode != 0
    assert f"DSA_CUDA=ON: {wanted}" in " ".join(forced.stderr.split())
    found = configure(tmp_path, "AUTO", nvcc)
    assert found.returncode == 0 and "with=OFF" in found.stdout
    assert "CMake Warning" in found.stderr
    assert f"DSA_CUDA=AUTO: {wanted}; this build runs" in " ".join(found.stderr.split())
    silent = configure(tmp_path, "OFF", nvcc)
    assert (silent.returncode, silent.stderr) == (0, "") and "with=OFF" in silent.stdout
