from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prismserve.kernels.native import build, library

COMPILES = "import sys; from pathlib import Path; from prismserve.kernels.native.build import build; print(build(Path(sys.argv[1])))"

needs_compiler = pytest.mark.skipif(
    not any(build.shutil.which(name) for name in build._COMPILERS), reason="no C++ compiler on this machine"
)


@pytest.mark.slow
@needs_compiler
def test_processes_that_start_together_share_one_library_and_leave_nothing_else(tmp_path):
    command = [sys.executable, "-c", COMPILES, str(tmp_path)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {job.communicate(timeout=200)[0].strip() for job in jobs}
    assert len(paths) == 1
    assert [str(path) for path in tmp_path.iterdir()] == list(paths)


@needs_compiler
def test_a_compiled_library_is_found_again_and_other_sources_get_another(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(build, "_compile", lambda _, target: (compiled.append(target), target.touch()))
    first = build.build(tmp_path)
    assert build.build(tmp_path) == first
    assert compiled == [first]
    sources = tmp_path / "source"
    sources.mkdir()
    (sources / "linear.cpp").write_text("int other;")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.build(tmp_path) != first


def test_without_a_compiler_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(build.NativeBuildError, match=r"no C\+\+ compiler"):
        build.build(tmp_path)


@needs_compiler
def test_a_compiler_that_fails_or_hangs_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    sources = tmp_path / "source"
    sources.mkdir()
    (sources / "broken.cpp").write_text("this is not C++")
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(build.NativeBuildError, match="failed"):
        build.build(tmp_path / "out")
    monkeypatch.setattr(build, "_BUILD_TIMEOUT_S", 0.001)
    with pytest.raises(build.NativeBuildError, match="did not finish"):
        build.build(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(build.NativeBuildError, match=r"compiled kernels|no C\+\+ compiler"):
        build.build(tmp_path / "file" / "below")


def test_where_kernels_cannot_be_built_one_warning_is_given_and_pytorch_runs(monkeypatch, caplog):
    def fail():
        message = "no C++ compiler was found"
        raise build.NativeBuildError(message)

    monkeypatch.setattr(library, "_loaded", library._Loaded())
    monkeypatch.setattr(library, "build", fail)
    assert not library.available()
    assert not library.available()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(RuntimeError, match="not available"):
        library.call("linear")


def test_importing_the_package_neither_compiles_nor_loads(tmp_path):
    code = "import prismserve.models.loader, prismserve.kernels.linear as l; from prismserve.kernels.native import library as n; assert not n._loaded.tried"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    assert list(tmp_path.iterdir()) == []
