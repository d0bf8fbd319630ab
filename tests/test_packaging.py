"""Metadata, environment, README and continuous integration say the same thing."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest

import babelrs_geo
from babelrs_geo.__main__ import main as program
from babelrs_geo.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *((page.read_text(encoding="utf-8")) for page in sorted((ROOT / "docs").glob("*.md")))]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "duckdb": "python-duckdb"}
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}


def setup() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(section: str, option: str) -> list[str]:
    return [line for line in setup()[section][option].split("\n") if line]


def commands() -> list[str]:
    """The commands of README's first fenced block, comments aside: what .ci/run runs."""
    block = README.split("```")[1].split("\n")[1:]
    return [line for line in block if line and not line.startswith("#")]


def calls() -> Iterator[list[str]]:
    """Every `babelrs-geo ...` in a fenced block of README or docs, as arguments."""
    for page in PAGES:
        for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").split("\n"):
                for part in line.split("&&"):
                    if part.strip().startswith("babelrs-geo "):
                        words = shlex.split(part, comments=True)
                        yield words[1 : words.index(">") if ">" in words else None]


def names(lines: list[str]) -> dict[str, str]:
    """Requirement lines to name and bound."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", line)
        assert match, f"{line!r}: a lower bound and nothing else"
        found[match[1]] = match[2]
    return found


def declared(*extras: str) -> dict[str, str]:
    """Name and lower bound of the runtime needs and of the extras given."""
    lines = requirements("options", "install_requires")
    for extra in extras:
        lines += requirements("options.extras_require", extra)
    return names([line for line in lines if not line.startswith("babelrs-geo[")])


def test_every_requirement_has_a_bound_and_both_have_a_reason():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    sections = text.split("install_requires =")[1].split("[options.packages.find]")[0]
    sections += text.split("[options.extras_require]")[1].split("[tool:pytest]")[0]
    lines = [line.strip() for line in sections.split("\n") if line.startswith("    ")]
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("#"):
            continue
        assert before.startswith("#"), f"{line}: say why it is needed, and why from that version"
        if not line.startswith("babelrs-geo["):
            names([line])


def modules(*extras: str) -> set[str]:
    """What `declared` lets one import."""
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared(*extras)}


def imported(folder: str) -> set[str]:
    """Modules from elsewhere that a folder's code imports anywhere, inside functions included."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                found.add(ast.literal_eval(node.args[0]).split(".")[0])
    beside = ("tests", "benchmarks", "examples", "pipelines")  # scripts and tests import one another by name
    ours = {"babelrs_geo", *(path.stem for each in beside for path in (ROOT / each).rglob("*"))}
    return found - set(sys.stdlib_module_names) - ours


def test_what_is_imported_is_declared_and_the_other_way_round():
    assert imported("babelrs_geo") <= modules("train", "pretrain", "stac", "onnx")
    assert modules() - imported("babelrs_geo") == set()
    assert imported("pipelines") <= modules("train", "pretrain")
    for folder in ("tests", "benchmarks", "examples"):
        assert imported(folder) <= modules("train", "pretrain", "stac", "onnx", "test")


def test_the_conda_environment_is_in_step():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").split("dependencies:\n")[1].split("\n")
    items = [line.strip().removeprefix("- ") for line in lines if line.strip().startswith("- ")]
    listed = names([item for item in items if item != "pip:"])
    everything = declared("train", "pretrain", "stac", "onnx", "test", "dev")
    expected = {CONDA_NAMES.get(name, name): bound for name, bound in everything.items()}
    python = setup()["options"]["python_requires"].removeprefix(">=")
    assert listed == {**expected, "python": python, "pip": listed["pip"]}


def test_the_versions_agree():
    version = setup()["metadata"]["version"]
    assert babelrs_geo.__version__ == version
    assert metadata.version("babelrs-geo") == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, flags=re.MULTILINE)[1] == version


def test_the_command_is_installed():
    (entry,) = metadata.entry_points(group="console_scripts", name="babelrs-geo")
    assert entry.load() is program


def test_the_installed_package_has_all_its_files():
    installed = Path(babelrs_geo.__file__).parent
    here = ROOT / "babelrs_geo"
    kept = [
        p.relative_to(here) for end in ("*.py", "*.safetensors", "*.md", "py.typed") for p in here.rglob(end)
    ]
    assert not [str(path) for path in kept if not (installed / path).exists()]


def test_readme_opens_with_two_commands():
    first, second = commands()
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install ")
    assert "pip install . && babelrs-geo detect " in first
    scene = next(word for word in shlex.split(first) if word.endswith(".tif"))
    assert (ROOT / scene).exists()
    assert second.endswith('pip install ".[test]" && pytest')


@pytest.mark.parametrize("words", list(calls()), ids=" ".join)
def test_every_call_shown_is_understood(words):
    if words[0].startswith("-"):
        assert words[0] in ("--help", "--version")
        return
    command: click.Command = main
    while isinstance(command, click.Group):
        command = command.commands[words[0]]
        name, words = words[0], words[1:]
    if "--help" not in words:
        command.make_context(name, list(words))  # parses, runs nothing, raises what the user would see


def verbs(group: click.Group = main, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every verb with its full name, those of groups too."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def test_every_verb_is_in_the_readme_and_every_option_in_the_documentation():
    for verb, command in verbs():
        assert f"babelrs-geo {verb.split()[0]}" in README
        assert any(f"babelrs-geo {verb}" in page for page in PAGES)
        assert command.help
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, option.name
                flag = max(option.opts, key=len)
                assert any(re.search(rf"{flag}\b", page) for page in PAGES), f"{flag} of {verb}"


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert "README.md" in text
    for command in commands():
        assert command not in text, "taken from README.md, not kept twice"


def test_no_registry_is_named():
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"))]
    for path in ROOT.rglob("*"):
        hidden = any(part.startswith(".") and part != ".ci" for part in path.relative_to(ROOT).parts)
        if (
            path.suffix in (".py", ".md", ".cfg", ".toml", ".yml", ".yaml", "")
            and path.is_file()
            and not hidden
        ):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [host for host in hosts if host in text], path
