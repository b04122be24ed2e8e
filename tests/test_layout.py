"""The rules of the house, read from the files: layout, import direction, one stem per op, sizes."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "specfuse"

TOP_LEVEL = {
    *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
    *("csrc", "kernels", "specfuse", "benchmarks", "docs", "tests"),
}

# A module imports from its own rank or below. What is not named here is the engine between generate and ops.
RANKS = {
    **dict.fromkeys(["cli", "serve", "doctor", "replay", "demo", "demo_page"], 6),
    **dict.fromkeys(["session", "plan", "probe", "calibrate"], 5),
    "generate": 4,
    "ops": 2,
    **dict.fromkeys(["kernels", "_C_cpu", "_C_cuda"], 1),
    **dict.fromkeys(["tree", "stats"], 0),
}
ENGINE = 3


def tracked_files() -> list[Path]:
    """Files of the project as git sees them: tracked, or new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).exists()]


def rank(module: str) -> int:
    parts = module.split(".")
    return RANKS.get(parts[1], ENGINE) if len(parts) > 1 else 7


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yields the modules a file imports when it runs, wherever the import stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (name for branch in node.orelse for name in imports_of(branch))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports_of(node)


def import_graph() -> dict[str, set[str]]:
    """``{module: modules of specfuse that it imports}`` for every file of the package."""
    paths = [p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts]
    paths += [PACKAGE / "kernels" / p.name for p in (ROOT / "kernels").glob("*.py")]
    names = {module_name(path): path for path in paths}
    graph = {}
    for name, path in names.items():
        found = set()
        for target in imports_of(ast.parse(path.read_text())):
            # `from specfuse.tree import TokenTree`: the module is the longest known prefix.
            while target.startswith("specfuse") and target not in names and "_C_" not in target:
                target = target.rpartition(".")[0]
            if target.startswith("specfuse") and target != name:
                found.add(target)
        graph[name] = found
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph.get(name, ())):
            if cycle := visit(target, [*trail, name]):
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), None)


def against_direction(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        # The bare package is refused: its names load lazily and could hide any direction.
        if name != "specfuse" and (target == "specfuse" or rank(target) > rank(name))
    ]


def ops() -> list[str]:
    return sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if "library.define(" in p.read_text())


def test_top_level_is_exactly_what_the_design_lists() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


def test_kernels_are_a_link_and_not_a_package() -> None:
    # As a package it would shadow Hugging Face's `kernels` distribution, and transformers would not import.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = PACKAGE / "kernels"
    assert not link.is_symlink() or link.readlink() == Path("../kernels")
    assert (link / "verify_tree_ref.py").exists()


def test_imports_go_one_way() -> None:
    graph = import_graph()
    assert len(graph) > 20, "the walk found the package"
    assert against_direction(graph) == []


def test_no_import_cycles() -> None:
    assert find_cycle(import_graph()) is None


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("specfuse.ops.verify_tree", "from specfuse.drafters import Drafter"),
        ("specfuse.drafters.corpus", "def f():\n    import specfuse.generate"),
        ("specfuse.kernels.verify_tree_ref", "from specfuse.ops import native"),
        ("specfuse.verify", "import specfuse.cli.main"),
    ],
)
def test_the_direction_check_sees_a_wrong_import(importer: str, source: str) -> None:
    targets = set(imports_of(ast.parse(source)))
    assert against_direction({importer: targets}) != []


def test_the_cycle_check_sees_a_cycle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("op", ops())
def test_one_stem_per_op(op: str) -> None:
    assert (ROOT / "kernels" / f"{op}_ref.py").exists()
    assert list((ROOT / "csrc").glob(f"{op}*")) or (ROOT / "kernels" / f"{op}.py").exists()
    assert list((ROOT / "tests").glob(f"test_{op}*.py"))
    assert (ROOT / "benchmarks" / f"bench_{op}.py").exists()


def test_there_are_ops() -> None:
    assert {"verify_tree", "compact_kv"} <= set(ops())


def test_csrc_is_free_of_torch_headers() -> None:
    sources = [p for p in (ROOT / "csrc").iterdir() if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#include"):
                assert not any(word in line for word in ("torch", "ATen", "c10")), f"{path.name}: {line}"


def test_no_file_is_keyed_by_layer() -> None:
    keyed = {"utils", "util", "helpers", "functional", "common", "misc"}
    assert [p for p in tracked_files() if p.stem in keyed] == []


def test_files_stay_comfortable() -> None:
    # About 300 lines is the house's measure; a third more is where a split stops being a matter of taste.
    suffixes = {".py", ".cpp", ".cu", ".h"}
    sizes = {
        p: len(p.read_text().splitlines()) for p in tracked_files() if p.suffix in suffixes and p.is_file()
    }
    assert {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n > 400} == {}


@pytest.mark.parametrize(("mark", "command"), [("main", "pip install -e . && specfuse "), ("test", "pytest")])
def test_readme_marks_the_commands_that_ci_runs(mark: str, command: str) -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"<!-- ci:{mark} -->\s*```\w*\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 1 and command in blocks[0]


def test_every_page_of_the_documentation_is_linked_and_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    linked = set()
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            found = (page.parent / link).resolve()
            assert found.exists(), f"{page.name} links to {link}, which is not there"
            linked.add(found)
    assert [page.name for page in pages if page not in linked] == []
