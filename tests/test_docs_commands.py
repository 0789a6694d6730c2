"""Every command of README and docs is run here, or listed with the reason why not; every message that a document quotes
is in the code. A command that is new in a document and in no row below fails.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llamafleet.cli import main as cli
from sandbox import models

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("make", "pyinfra", "llamafleet", "pytest", "python", "cp", "mkdir", "journalctl", "tail", "systemctl", "rm",
            "systemd-analyze", "sha256sum", "git", ".venv/bin/pre-commit", "(umask")  # fmt: skip
INVENTORY = """hosts = [("@local", {"models": [{"name": "a", "source": "hf:a/b/c.gguf", "port": 8080, "slot": 3}]})]
gateway = ["@local"]
monitoring = ["@local"]
"""
REFUSED = "models[0].slot: unknown setting; did you mean `slots`?"
WEIGHTLESS = "gpt-oss-120b-MXFP4.gguf"


def is_command(text):
    return text.split(" ")[0] in PROGRAMS and " " in text


def commands_of(page):
    """Commands of a page: lines of indented blocks, with what continues them, and words in backquotes."""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        text = line[4:].removeprefix("$ ")
        if line.startswith("    ") and is_command(text):
            for more in lines[number + 1 :]:
                if not text.endswith("\\") and text.count("'") % 2 == 0:
                    break
                joint = " " if text.endswith("\\") else "\n"
                text = text.removesuffix("\\") + joint + more.strip()
            yield re.split(r" {2,}(?=[#a-z])", text)[0].strip()
    prose = re.sub(r"^    .*$", "", page.read_text(), flags=re.M)
    yield from (
        " ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose) if is_command(" ".join(text.split()))
    )


COMMANDS = sorted({command: page.name for page in PAGES for command in commands_of(page)}.items())


# --- how each is run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The checkout, but for its inventories: these name a setting that does not exist, so that each command is understood
    and every host refused before it is read."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("llamafleet", "tasks", "tests", "sandbox", "deploy.py", "config.py", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "inventory").mkdir()
    (folder / "inventory/group_data").symlink_to(ROOT / "inventory/group_data")
    (folder / "inventory/fleet.example.py").write_text(INVENTORY)
    for name in ("inventory/local.py", "inventory/fleet.py", "inventory/sandbox.py", "fleet.py"):
        (folder / name).write_text(INVENTORY)
    return folder


def shell(folder, command):
    """(exit status, output) of a command line in the environment of the checkout."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PYINFRA_PROGRESS": "off"}
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def refused(folder, command):
    """The command finds inventory, settings and stages, and stops at the unknown setting."""
    for word, real in (
        ("gpu1.example.net", "@local"),
        ("HOST_OR_GROUP", "@local"),
        ("HOST", "@local"),
        ("CHECKOUT", str(folder)),
    ):
        command = re.sub(rf"\b{re.escape(word)}\b", real, command)
    command = re.sub(r"[\[\]]", "", command).replace("--json >", "--json 2>&1 | tee")
    status, text = shell(folder, command.replace("llamafleet ", "python -m llamafleet.cli ", 1))
    assert REFUSED in text and (status or "tee" in command), f"{command}: {text}"


def make(folder, command):
    """There is such a target, whatever it would do."""
    words = shlex.split(command.partition(" && ")[0])
    status, text = shell(ROOT, shlex.join([words[0], "--dry-run", *words[1:]]))
    assert status == 0, text


def parsed(folder, command):
    """Its options exist; what it reads is not here."""
    words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", command))
    assert cli._parser().parse_args([word if word != "N" else "20" for word in words[1:]]).run


def succeeds(folder, command):
    status, text = shell(folder, command)
    assert status == 0, text


def probes(folder, command):
    """The probe of this machine, for a model that is not there in full."""
    model = models.weightless(folder, "Qwen3-8B")
    command = command.replace("MODEL.gguf", str(model)).replace("llamafleet plan", "python -m llamafleet.cli plan")
    status, text = shell(folder, command)
    assert status in (0, 3), text
    assert "machine.json" not in command or json.loads((folder / "machine.json").read_text())["schema"] == 1


def lists_drift(folder, command):
    plan = [{"name": "Serve", "hosts_with_change": ["a"]}, {"name": "Build", "hosts_with_change": []}]
    (folder / "drift.json").write_text(json.dumps({"plan": plan}))
    assert shell(folder, command) == (0, "Serve ['a']\n")


