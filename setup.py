"""Builds the two native modules of specfuse with ninja; everything else is in pyproject.toml.

``specfuse._C_cpu`` is every ``csrc/*.cpp`` but bindings_cuda.cpp; ``specfuse._C_cuda`` is ``csrc/*.cu`` and
bindings_cuda.cpp. Neither includes a torch header: a build needs pybind11, ninja, a C++17 compiler and, for
the second, nvcc. What was built, and why not where it was not, goes to ``specfuse/_build_info.json``.

Environment:
    SPECFUSE_NATIVE      1 (default) builds native code, 0 leaves it out: ops run on their eager reference.
    SPECFUSE_CUDA        auto (default) builds CUDA where a toolchain is found, 1 insists, 0 leaves it out.
    SPECFUSE_CUDA_ARCHS  compute capabilities, default "80;86;89;90;100;120"; PTX of the last one is added.
    CXX, CUDA_HOME       compiler and CUDA toolkit to use. MAX_JOBS: compile jobs at a time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

Builder = Callable[[Path], dict[str, object]]
ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;86;89;90;100;120"
# Contraction would let a clone compiled for FMA round differently from the portable one.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-lineinfo"]


class BuildSkipped(Exception):
    """A native module cannot be built here; the text is the reason that doctor shows."""


def say(text: str) -> None:
    print(f"specfuse: {text}", file=sys.stderr, flush=True)


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).strip().lower() or default
    if value not in allowed:
        raise SystemExit(f"specfuse: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def find_cxx() -> str:
    """Returns the C++ compiler's path, from CXX or from PATH."""
    wanted = os.environ.get("CXX", "").split()
    for name in wanted[:1] or ["g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise BuildSkipped(f"no C++ compiler found (looked for {' '.join(wanted[:1]) or 'g++, c++, clang++'})")


def find_ninja() -> str:
    try:
        import ninja

        if path := shutil.which("ninja", path=ninja.BIN_DIR):
            return path
    except ImportError:
        pass
    if path := shutil.which("ninja"):
        return path
    raise BuildSkipped("ninja not found")


def find_pybind11() -> tuple[Path, str]:
    """Returns the include directory of pybind11 and its version."""
    try:
        import pybind11

        return Path(pybind11.get_include()), pybind11.__version__
    except ImportError:
        pass
    # torch brings a copy of pybind11's headers: enough for `setup.py build_ext` on a machine without network.
    torch = importlib.util.find_spec("torch")
    include = Path(torch.origin).parent / "include" if torch and torch.origin else None
    if include and (include / "pybind11" / "pybind11.h").exists():
        return include, "of-torch"
    raise BuildSkipped("pybind11 not found (pip install pybind11)")


def find_headers() -> list[Path]:
    """Returns the include directories of Python and pybind11."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildSkipped(f"Python.h not found in {python} (install the Python development headers)")
    include, version = find_pybind11()
    # An isolated build installs pybind11 into a new temporary directory each time; a copy beside the objects
    # keeps its path and file times, and with them the incremental build.
    copy = ROOT / "build" / f"pybind11-{version}"
    if not copy.exists():
        shutil.copytree(include / "pybind11", copy / "pybind11")
    return [python, copy]


def cuda_roots() -> list[Path]:
    """Lists places where a CUDA toolkit may be: a full one, or the folder of pip's nvidia wheels."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        # nvcc may be a link or a wrapper script; only nvcc itself knows where the toolkit is.
        top = re.search(r"^#\$ TOP=(.+)$", output_of([on_path, "--dryrun", "x.cu"]), re.MULTILINE)
        roots += [Path(top.group(1))] if top else []
        roots += [Path(on_path).resolve().parents[1]]
    site = Path(sysconfig.get_path("purelib"))
    roots += [
        Path("/usr/local/cuda"),
        *sorted(site.glob("nvidia/cu[0-9]*"), reverse=True),
        site / "nvidia/cuda_nvcc",
    ]
    return [root.resolve() for root in roots]


def first_with(directories: list[Path], name: str, what: str) -> Path:
    for directory in directories:
        if (directory / name).exists():
            return directory
    raise BuildSkipped(f"{what}: {name} not found in {', '.join(map(str, directories))}")


def find_cuda() -> tuple[Path, Path, Path]:
    """Returns nvcc, the directory of cuda_runtime.h and the directory of libcudart_static.a."""
    nvcc_root = next((root for root in cuda_roots() if (root / "bin/nvcc").exists()), None)
    if nvcc_root is None:
        raise BuildSkipped("nvcc not found (set CUDA_HOME or put nvcc on PATH)")
    target = f"targets/{platform.machine().replace('aarch64', 'sbsa')}-linux"
    # In pip's older layout headers and libraries lie in the sibling folder nvidia/cuda_runtime.
    bases = [nvcc_root, nvcc_root / target, nvcc_root.parent / "cuda_runtime"]
    include = first_with(
        [b / "include" for b in bases], "cuda_runtime.h", f"nvcc is in {nvcc_root}, its headers not"
    )
    libraries = [b / folder for b in bases for folder in ("lib64", "lib")]
    library = first_with(libraries, "libcudart_static.a", "static CUDA runtime")
    return nvcc_root / "bin/nvcc", include, library


def choose_archs(nvcc: Path) -> list[str]:
    """Reads SPECFUSE_CUDA_ARCHS; of the default list only what this nvcc knows is kept."""
    asked = os.environ.get("SPECFUSE_CUDA_ARCHS", "").strip()
    archs = [a.replace(".", "") for a in re.split(r"[;,\s]+", asked or DEFAULT_ARCHS) if a]
    if bad := [a for a in archs if not re.fullmatch(r"\d{2,3}[af]?", a)]:
        raise SystemExit(f"specfuse: SPECFUSE_CUDA_ARCHS has {bad[0]!r}; expected numbers such as 80;90;100")
    known = set(re.findall(r"compute_(\d+)", output_of([str(nvcc), "--list-gpu-arch"])))
    unknown = [a for a in archs if known and a.rstrip("af") not in known]
    if unknown and asked:
        raise BuildSkipped(
            f"{nvcc} does not know architecture {', '.join(unknown)}, asked for by SPECFUSE_CUDA_ARCHS"
        )
    return [a for a in archs if a not in unknown]


def arch_flags(archs: list[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*codes, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def quote(path: object) -> str:
    """Escapes a path in a ninja build line."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def words(*parts: object) -> str:
    """Joins arguments into a ninja command."""
    return " ".join(f"'{p}'" if " " in str(p) else str(p) for p in parts).replace("$", "$$")


def ninja_text(rules: dict[str, str], sources: list[Path], link: str, target: Path) -> str:
    """Writes a build file: one rule per source suffix, then the link of all objects."""
    lines = []
    for suffix, command in rules.items():
        lines += [f"rule compile_{suffix}", f"  command = {command} -MD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $in"]
    lines += ["rule link", f"  command = {link}", "  description = link $out"]
    objects = []
    for source in sources:
        objects.append(f"{source.name}.o")
        lines.append(f"build {source.name}.o: compile_{source.suffix[1:]} {quote(source)}")
    lines.append(f"build {quote(target.name)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def run_ninja(ninja: str, directory: Path, text: str, target: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    build_file = directory / "build.ninja"
    if not build_file.exists() or build_file.read_text() != text:
        build_file.write_text(text)
    jobs = os.environ.get("MAX_JOBS", "").strip()
    command = [ninja, "-C", str(directory), *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stderr.write(done.stdout)
    if done.returncode:
        failed = re.search(r"error:.*|FAILED:.*", done.stdout)
        raise RuntimeError(
            f"building {target.name} failed: {failed.group(0) if failed else 'see the output above'}"
        )
    return directory / target.name


def build_cpu(target: Path) -> dict[str, object]:
    """Compiles specfuse._C_cpu to ``target``; returns what doctor shows about it."""
    sources = sorted(p for p in (ROOT / "csrc").glob("*.cpp") if p.name != "bindings_cuda.cpp")
    if not sources:
        raise BuildSkipped("csrc holds no C++ sources")
    cxx, ninja, headers = find_cxx(), find_ninja(), find_headers()
    compile_cpp = words(cxx, *CXX_FLAGS, *(f"-I{h}" for h in headers))
    link = words(cxx, "-shared", "-s", "-pthread") + " $in -o $out"
    if sys.platform == "darwin":
        link += " -undefined dynamic_lookup"
    directory = ROOT / "build" / f"cpu-{sys.implementation.cache_tag}-{platform.machine()}"
    built = run_ninja(ninja, directory, ninja_text({"cpp": compile_cpp}, sources, link, target), target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, target)
    return {"compiler": output_of([cxx, "--version"]).splitlines()[0], "flags": " ".join(CXX_FLAGS)}


def build_cuda(target: Path) -> dict[str, object]:
    """Compiles specfuse._C_cuda to ``target``; returns what doctor shows about it."""
    bindings = ROOT / "csrc" / "bindings_cuda.cpp"
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    if not sources or not bindings.exists():
        raise BuildSkipped("csrc holds no CUDA sources or no bindings_cuda.cpp")
    cxx, ninja, headers = find_cxx(), find_ninja(), find_headers()
    nvcc, include, library = find_cuda()
    archs = choose_archs(nvcc)
    rules = {
        "cu": words(nvcc, "-ccbin", cxx, *NVCC_FLAGS, *arch_flags(archs), f"-I{include}"),
        "cpp": words(cxx, *CXX_FLAGS, *(f"-I{h}" for h in [*headers, include])),
    }
    link = (
        words(cxx, "-shared", "-O3")
        + " $in "
        + words(f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread")
    )
    directory = ROOT / "build" / f"cuda-{sys.implementation.cache_tag}-{platform.machine()}"
    text = ninja_text(rules, [*sources, bindings], link + " -o $out", target)
    built = run_ninja(ninja, directory, text, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, target)
    version = re.search(r"release [\d.]+, V[\d.]+", output_of([str(nvcc), "--version"]))
    compiler = f"nvcc {version.group(0) if version else '(unknown version)'}"
    return {"compiler": compiler, "flags": " ".join(NVCC_FLAGS), "archs": archs, "ptx": archs[-1]}


class NativeBuild(build_ext):
    """build_ext that hands both modules to ninja and keeps what happened in _build_info.json."""

    def run(self) -> None:
        folder = ROOT / "specfuse" if self.inplace else Path(self.build_lib) / "specfuse"
        folder.mkdir(parents=True, exist_ok=True)
        modules: dict[str, object] = {}
        for name, build in (("_C_cpu", build_cpu), ("_C_cuda", build_cuda)):
            target = folder / Path(self.get_ext_filename(f"specfuse.{name}")).name
            target.unlink(missing_ok=True)
            modules[name] = self.attempt(name, build, target)
        info = {"python": platform.python_version(), "platform": platform.platform(), "modules": modules}
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def attempt(self, name: str, build: Builder, target: Path) -> dict[str, object]:
        """Builds one module; a missing toolchain, or CUDA failing under SPECFUSE_CUDA=auto, is a reason."""
        native, cuda = (
            choice("SPECFUSE_NATIVE", "1", ("0", "1")),
            choice("SPECFUSE_CUDA", "auto", ("auto", "0", "1")),
        )
        try:
            if native == "0":
                raise BuildSkipped("left out by SPECFUSE_NATIVE=0")
            if name == "_C_cuda" and cuda == "0":
                raise BuildSkipped("left out by SPECFUSE_CUDA=0")
            result: dict[str, object] = {"built": True, **build(target)}
        except BuildSkipped as reason:
            if name == "_C_cuda" and cuda == "1" and native == "1":
                raise SystemExit(f"specfuse: SPECFUSE_CUDA=1, but {reason}") from None
            result = {"built": False, "reason": str(reason)}
        except RuntimeError as error:
            if name == "_C_cpu" or cuda == "1":
                raise SystemExit(
                    f"specfuse: {error} (SPECFUSE_NATIVE=0 installs without native code)"
                ) from None
            result = {"built": False, "reason": str(error)}
        say(
            f"{name}: built with {result['compiler']}"
            if result["built"]
            else f"{name} not built: {result['reason']}"
        )
        return result

    def get_source_files(self) -> list[str]:
        # Taken into the sdist: everything native code is made of, headers and CUDA included.
        return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*") if p.is_file())

    def get_outputs(self) -> list[str]:
        folder = ROOT / "specfuse" if self.inplace else Path(self.build_lib) / "specfuse"
        return [str(p) for pattern in ("_C_*", "_build_info.json") for p in folder.glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class FreshBuildPy(build_py):
    """build_py that starts from an empty folder, so that a deleted file does not live on in wheels."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "specfuse", ignore_errors=True)
        super().run()


class CompleteSdist(sdist):
    """sdist that also takes tests and benchmarks, without a MANIFEST.in."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        extra = [
            p for folder in ("tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*")) if p.is_file()
        ]
        names = [str(p.relative_to(ROOT)) for p in extra if "__pycache__" not in p.parts]
        super().make_release_tree(base_dir, sorted({*files, *names}))
        # setuptools drops the link; an editable install from the unpacked archive needs it.
        link = Path(base_dir) / "specfuse" / "kernels"
        if (ROOT / "kernels").is_dir() and not link.exists():
            link.symlink_to("../kernels")


packages = find_packages(include=["specfuse", "specfuse.*"])
setup(
    # kernels/ has no __init__.py: as a package of its own it would shadow Hugging Face's `kernels`.
    packages=[*packages, "specfuse.kernels"] if (ROOT / "kernels").is_dir() else packages,
    package_dir={"specfuse.kernels": "kernels"},
    ext_modules=[Extension(f"specfuse.{name}", sources=[]) for name in ("_C_cpu", "_C_cuda")],
    cmdclass={"build_ext": NativeBuild, "build_py": FreshBuildPy, "sdist": CompleteSdist},
)
