"""An inventory may lie anywhere, and so may the person who uses it; the installed package does what the checkout does."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llamafleet import payload, stages
from llamafleet.settings import defaults
from llamafleet.settings.schema import Settings, SettingsError

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent
# Of all settings one is wrong, so that the host is refused before anything of it is read: with the defaults found, no
# other line says "missing".
WRONG = 'hosts = [("@local", {"models": [{"name": "a", "source": "hf:a/b/c.gguf", "port": 8080, "slot": 3}]})]\n'
REFUSED = "models[0].slot: unknown setting; did you mean `slots`?"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with an inventory, and a folder `tasks` of the operator's own, as pyinfra projects have."""
    (tmp_path / "inv.py").write_text(WRONG)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/__init__.py").write_text("raise SystemExit('the tasks of another project')\n")
    return tmp_path


def run(folder, *words, path=str(ROOT)):
    environment = {**os.environ, "PYINFRA_PROGRESS": "off", "NO_COLOR": "1", "PYTHONPATH": path}
    done = subprocess.run(list(map(str, words)), cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "story", ["llamafleet.deploy", pytest.param(ROOT / "deploy.py", id="deploy.py", marks=pytest.mark.long)]
)
def test_a_deploy_works_from_the_folder_of_its_inventory(elsewhere, story):
    code, text = run(elsewhere, PROGRAMS / "pyinfra", "inv.py", story, "--dry")
    assert code and f"refused: {REFUSED}" in text and text.count("refused: ") == 1, text


def test_a_deploy_works_from_the_checkout_for_an_inventory_elsewhere(elsewhere):
    code, text = run(ROOT, PROGRAMS / "pyinfra", elsewhere / "inv.py", "deploy.py", "--dry")
    assert code and f"refused: {REFUSED}" in text and "missing" not in text, text


@pytest.mark.parametrize("command", ["status", pytest.param("plan", marks=pytest.mark.long)])
def test_the_command_works_from_any_folder(elsewhere, command):
    code, text = run(elsewhere, PROGRAMS / "python", "-m", "llamafleet.cli", command, "--inventory", "inv.py")
    assert code in (1, 2) and REFUSED in text and "missing" not in text, text


def test_hosts_are_checked_from_any_folder(elsewhere):
    """Collecting reads the inventory with its settings, and reaches no host."""
    (elsewhere / "inv.py").write_text(WRONG.replace('"slot": 3', '"slots": 3'))
    words = [
        PROGRAMS / "python",
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        ROOT / "tests/hosts",
    ]
    code, text = run(elsewhere, *words, "--inventory", "inv.py")
    assert code == 0 and "[@local/a]" in text, text
    code, text = run(elsewhere, *words, "--inventory", "nosuch.py")
    assert code == 4 and f"there is no such file (looked in {elsewhere})" in text, text


def test_an_inventory_that_is_not_there_is_named_with_where_it_was_looked_for(elsewhere):
    code, text = run(elsewhere, PROGRAMS / "python", "-m", "llamafleet.cli", "status", "--inventory", "nosuch.py")
    assert code == 2 and f"no such inventory file: nosuch.py (looked in {elsewhere})" in text, text


def test_a_host_s_data_override_single_defaults():
    settings = Settings.from_data({
        "keep_releases": 7,
        "model_defaults": {"slots": 3},
        "models": [{"name": "a", "source": "hf:a/b/c.gguf", "port": 8080}],
    })  # fmt: skip
    [instance] = settings.models
    assert (settings.keep_releases, instance.slots) == (7, 3)
    assert (settings.backend, instance.kv_types) == ("auto", ("f16",))


def test_what_a_caller_does_to_the_defaults_stays_with_it():
    defaults.defaults()["model_defaults"]["kv_types"].append("q8_0")
    assert defaults.defaults()["model_defaults"]["kv_types"] == ["f16"]