# A pattern of the whole command, and a function that runs it or the reason why it is not run here.
HOW = (
    (r"make .*", make),
    (r"llamafleet plan --model gpt-oss-120b-MXFP4\.gguf .*", "test_the_plan_of_the_documents_is_what_is_printed"),
    (r"llamafleet plan --model .*", parsed),
    (r"llamafleet (plan|status|report|rollout|tuned|workload) --inventory .*", refused),
    (r"pyinfra (--sudo |--dry --json )?\S*(fleet|local|sandbox)\.py (deploy\.py|llamafleet\.|tasks\.).*", refused),
    (r"pyinfra (.* )?exec -- .*", "pyinfra's own; tests/e2e/test_sandbox.py reaches the hosts"),
    (r"pyinfra \.\.\.( --dry --diff)?|llamafleet (plan|status|report|rollout|tuned|workload)( --inventory)?", "the name of a command"),
    (r"pytest \S*tests/hosts --inventory .*", refused),
    (r"pytest tests/hosts", "tests/deployed/test_inventory_bridge.py: it asks for an inventory"),
    (r"python llamafleet/remote/probe\.py .*", probes),
    (r"python -c 'from pathlib.*weightless.*", succeeds),
    (r"(?s)python -c 'import json;.*", lists_drift),
    (r"python -m sandbox(\.outside)? .*", "root, and boots hosts: tests/e2e/test_sandbox.py"),
    (r"python -m bench\.fleet\.scale", "minutes: tests/bench/test_fleet.py measures two hosts"),
    (r"python -m bench\.calibration predict", "minutes of a processor, with real models; tests/tuning/test_rates.py has the rates"),
    (r"python -m bench\.published_cases", "half a minute: tests/planner/test_roofline.py uses its cases"),
    (r"python -m bench\.gpu_proof .*", "a GPU: tests/bench/test_gpu_proof_run.py runs it with a stand-in"),
    (r"cp inventory/fleet\.example\.py inventory/fleet\.py", succeeds),
    (r"mkdir -p ~/\.config/llamafleet|\(umask 077; .*", "writes into the home folder"),
    (r"(journalctl|tail|systemctl|systemd-analyze|sha256sum|rm) .*", "on a host that was deployed"),
    (r"git .*", "git's own"),
    (r"\.venv/bin/pre-commit install", "changes the clone"),
)  # fmt: skip


def cases():
    """The commands. Each start of pyinfra takes two seconds: of the commands that one row refuses, the first is tried in
    every run, the others in the long one."""
    seen = set()
    for command, page in COMMANDS:
        row = next((pattern for pattern, how in HOW if how is refused and re.fullmatch(pattern, command)), None)
        marks = [pytest.mark.long] if row in seen else []
        seen |= {row} if row else set()
        yield pytest.param(command, page, id=f"{page}: {command}"[:90], marks=marks)


@pytest.mark.parametrize(("command", "page"), cases())
def test_a_command_of_the_documents_works(command, page, checkout):
    how = next((how for pattern, how in HOW if re.fullmatch(pattern, command)), None)
    assert how is not None, f"{page}: how is this command tested? Give it a row in HOW: {command}"
    if callable(how):
        how(checkout, command)


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in HOW])
def test_every_row_is_of_a_command_that_is_still_there(pattern):
    assert any(re.fullmatch(pattern, command) for command, _ in COMMANDS), pattern


def test_the_plan_of_the_documents_is_what_is_printed(tmp_path, monkeypatch, capsys):
    """Line by line, but for what the documents cut: flags, and lines with `...`."""
    monkeypatch.chdir(tmp_path)
    models.weightless(Path("."), "gpt-oss-120b")
    [command] = {command for command, _ in COMMANDS if WEIGHTLESS in command and "--compare" not in command}
    assert cli.main(shlex.split(command)[1:]) == 0
    printed = capsys.readouterr().out.splitlines()
    for page in (ROOT / "docs/planning.md", ROOT / "README.md"):
        block = page.read_text().split(f"\n    {WEIGHTLESS} on ")[1].split("\n\n")[0].splitlines()[1:]
        quoted = [line[4:] for line in block if re.match(r" {6}(\w.*\||predicted|- )", line) and "..." not in line]
        assert len(quoted) > 4 and [line for line in quoted if line not in printed] == [], page


# --- messages -------------------------------------------------------------------------------------


def templates():
    """Every text in the code, with a mark where a value goes."""
    for folder in ("llamafleet", "tasks", "tests/hosts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


VALUE = re.compile(r"\.\.\.|[A-Z][A-Z0-9_]*\b(?:[/-][A-Z]+)*|\b\d[\d.]*\b|'.*?'|`|\(pid N\)")


def quoted_messages():
    """Messages in the first column of the table in docs/operations.md, cut where values stand."""
    section = (ROOT / "docs/operations.md").read_text().split("## Messages and the way out")[1].split("\n## ")[0]
    for row in re.findall(r"^\| (`.*?) \| ", section, re.M):
        for message in re.findall(r"`([^`]+)`", row):
            for part in VALUE.split(message.removeprefix("refused: ")):
                words = part.strip(" :;,()")
                if words.count(" ") >= 2:
                    yield message, words


QUOTED = sorted(set(quoted_messages()))


def test_there_are_messages():
    assert len(QUOTED) > 50


@pytest.fixture(scope="module")
def code():
    return "\n".join(bare(text) for text in templates())


def bare(text):
    """The text without brackets and marks, at which messages are put together."""
    return " ".join(re.sub(r"[();:,]", " ", text).split())


@pytest.mark.parametrize(("message", "words"), QUOTED, ids=[words[:60] for _, words in QUOTED])
def test_a_message_of_the_documents_is_one_of_the_code(message, words, code):
    assert said_by(bare(words).split(), code), f"{message}: no text has {words!r}"


def said_by(words, code):
    """Whether the code has these words: in parts of three words or more (of short ones two), with a value of one word between them at most,
    since a message may be put together from several texts. Two thirds of the words must be found so."""
    covered = at = skipped = 0
    least = 2 if len(words) < 6 else 3
    while at < len(words):
        size = next(
            (size for size in range(len(words) - at, least - 1, -1) if " ".join(words[at : at + size]) in code), 0
        )
        covered, at, skipped = covered + size, at + (size or 1), 0 if size else skipped + 1
        if skipped > 2:
            return False
    return 3 * covered >= 2 * len(words)


def test_other_words_are_not_taken_for_those_of_the_code(code):
    assert said_by(["the", "previous", "one", "was", "put", "back", "and", "serves"], code)
    assert not said_by(["the", "former", "one", "has", "been", "put", "into", "its", "place"], code)
    assert not said_by(["no", "such", "message", "was", "ever", "here"], code)
