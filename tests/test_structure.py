"""The house: imports point one way, every recipe builds, every door opens."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stvit_video import build
from stvit_video.bench.commands import BENCHMARKS
from stvit_video.config import make_parser, parse, resolve

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stvit_video"
# who may import whom, beside libraries and errors.py
ALLOWED = {
    "bounds": set(),
    "figures": set(),
    "files": set(),
    "pixels": set(),
    "reports": {"reports"},
    "data": {"data", "files"},
    "models": {"models", "bounds"},
    "tasks": {"tasks", "data", "bounds", "figures", "reports"},
    "engine": {"engine", "files", "data", "models", "bounds", "figures"},
    "adapters": {"pixels"},
    "hub": {"pixels"},
    "weights": {"adapters", "files", "hub", "models", "pixels"},
    "config": {"bounds", "engine", "models", "pixels", "tasks"},
    "build": {"weights", "config", "tasks", "engine", "data", "models", "pixels"},
    "export": {"config", "engine"},
    "timeline": set(),
    "recognizer": {
        "export",
        "figures",
        "timeline",
        "build",
        "config",
        "engine",
        "data",
        "tasks",
    },
    "predictor": {"build", "data", "engine", "export", "recognizer", "tasks"},
    "page": {"page", "data", "figures", "recognizer", "timeline"},
    "resume": {"config", "engine"},
    "bench": {
        "weights",
        "figures",
        "files",
        "bench",
        "build",
        "config",
        "tasks",
        "engine",
        "data",
        "models",
    },
    "cli": {
        *(
            "cli",
            "figures",
            "files",
            "bench",
            "page",
            "pixels",
            "predictor",
            "recognizer",
            "reports",
            "export",
            "resume",
            "tasks",
            "timeline",
            "build",
            "weights",
            "config",
            "engine",
            "data",
        ),
        "models",
    },
    "errors": set(),
}


def imported_parts(path):
    """The parts of the package that a file imports, by name: `data`, `engine`, `config`, ..."""
    place = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(place[: len(place) - node.level]) if node.level else []
            base = ["stvit_video", *base] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == "stvit_video" and len(name) > 1)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part == "__init__":
        return
    assert set(imported_parts(path)) <= ALLOWED[part] | {"errors", "__version__"}


def test_engine_reads_no_yaml():
    assert not [p for p in (PACKAGE / "engine").glob("*.py") if "yaml" in p.read_text()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_builds_its_model_and_data(path):
    config, _ = parse(make_parser(""), ["--cfg", str(path)])
    config = resolve(config)
    if config.model.name != "auto":  # that of weights
        build.build_model(config, config.data.num_classes or 8)
    task = build.build_task(config, [str(i) for i in range(config.data.num_classes or 8)])
    build.build_test_views(config, task, config.eval.clips, config.eval.crops)
    assert path.read_text().startswith("#"), "a recipe begins with its command, cost and result"


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def names_of_the_package():
    """Modules (`engine.run`, `run`), what they define (`Run`, `run.Run`), what classes do (`Run.state`)."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules = {".".join(parts), parts[-1], *parts[:-1]}
        yield from modules
        for node in ast.parse(path.read_text()).body:
            for name in defined(node):
                yield from (name, *(f"{module}.{name}" for module in modules))
                for member in node.body if isinstance(node, ast.ClassDef) else []:
                    yield from (f"{name}.{inner}" for inner in defined(member))


def defined(node):
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_every_name_on_the_page_of_the_architecture_exists():
    names = set(names_of_the_package())
    assert "Trainer._epoch" in names
    assert "Trainer._epochs" not in names
    known = names | {action.dest for action in make_parser("")._actions}
    written = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))  # files that commands write
    text = re.sub(r"```.*?```", "", ARCHITECTURE, flags=re.S)
    for name in re.findall(r"`([^`]+)`", text):
        if "/" in name:
            assert (ROOT / name).exists(), name
        elif re.search(r"\.(csv|json|png|pt|html|npz)$", name):
            assert f'"{name}"' in written, name
        else:
            assert name in known, name
    for code in re.findall(r"```python\n(.*?)```", ARCHITECTURE, flags=re.S):
        ast.parse(code)


def test_the_page_of_the_architecture_has_the_table_of_imports():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", ARCHITECTURE, re.M)
    table = {part: set(re.findall(r"`(\w+)`", allowed)) for part, allowed in rows}
    assert table == {part: may - {part} for part, may in ALLOWED.items() if part != "errors"}


def _python(code):
    """What it prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_to_import_the_package_imports_next_to_nothing():
    assert not {"torch", "matplotlib"} & set(_python("import sys, stvit_video; print(*sys.modules)"))


LATE = {
    "av",
    "gradio",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "pycocotools",
    "pytorchvideo",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboard",
    "timm",
    "torch",
    "torchvision",
}
BENCH = [f"bench {kind}" for kind in BENCHMARKS]


@pytest.mark.parametrize(
    ("commands", "late"),
    [
        (["predict", "page", "curves", "compare", "ensemble", "export"], LATE | {"jsonargparse"}),
        (["train", "test", "check", "shards", "bench", *BENCH], LATE),
    ],
)
def test_flags_wait_for_no_import_that_they_do_not_need(commands, late):
    code = f"""
import contextlib, io, sys
from stvit_video import cli
for name, *kind in map(str.split, {commands}):
    for flag in ("--help", "--modle.name=x", "--train.ir=1"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                getattr(cli, name)([*kind, flag])
            except SystemExit as stop:
                assert bool(stop.code) == (flag != "--help"), err.getvalue()
            else:
                assert (name, kind, flag) == ("bench", [], "--help"), name
print(*sys.modules)
"""
    assert not late & set(_python(code))


def test_every_command_is_one_whose_flags_are_looked_at():
    installed = re.findall(r"stvit_video\.cli:(\w+)", (ROOT / "setup.cfg").read_text())
    (mark,) = test_flags_wait_for_no_import_that_they_do_not_need.pytestmark
    looked_at = {command for commands, _ in mark.args[1] for command in commands}
    assert set(installed) == looked_at - set(BENCH)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    """A notebook's backend, and its open figures."""
    code = """
import matplotlib
from matplotlib import pyplot
pyplot.switch_backend("svg")
import stvit_video.cli
from stvit_video import figures
figures.draw_confusion([0, 1], [0, 0], ["a", "b"], r"{}")
print(matplotlib.get_backend(), len(pyplot.get_fignums()))
"""
    assert _python(code.format(tmp_path / "confusion.png")) == ["svg", "0"]
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_every_link_of_the_documents_leads_somewhere():
    pages = [ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    broken = [f"{page.name}: {link}" for page, link in links
              if "://" not in link and not (page.parent / link).exists()]  # fmt: skip
    assert len(links) > 30
    assert broken == []


def test_every_test_that_the_documents_name_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in tests, f"{page.name} names {name}"


@pytest.mark.parametrize(
    "tool",
    [
        "train_net",
        "test_net",
        "predict",
        "check_data",
        "draw_curves",
        "make_shards",
        "open_page",
        "average_scores",
        "compare_runs",
        "export_model",
    ],
)
def test_every_tool_runs(tool):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{tool}.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