def test_a_file_of_defaults_that_is_gone_or_lacks_a_key_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "FILE", tmp_path / "defaults")
    defaults._read.cache_clear()
    try:
        with pytest.raises(SettingsError, match=r"defaults: No such file or directory: .* install llamafleet again"):
            Settings.from_data({})
        text = (ROOT / "inventory/group_data/all.py").read_text().replace('backend = "auto"', "")
        (tmp_path / "defaults").write_text(text)
        with pytest.raises(SettingsError, match=r"^backend: missing; inventory/group_data/all\.py must give it$"):
            Settings.from_data({})
    finally:
        defaults._read.cache_clear()


def test_stages_have_names_that_are_in_no_other_project_s_way():
    assert stages.build.__module__ == "tasks.build"
    with pytest.raises(AttributeError, match="no stage 'nosuch': the stages are bootstrap, build, "):
        stages.nosuch  # noqa: B018 -- asking is what fails


def test_an_own_package_of_the_name_tasks_is_named_rather_than_mixed_in(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/__init__.py").touch()
    code, text = run(tmp_path, PROGRAMS / "python", "-c", "import tasks, llamafleet.stages; llamafleet.stages.build")
    assert code == 1 and f"another package has the name tasks already ({tmp_path}/tasks): run" in text, text


def test_the_links_to_what_travels_with_the_package_lead_there():
    """A copy instead of a link would differ from the file that is edited, one day."""
    data = ROOT / "llamafleet/data"
    links = {
        link: (data / link).resolve() for link in ("defaults", "templates", "remote.txt", "deploy", "stages/tasks")
    }
    assert {link: str(path.relative_to(ROOT)) for link, path in links.items()} == {
        "defaults": "inventory/group_data/all.py", "templates": "templates", "remote.txt": "locks/remote.txt",
        "deploy": "deploy.py", "stages/tasks": "tasks",
    }  # fmt: skip


def _tracked():
    """Paths of what a clone would have and a wheel is made of."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    left_out = ("tests", "bench", "docs", "sandbox", "")
    return [name for name in names if name.partition("/")[0] not in left_out and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as a wheel installs it, in a folder of its own, with the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    for name in _tracked():
        place = folder / "source" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place, follow_symlinks=False)
    wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    code, text = run(folder, PROGRAMS / "python", "-m", "pip", *wheel, folder / "source")
    assert code == 0, text
    [path] = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_has_what_travels_to_hosts(installed):
    code = (
        "import json, llamafleet\n"
        "from llamafleet import payload, stages\n"
        "from llamafleet.settings.schema import Settings\n"
        "stages.build\n"
        "from tasks.lib import templates\n"
        "print(json.dumps([llamafleet.__file__, payload.helpers_key(), Settings.from_data({}).llama_cpp_ref,\n"
        "                  sorted(path.name for path in templates.TEMPLATES.iterdir())]))\n"
    )
    status, text = run(installed.parent, PROGRAMS / "python", "-P", "-c", code, path=str(installed))
    assert status == 0, text
    file, key, ref, names = json.loads(text)
    assert file.startswith(str(installed)) and key == payload.helpers_key()
    assert ref == Settings.from_data({}).llama_cpp_ref
    assert names == sorted(path.name for path in (ROOT / "templates").iterdir())


def test_the_wheel_takes_no_name_but_its_own(installed):
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"llamafleet"}


@pytest.mark.parametrize("stage", ["llamafleet.deploy", pytest.param("llamafleet.stages.plan", marks=pytest.mark.long)])
def test_the_installed_package_deploys(installed, elsewhere, stage):
    code, text = run(elsewhere, PROGRAMS / "pyinfra", "inv.py", stage, "--dry", path=str(installed))
    assert code and f"refused: {REFUSED}" in text and text.count("refused: ") == 1, text


def test_the_installed_command_shows_a_state(installed, elsewhere):
    words = [PROGRAMS / "python", "-P", "-m", "llamafleet.cli", "status", "--inventory", "inv.py"]
    code, text = run(elsewhere, *words, path=str(installed))
    assert code == 1 and REFUSED in text, text
