"""Who may import whom (the floors), and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "duet_ray"

FLOORS: list[set[str]] = [
    {"errors", "file_systems", "files", "processes", "secret_text"},
    {"linear", "records", "requirements", "seeds", "study_file", "theory"},
    {"config"},
    {"budget", "domains", "kept_models", "likelihood", "mixture", "reduce", "store"},
    {"training", "feedback"},
    {"selection", "search"},
    {"doctor", "offline", "preflight", "execution", "report"},
    {"study"},
    {"cli"},
]
"""From the ground up. A module imports from lower floors, or from its own folder."""

EXCEPTIONS = {("execution", "report"), ("report", "execution")}


def _part(module: str) -> str | None:
    """`duet_ray.domains.rows` → `domains`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "duet_ray" and len(parts) > 1 else None


def _imports(path: Path) -> set[str]:
    """The parts of the package that a file imports when it is imported; type-checking and lazy imports count too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "duet_ray" else [f"duet_ray.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {part for name in names if (part := _part(name))}
    return found


def test_imports_go_to_lower_floors_only() -> None:
    floor = {part: level for level, parts in enumerate(FLOORS) for part in parts}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in floor, f"{own} has no floor: add it to FLOORS"
        for other in _imports(path) - {own}:
            if floor[other] >= floor[own]:
                wrong.append(f"{relative} (floor {floor[own]}) imports {other} (floor {floor[other]})")
    assert not wrong, "\n".join(wrong)


def test_only_execution_imports_ray() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] == "execution":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "ray" for name in names), path


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, duet_ray\n"
        "from duet_ray import load_config, Study, DuetError\n"
        "import duet_ray.cli\n"
        "heavy = {'torch', 'ray', 'transformers', 'ax', 'botorch', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
