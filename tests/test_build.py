"""Building: source archive, wheel into an empty environment, missing compilers, the CUDA switches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

RUN_AN_OP = """
import json, sys, torch, specfuse
from specfuse import TokenTree, verify_tree
import specfuse.kernels.verify_tree_ref
from specfuse.ops import implementations, self_test
tree = TokenTree.from_sequences([1], [[[5, 7], [6, 8]]])
logits = torch.zeros(1, tree.tokens.shape[1], 11)
tokens = tree.tokens[0].tolist()
logits[0, 0, 6] = logits[0, tokens.index(6), 8] = logits[0, tokens.index(8), 9] = 1.0
accepted = verify_tree(logits, tree)
path = [tokens[node] for node in accepted.path[0].tolist() if node >= 0]
print(json.dumps({"file": specfuse.__file__, "path": path, "next": accepted.next_token.tolist(),
                  "implementations": implementations(), "self_test": self_test()}))
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    line = [str(part) for part in command]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=550)


def build(kind: str, source: Path, target: Path, **environment: str) -> Path:
    """Calls the build backend as pip does, with the packages of this environment instead of fetched ones."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as b; print('built', b.build_{kind}({str(target)!r}))"
    done = run(sys.executable, "-c", code, cwd=source, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return target / done.stdout.rsplit("built ", 1)[1].strip()


def install(wheel: Path, directory: Path) -> Path:
    """An empty virtual environment with the wheel in it; torch and the rest are found where they are now."""
    done = run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent)
    assert done.returncode == 0, done.stderr
    python = directory / "bin" / "python"
    arguments = ["--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    done = run(sys.executable, "-m", "pip", *arguments, cwd=directory.parent)
    assert done.returncode == 0, done.stderr
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory)
    # A path in a .pth file is searched, but the .pth files in it (an editable specfuse) are not read.
    Path(site.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(source_archive: Path) -> Path:
    with tarfile.open(source_archive) as archive:
        archive.extractall(source_archive.parent, filter="data")
    return source_archive.parent / source_archive.name.removesuffix(".tar.gz")


def test_source_archive_holds_everything(unpacked: Path) -> None:
    wanted = [ROOT / name for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py")]
    for folder in ("csrc", "kernels", "specfuse", "tests", "benchmarks"):
        wanted += [p for p in (ROOT / folder).rglob("*") if p.is_file()]
    suffixes = {".so", ".pyc"}
    for path in wanted:
        if path.suffix not in suffixes and path.name != "_build_info.json":
            assert (unpacked / path.relative_to(ROOT)).exists(), path.relative_to(ROOT)
    assert not list(unpacked.rglob("*.so")) and not list(unpacked.rglob("_build_info.json"))


@needs_compiler
def test_wheel_in_an_empty_environment_runs_an_op(unpacked: Path, tmp_path: Path) -> None:
    wheel = build("wheel", unpacked, tmp_path / "dist", SPECFUSE_CUDA="0")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("specfuse/_C_cpu") for name in names)
    assert {"specfuse/kernels/verify_tree_ref.py", "specfuse/py.typed", "specfuse/_build_info.json"} <= set(
        names
    )
    assert not any(name.startswith(("tests", "kernels", "csrc", "benchmarks")) for name in names)
    python = install(wheel, tmp_path / "environment")
    done = run(python, "-c", RUN_AN_OP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert Path(result["file"]).is_relative_to(tmp_path / "environment")
    assert result["path"] == [1, 6, 8] and result["next"] == [9]
    chosen = result["implementations"]
    assert {chosen[op]["cpu"] for op in ("verify_tree", "compact_kv")} == {"C++"}
    assert set(result["self_test"].values()) == {"ok"}
    done = run(tmp_path / "environment" / "bin" / "specfuse", "--version", cwd=tmp_path)
    assert done.stdout.strip() == "0.1.0", done.stderr


def test_without_a_compiler_it_installs_and_runs_eagerly(unpacked: Path, tmp_path: Path) -> None:
    wheel = build("wheel", unpacked, tmp_path / "dist", CXX="no-such-compiler")
    assert not any("_C_" in name for name in zipfile.ZipFile(wheel).namelist())
    python = install(wheel, tmp_path / "environment")
    done = run(python, "-c", RUN_AN_OP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == [1, 6, 8] and result["next"] == [9]
    assert {devices["cpu"] for devices in result["implementations"].values()} == {"eager reference"}
    done = run(python, "-m", "specfuse.cli.main", "doctor", cwd=tmp_path)
    assert done.returncode == 0 and "no C++ compiler found (looked for no-such-compiler)" in done.stdout


# ------------------------------------------------- a small project, to try the switches quickly

# Python's own C interface, not pybind11: these compile in a moment.
MODULE = """
#include <Python.h>
int kernel();
static PyObject* value(PyObject*, PyObject*) {{ return PyLong_FromLong({value}); }}
static PyMethodDef methods[] = {{{{"value", value, METH_NOARGS, ""}}, {{}}}};
static PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{name}", "", -1, methods}};
PyMODINIT_FUNC __attribute__((visibility("default"))) PyInit_{name}() {{ return PyModule_Create(&module); }}
"""
# Writes its arguments to a log and compiles the file as plain C++.
FAKE_NVCC = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_100\\n'; exit 0;; esac
case "$*" in *--version*) echo 'release 99.0, V99.0.1'; exit 0;; esac
for last; do :; done
while [ $# -gt 0 ]; do case "$1" in *.cu) source=$1;; esac; shift; done
exec g++ -fPIC -x c++ -c "$source" -o "$last"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project with blank"
    for name in ("csrc", "kernels", "specfuse"):
        (folder / name).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("# test\n")
    (folder / "specfuse" / "__init__.py").touch()
    (folder / "csrc" / "bindings_cpu.cpp").write_text(MODULE.format(name="_C_cpu", value=2))
    return folder


@pytest.fixture
def toolkit(tmp_path: Path, project: Path) -> Path:
    """A CUDA toolkit whose nvcc is a script, and CUDA sources in the project."""
    home = tmp_path / "toolkit"
    for name in ("bin", "include", "lib64"):
        (home / name).mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    subprocess.run(["ar", "rc", str(home / "lib64" / "libcudart_static.a")], check=True)
    (home / "bin" / "nvcc").write_text(FAKE_NVCC.format(log=tmp_path / "nvcc.log"))
    (home / "bin" / "nvcc").chmod(0o755)
    (project / "csrc" / "kernel.cu").write_text("int kernel() { return 3; }\n")
    (project / "csrc" / "bindings_cuda.cpp").write_text(MODULE.format(name="_C_cuda", value="kernel()"))
    return home


def build_here(project: Path, **environment: str) -> tuple[int, str, dict[str, dict[str, object]]]:
    """``setup.py build_ext --inplace``: exit code, output, modules of the build info."""
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, **environment)
    info = project / "specfuse" / "_build_info.json"
    return (
        done.returncode,
        done.stdout + done.stderr,
        json.loads(info.read_text())["modules"] if info.exists() else {},
    )


@needs_compiler
def test_build_is_incremental_and_cleans_up_after_itself(project: Path) -> None:
    code, output, modules = build_here(project, SPECFUSE_CUDA="0")
    assert code == 0 and modules["_C_cpu"]["built"], output
    assert modules["_C_cuda"] == {"built": False, "reason": "left out by SPECFUSE_CUDA=0"}
    code, output, _ = build_here(project, SPECFUSE_CUDA="0")
    assert code == 0 and "no work to do" in output
    done = run(sys.executable, "-c", "import specfuse._C_cpu as c; print(c.value())", cwd=project)
    assert done.stdout == "2\n"
    code, _, modules = build_here(project, SPECFUSE_NATIVE="0")
    assert code == 0 and modules["_C_cpu"] == {"built": False, "reason": "left out by SPECFUSE_NATIVE=0"}
    assert not list((project / "specfuse").glob("_C_*")), "the module of the earlier build is gone"


@needs_compiler
def test_a_compile_error_fails_the_build(project: Path) -> None:
    (project / "csrc" / "broken.cpp").write_text("int f( {\n")
    code, output, _ = build_here(project, SPECFUSE_CUDA="0")
    assert code != 0 and "building _C_cpu" in output and "SPECFUSE_NATIVE=0" in output


@needs_compiler
def test_cuda_is_compiled_for_every_architecture(project: Path, toolkit: Path, tmp_path: Path) -> None:
    code, output, modules = build_here(project, CUDA_HOME=str(toolkit))
    assert code == 0 and modules["_C_cuda"]["built"], output
    # This nvcc knows 80, 90 and 100 of the default list.
    assert modules["_C_cuda"]["archs"] == ["80", "90", "100"] and modules["_C_cuda"]["ptx"] == "100"
    log = (tmp_path / "nvcc.log").read_text()
    for arch in ("80", "90", "100"):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in log
    assert "-gencode=arch=compute_100,code=compute_100" in log
    done = run(sys.executable, "-c", "import specfuse._C_cuda as c; print(c.value())", cwd=project)
    assert done.stdout == "3\n", done.stderr


@needs_compiler
def test_architectures_can_be_chosen(project: Path, toolkit: Path) -> None:
    _, _, modules = build_here(project, CUDA_HOME=str(toolkit), SPECFUSE_CUDA_ARCHS="8.0, 90a")
    assert modules["_C_cuda"]["archs"] == ["80", "90a"]
    code, output, modules = build_here(project, CUDA_HOME=str(toolkit), SPECFUSE_CUDA_ARCHS="70")
    assert code == 0 and "does not know architecture 70" in str(modules["_C_cuda"]["reason"])
    code, output, _ = build_here(project, CUDA_HOME=str(toolkit), SPECFUSE_CUDA_ARCHS="ninety")
    assert code != 0 and "SPECFUSE_CUDA_ARCHS has 'ninety'" in output


@needs_compiler
def test_failing_cuda_is_reported_and_the_cpu_goes_on(project: Path, toolkit: Path) -> None:
    (project / "csrc" / "kernel.cu").write_text("int kernel( {\n")
    code, _, modules = build_here(project, CUDA_HOME=str(toolkit))
    assert code == 0 and modules["_C_cpu"]["built"]
    assert "building _C_cuda" in str(modules["_C_cuda"]["reason"])
    code, output, _ = build_here(project, CUDA_HOME=str(toolkit), SPECFUSE_CUDA="1")
    assert code != 0 and "building _C_cuda" in output


@needs_compiler
def test_missing_static_runtime_is_a_reason(project: Path, toolkit: Path) -> None:
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    code, _, modules = build_here(project, CUDA_HOME=str(toolkit))
    assert code == 0 and "libcudart_static.a not found" in str(modules["_C_cuda"]["reason"])
    code, output, _ = build_here(project, CUDA_HOME=str(toolkit), SPECFUSE_CUDA="1")
    assert code != 0 and "SPECFUSE_CUDA=1, but static CUDA runtime" in output


@pytest.mark.parametrize(("name", "value"), [("SPECFUSE_CUDA", "2"), ("SPECFUSE_NATIVE", "yes")])
def test_wrong_switch_is_named(project: Path, name: str, value: str) -> None:
    code, output, _ = build_here(project, **{name: value})
    assert code != 0 and f"{name} must be one of" in output and repr(value) in output
