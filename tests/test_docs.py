"""What the pages say exists: code that compiles, commands, options, make targets, links, settings."""

import re
import runpy
from pathlib import Path

import pytest
import typer

from hf_alphaedit import AlphaEditor
from hf_alphaedit.cli import app


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def code_in(page: Path) -> str:
    """All commands: fenced blocks and inline code."""
    text = page.read_text(encoding="utf-8")
    return "\n".join([*blocks(page, "(?:bash|console)?"), *re.findall(r"`([^`\n]+)`", text)])


@page
def test_python_compiles_and_calls_methods_that_exist(page: Path):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
        for name in re.findall(r"\beditor\.(\w+)\(", block):
            assert hasattr(AlphaEditor, name), name


@page
def test_commands_and_their_options_exist(page: Path):
    for line in re.findall(r"^\s*hf-alphaedit (.+)$", code_in(page), re.MULTILINE):
        name, *words = line.split("#")[0].split()
        if name.startswith("-") or name == "COMMAND":
            continue
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        for word in words:
            if word.startswith("-"):
                assert word.split("=")[0] in known, f"{name} {word}"


@page
def test_make_targets_exist(page: Path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^\s*make ([a-z-]+)", code_in(page), re.MULTILINE):
        assert target in targets, target


@page
def test_programs_that_are_named_exist(page: Path):
    for program in re.findall(r"python ((?:examples|benchmarks|docs)/\w+\.py)", code_in(page)):
        assert (ROOT / program).is_file(), program


@page
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("https://", "mailto:")):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@page
def test_nothing_is_promised_that_cannot_be_known(page: Path):
    text = page.read_text(encoding="utf-8").lower()
    assert not re.search(r"\blossless|\bguarantee", text)


def test_settings_page_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    assert script["OUTPUT"].read_text(encoding="utf-8") == script["page"](), "run python docs/settings.py"


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"hf-alphaedit {name}" not in text] == []
