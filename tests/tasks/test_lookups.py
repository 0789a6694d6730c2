"""What a run looks up on the operator's machine: once for all hosts, and with a way out where it fails."""

import subprocess

import pytest

from llamafleet.settings import secrets
from llamafleet.settings.schema import Settings
from tasks.lib import lookups
from tests import planning


@pytest.fixture(autouse=True)
def forget():
    lookups._known.clear()
    lookups._locks.clear()


@pytest.fixture
def repository(tmp_path):
    """A git repository with one commit, an annotated tag and a branch."""
    folder = tmp_path / "upstream"
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.net"]
    subprocess.run(["git", "init", "--quiet", "--initial-branch=master", str(folder)], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "one"], check=True)
    subprocess.run([*git, "tag", "--annotate", "b1", "--message", "b1"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return folder, head.stdout.strip()


def wanted(repository, ref) -> Settings:
    return planning.settings({}, llama_cpp_repository=str(repository), llama_cpp_ref=ref)


@pytest.mark.parametrize("ref", ["b1", "master"])
def test_a_tag_or_branch_is_the_commit_that_it_names(repository, ref):
    folder, head = repository
    assert lookups.commit(wanted(folder, ref)) == head


def test_a_commit_needs_no_asking():
    assert lookups.commit(wanted("/nowhere", "ab" * 20)) == "ab" * 20


def test_git_that_is_missing_here_is_named_with_the_way_out(tmp_path, monkeypatch):
    """It was "[Errno 2] No such file or directory: 'git'"."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(lookups.LookupFailed) as error:
        lookups.commit(wanted("https://example.net/llama.cpp", "b1"))
    assert str(error.value) == (
        "llama_cpp_repository: cannot ask https://example.net/llama.cpp: git is missing on this machine, where you run "
        "llamafleet: install it (apt-get install git, dnf install git, brew install git)"
    )


def test_it_is_resolved_once(repository):
    folder, head = repository
    lookups.commit(wanted(folder, "b1"))
    subprocess.run(["git", "-C", str(folder), "tag", "--delete", "b1"], check=True, capture_output=True)
    assert lookups.commit(wanted(folder, "b1")) == head


@pytest.mark.parametrize(
    ("place", "ref", "says"),
    [("", "b2", "has no tag or branch 'b2'"), ("/missing", "b1", "cannot ask")],
    ids=["unknown ref", "no repository"],
)
def test_what_cannot_be_resolved_says_why(repository, place, ref, says):
    with pytest.raises(lookups.LookupFailed, match=says):
        lookups.commit(wanted(f"{repository[0]}{place}", ref))


def test_a_failure_is_remembered():
    asked = []

    def look_up():
        asked.append(1)
        raise lookups.LookupFailed("no")

    for _ in range(3):
        with pytest.raises(lookups.LookupFailed):
            lookups.once("key", look_up)
    assert asked == [1]


def test_the_hub_token_comes_from_the_file_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr("llamafleet.settings.secrets._taken", {})
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert secrets.hub_token(None, "https://h") == "hf_environment"
    (tmp_path / "token").write_text("hf_file\n")
    (tmp_path / "token").chmod(0o600)
    asked = planning.settings({}, hub_token_file=str(tmp_path / "token"))
    assert secrets.hub_token(asked.hub_token_file, asked.hub_endpoint) == "hf_file"


def test_secrets_are_taken_out_of_the_environment_that_programs_inherit(monkeypatch):
    monkeypatch.setattr("llamafleet.settings.secrets._taken", {})
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setenv("FLEET_KEYS", "key-in-a-variable")
    wanted = planning.settings({"api_key_file": "env:FLEET_KEYS"})
    lookups.take_secrets(wanted)
    inherited = subprocess.run(["env"], capture_output=True, text=True).stdout
    assert "hf_environment" not in inherited and "key-in-a-variable" not in inherited
    # Taken, not lost; also when asked again for the next host.
    for _ in range(2):
        assert secrets.hub_token(None, "https://h") == "hf_environment"
        assert lookups.instance_secrets(wanted.models[0]) == {"api-keys": "key-in-a-variable\n" * 2}
