"""Nothing in the source runs text as code, hands a line to a shell, or reads or writes pickle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(path for name in ("duet_ray", "jobs", "benchmarks") for path in (ROOT / name).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "commands.getoutput"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "torch.load", "torch.save", "torch.hub.load"),
    *("pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("os.execl", "os.execv", "os.spawnl", "asyncio.create_subprocess_shell"),
}
ALLOWED = {
    ("benchmarks/scale_broker.py", "pickle"): "measures how large Ray's messages are; none is written",
}


def name_of(node: ast.AST) -> str:
    """`a.b.c` of an expression; "" where it is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := name_of(node.value)):
        return f"{before}.{node.attr}"
    return ""


def unsafe(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) for every unsafe construct in a file."""
    tree = ast.parse(source)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [name_of(base) for base in node.bases] == ["yaml.SafeLoader"]
    } | {"yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, module) for module in modules if module.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom):
                imported = {f"{node.module}.{alias.name}" for alias in node.names}
                yield from ((node.lineno, name) for name in imported & CALLS)
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in CALLS:
            yield node.lineno, called
        if called == "yaml.load" and name_of(given.get("Loader", ast.Constant(None))) not in safe_loaders:
            yield node.lineno, "yaml.load without a safe loader"
        if called in ("np.load", "numpy.load") and not _is(given.get("allow_pickle", ast.Constant(False)), False):
            yield node.lineno, "np.load with pickle"
        if called in ("np.save", "numpy.save") and not _is(given.get("allow_pickle"), False):
            yield node.lineno, "np.save that may write pickle"
        if "shell" in given and not _is(given["shell"], False):
            yield node.lineno, "shell=True"
        trusts = given.get("trust_remote_code")
        if isinstance(trusts, ast.Constant) and trusts.value is not False:
            yield node.lineno, "trust_remote_code=True"


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_safe(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = [(line, what) for line, what in unsafe(path.read_text(encoding="utf-8")) if (name, what) not in ALLOWED]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "import os\nos.system('ls')",
        "from os import system",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=maybe)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=maybe)",
        "np.save(path, array)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_what_is_unsafe_is_found(line: str) -> None:
    assert list(unsafe(line))


def test_what_is_safe_passes() -> None:
    lines = (
        "model.eval()",
        "subprocess.run(['ls'], check=True)",
        "np.load(path)",
        "np.save(path, array, allow_pickle=False)",
        "yaml.safe_load(text)",
        "class L(yaml.SafeLoader): ...\nyaml.load(text, Loader=L)",
        "load(path, trust_remote_code=config.model.trust_remote_code)",
    )
    assert not [found for line in lines for found in unsafe(line)]
    assert len(FILES) > 100
