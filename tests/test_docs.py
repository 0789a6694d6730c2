"""The documents name files that exist, and decisions and code point to each other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
NOTES = sorted(ROOT.glob("docs/decisions/[0-9]*.md"))
# A path of the checkout in backticks, without capital letters or wildcards, which stand for many names:
# `tests/e2e/test_01_deploy.py`, but not `tasks/NAME.py`.
PATH = re.compile(r"`((?:bench|docs|inventory|llamafleet|locks|sandbox|tasks|templates|tests)/[a-z0-9_./-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
POINTER = re.compile(r"docs/decisions/\d{4}-[a-z0-9-]+\.md")
CONSTANT = re.compile(r"`([A-Z][A-Z_]+)`")
OPERATORS_OWN = {"inventory/fleet.py"}  # made by the operator, as the README says


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_links_of_a_document_exist(document):
    text = document.read_text()
    missing_paths = {path for path in PATH.findall(text) if not (ROOT / path).exists()} - OPERATORS_OWN
    missing_links = {path for path in LINK.findall(text) if not (document.parent / path).exists()}
    assert (missing_paths, missing_links) == (set(), set())


def test_the_table_of_changes_names_constants_of_its_files():
    """A row of "Where do I change ..." names constants such as `KV_TYPES`: a file of that row has each of them."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("## Where do I change")[2].partition("\n## ")[0]
    rows = [(CONSTANT.findall(row), PATH.findall(row)) for row in section.splitlines() if row.startswith("|")]
    assert len([constants for constants, _ in rows if constants]) >= 4
    for constants, paths in rows:
        sources = [(ROOT / path).read_text() for path in paths if (ROOT / path).is_file()]
        missing = [name for name in constants if not any(re.search(rf"^{name}\b", source, re.M) for source in sources)]
        assert missing == []


@pytest.mark.parametrize("note", NOTES, ids=lambda path: path.stem)
def test_modules_that_a_decision_names_point_to_it(note):
    [modules] = re.findall(r"^In the code: (.*?)\.$", note.read_text(), re.M | re.S)
    paths = re.findall(r"`([^`]+)`", modules)
    assert paths
    assert [path for path in paths if str(note.relative_to(ROOT)) not in (ROOT / path).read_text()] == []


def test_pointers_in_the_code_name_decisions_that_exist_and_each_decision_has_one():
    folders = ("llamafleet", "sandbox", "tasks", "tests")
    sources = [ROOT / "deploy.py", *(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))]
    pointers = {(path, name) for path in sources for name in POINTER.findall(path.read_text())}
    assert [(path, name) for path, name in pointers if not (ROOT / name).exists()] == []
    assert {name for _, name in pointers} == {str(note.relative_to(ROOT)) for note in NOTES}


@pytest.mark.parametrize("index", ["docs/decisions/README.md", "docs/architecture.md"])
def test_an_index_lists_every_decision(index):
    assert set(re.findall(r"\d{4}-[a-z0-9-]+\.md", (ROOT / index).read_text())) == {note.name for note in NOTES}
