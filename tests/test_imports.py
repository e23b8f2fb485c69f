"""No circle of imports; what a package keeps to itself, behind a leading underscore, no other package imports."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedmerge", "clients", "strategies", "server", "experiments")


def imported(source: str) -> list[tuple[str, ...]]:
    """The dotted names that a module imports from one of the packages, each as its parts."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return [tuple(name.split(".")) for name in found if name.split(".")[0] in PACKAGES]


def foreign(module: Path, source: str) -> list[str]:
    """Names behind an underscore that ``module`` imports although it does not stand in their package."""
    here = module.parts[:-1]
    return [
        ".".join(name)
        for name in imported(source)
        for i, part in enumerate(name)
        if part.startswith("_") and not part.startswith("__") and here[:i] != name[:i]
    ]


def test_a_private_import_across_packages_is_found() -> None:
    source = (
        "import fedmerge.align._swaps\nfrom fedmerge.align import _finish, climb\nfrom fedmerge._check import check"
    )
    assert foreign(Path("fedmerge/merge/_soup.py"), source) == ["fedmerge.align._swaps", "fedmerge.align._finish"]
    assert foreign(Path("fedmerge/align/_soup.py"), source) == []
    assert len(foreign(Path("server/_soup.py"), source)) == 3


def test_no_module_imports_what_is_private_to_another_package() -> None:
    modules = [file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    found = {str(module): foreign(module, (ROOT / module).read_text(encoding="utf-8")) for module in modules}
    assert len(modules) > 100
    assert not {module: names for module, names in found.items() if names}


def test_modules_import_each_other_in_no_circle() -> None:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 200
    TopologicalSorter(imports).prepare()  # a CycleError names them


def test_a_spec_knows_how_it_is_shown_and_what_shows_it_knows_it_by_its_type_alone() -> None:
    """The one circle of types: ``print(spec)`` and ``spec.draw``."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    shown = ("fedmerge.spec._table", "fedmerge.spec._picture")
    imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules if m not in shown}
    TopologicalSorter(imports).prepare()
