# SPDX-License-Identifier: Apache-2.0
"""Whether a build has CUDA (cmake/DsaCuda.cmake), and what a source archive holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DSA_CUDA = ROOT / "cmake" / "DsaCuda.cmake"
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


def test_source_archive(tmp_path):
    """What CONTRIBUTING.md names; and the licences of third_party/README.md, for the wheel too."""
    pytest.importorskip("scikit_build_core")
    script = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames()}
        info = archive.extractfile(next(n for n in archive.getnames() if n.endswith("/PKG-INFO")))
        shipped = set(re.findall(r"^License-File: (.+)$", info.read().decode(), re.MULTILINE))
    assert {".ci/run", "Makefile", "tests/python/conftest.py"} <= files
    table = (ROOT / "third_party" / "README.md").read_text(encoding="utf-8")
    texts = {f"third_party/licenses/{name}" for name in re.findall(r"`(\w+\.txt)`", table)}
    assert texts and shipped == texts | {"LICENSE"} <= files
