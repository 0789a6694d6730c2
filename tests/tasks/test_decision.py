"""Reading a host and remembering the decision about it, offline: what is read, once, and what happens where it fails."""

import types
from dataclasses import replace

import gevent
import pytest
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet import payload
from llamafleet.host.installed import Holder, Offer
from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.remote.common import sha256
from llamafleet.service import measured
from llamafleet.service.building import Run
from llamafleet.service.refusals import Refused
from llamafleet.tuning.records import Kept
from llamafleet.validation import Problem
from tasks.lib import decision, ends, facts, lookups, records, remote
from tasks.lib.decision import READ_ERRORS, Decision
from tasks.lib.this_run import this_run
from tests import planning
from tests.planning import argument
from tests.service.test_desired import survey
from tests.tuning.test_record import value

MODEL = {"name": "m0", "source": "hf:a/b/m.gguf", "port": 9000, "context_tokens": 4096}


class Host:
    """What a decision needs of pyinfra's host: its data, a place to log, a state in which it can fail."""

    def __init__(self, **data):
        values = {**planning.default_data(), "models": [MODEL], **data}
        self.data = types.SimpleNamespace(dict=lambda: values)
        self.name, self.lines, self.failed = "box1", [], set()
        self.state = types.SimpleNamespace(fail_hosts=self.failed.update)

    def log_styled(self, text, **_):
        self.lines.append(text)


@pytest.fixture
def read(monkeypatch):
    """Replaces what reads; counts by name, and `read.survey` may be another."""
    count = types.SimpleNamespace(survey=survey(), surveys=0, models=[], environment=0, asked=[], offers={})

    def survey_(host, settings, bandwidth=False):
        count.surveys += 1
        gevent.sleep(0)  # as a connection does: other hosts' greenlets run meanwhile
        return count.survey

    def model(instance, settings):
        count.models.append(instance.name)
        return ModelFiles((RemoteFile("m.gguf", "https://x/m.gguf", 5, "a" * 64),), planning.header("Qwen3-8B"))

    def offers(host, manager, needs, settings):
        count.asked.append((manager, tuple(need.name for need in needs)))
        return count.offers

    monkeypatch.setattr(facts, "survey", survey_)
    monkeypatch.setattr(facts, "offers", offers)
    monkeypatch.setattr(lookups, "model", model)
    monkeypatch.setattr(lookups, "commit", lambda settings: "c" * 40)
    monkeypatch.setattr(lookups, "take_secrets", lambda settings: None)
    monkeypatch.setattr(decision, "_decisions", {})
    monkeypatch.setattr(decision, "_locks", {})
    return count


def test_a_host_is_read_once_however_many_stages_ask(read):
    host = Host()
    with ctx_host.use(host):
        first = decision.decision()
        assert isinstance(first, Decision) and first.changes.services == {"m0": ("it is not installed",)}
        assert decision.decision() is first
    assert (read.surveys, read.models, host.lines) == (1, ["m0"], [])


def test_a_host_that_lacks_nothing_is_not_asked_what_its_repositories_have(read):
    with ctx_host.use(Host()):
        assert decision.decision() is not None
    assert read.asked == []


def test_what_no_repository_has_is_refused_before_anything_is_changed(read):
    host = Host()
    read.survey = survey(missing_packages=("cmake", "curl"))
    read.offers = {"cmake": Offer(None, off=("crb",)), "curl": Offer("curl", "8.5")}
    with ctx_host.use(host):
        assert decision.decision() is None
    assert read.asked == [("apt", ("curl", "cmake"))]
    assert host.lines == [
        "refused: packages: cmake is missing, and no enabled repository of the host has cmake (crb: switched off there): "
        "add-apt-repository crb"
    ]


def test_of_two_that_ask_at_once_one_reads_and_the_other_waits(read):
    host, answers = Host(), []

    def ask():
        with ctx_host.use(host):
            answers.append(decision.decision())

    gevent.joinall([gevent.spawn(ask), gevent.spawn(ask)], raise_error=True)
    assert read.surveys == 1 and answers[0] is answers[1] is not None


def test_a_refused_host_fails_with_a_line_for_each_reason_and_is_not_read_again(read):
    host = Host(keep_release=1, build_ui="yes")
    with ctx_host.use(host):
        assert decision.decision() is None and decision.decision() is None
    assert host.lines == [
        "refused: build_ui: should be True or False, is 'yes': write True",
        "refused: keep_release: unknown setting; did you mean `keep_releases`?",
    ]
    assert host.failed == {host}


def test_why_a_host_was_refused_is_remembered_for_the_end_of_the_run(read, monkeypatch):
    monkeypatch.setattr(ends, "_reasons", {})
    with ctx_host.use(Host(keep_release=1)):
        decision.decision()
    assert ends.reason("box1") == "refused: keep_release: unknown setting; did you mean `keep_releases`?"


def test_a_refusal_of_what_was_read_fails_the_host_too(read):
    read.survey = survey(euid=1000)
    host = Host()
    with ctx_host.use(host):
        assert decision.decision() is None
    assert host.failed == {host} and host.lines[0].startswith("refused: commands run there as an ordinary user")


@pytest.mark.parametrize("kind", READ_ERRORS[1:], ids=lambda kind: kind.__name__)
def test_whatever_cannot_be_read_is_a_refusal_with_its_text(read, monkeypatch, kind):
    def fails(settings):
        raise kind([Problem("machine", "the fact")]) if kind is decision.MachineError else kind("the fact")

    monkeypatch.setattr(lookups, "commit", fails)
    refused = decision.decide(Host())
    assert isinstance(refused, Refused) and "the fact" in str(refused)


@pytest.fixture
def stages(monkeypatch):
    """Runs these stages on a host in one run; the last one's decision."""
    monkeypatch.setattr(decision, "_made", {})

    def run(host, *names):
        with ctx_host.use(host):
            return [decision.for_stage(name) for name in names][-1]

    return run


@pytest.mark.parametrize(
    ("stage", "first"),
    [
        ("build", "tasks.bootstrap.bootstrap"),
        ("model", "tasks.bootstrap.bootstrap"),
        ("verify", "tasks.bootstrap.bootstrap, tasks.build.build, tasks.model.model"),
        ("service", "tasks.bootstrap.bootstrap, tasks.build.build, tasks.model.model"),
    ],
)
def test_a_stage_alone_on_a_new_host_says_what_comes_first(read, stages, stage, first):
    read.survey = survey(helpers=None, user=False)
    host = Host()
    assert stages(host, stage) is None and host.failed == {host}
    [line] = host.lines
    assert line.startswith(f"refused: run deploy.py first, or {first}: the stage {stage} needs")


def test_stages_in_their_order_need_nothing_else(read, stages):
    host = Host()
    assert stages(host, "bootstrap", "toolkit", "build", "model", "verify", "service") is not None
    assert host.lines == [] and not host.failed


def test_a_stage_alone_with_helpers_of_another_version_is_run(read, stages):
    read.survey = survey(helpers="0" * 16)
    host = Host()
    assert stages(host, "model") is not None and host.lines == []


@pytest.mark.parametrize("error", [KeyError("found"), RecursionError("too deep"), TypeError("no list")])
def test_whatever_else_goes_wrong_is_a_refusal_too(read, monkeypatch, error):
    """An answer of a host that nobody thought of: the other hosts go on."""

    def fails(settings):
        raise error

    monkeypatch.setattr(lookups, "commit", fails)
    refused = decision.decide(Host())
    assert f"what the host needs cannot be decided: {type(error).__name__}" in str(refused)


class TestLookedAtAgain:
    """Between the decision and the lock another run may have been there."""

    LAST = Holder("another", "bob@desk")

    @pytest.fixture
    def decided(self, read):
        host = Host()
        with ctx_host.use(host):
            assert decision.decision().changes.user is False
        return host

    def test_a_host_that_is_as_it_was_needs_what_it_needed(self, read, decided):
        decision.check_unchanged(decided, None)
        assert read.surveys == 2

    def test_a_host_that_is_not_fails_with_what_differs(self, read, decided):
        read.survey = survey(user=False)
        with pytest.raises(
            remote.RemoteError, match=r"somebody changed it .*\(user: now needed for the host\): run again"
        ):
            decision.check_unchanged(decided, None)

    def test_it_says_which_run_was_there_since(self, read, decided):
        read.survey = survey(user=False)
        with pytest.raises(remote.RemoteError, match="bob@desk deployed to it after this run had read it"):
            decision.check_unchanged(decided, replace(self.LAST, age_seconds=-1.0))

    def test_a_run_of_before_the_decision_is_not_blamed(self, read, decided):
        read.survey = survey(user=False)
        with pytest.raises(remote.RemoteError, match="somebody changed it"):
            decision.check_unchanged(decided, replace(self.LAST, age_seconds=3600.0))

    def test_a_host_that_cannot_be_read_again_fails(self, decided, monkeypatch):
        def fails(*_):
            raise decision.MachineError([Problem("machine", "the fact")])

        monkeypatch.setattr(facts, "survey", fails)
        with pytest.raises(remote.RemoteError, match="the fact"):
            decision.check_unchanged(decided, None)


@pytest.mark.parametrize("who", ["this run", "another run"])
def test_a_lock_of_this_run_is_none_of_another_s(read, who):
    ours = Holder(**this_run(), age_seconds=1.0)
    read.survey = survey(lock=ours if who == "this run" else replace(ours, run="another", machine="elsewhere"))
    decided = decision.decide(Host())
    if who == "this run":
        assert decided.desired.run.holder is None
    else:
        assert "is deploying to this host since" in str(decided)


def test_a_run_brings_its_helpers_and_each_model_s_secrets(read, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("key-number-one\nkey-number-two\n")
    keys.chmod(0o600)
    run = decision.decide(Host(models=[{**MODEL, "api_key_file": str(keys)}])).desired.run
    assert run.secrets == {"m0": {"api-keys": "key-number-one\nkey-number-two\n"}}
    assert (run.helpers, run.oldest_python, run.commit) == (payload.helpers_key(), payload.HELPERS_PYTHON, "c" * 40)


def test_what_other_hosts_are_to_serve_is_collected_once_for_all_hosts_without_models():
    """A fleet that is emptied would else read each host's data for each host."""
    read = []

    class Wanting(Host):
        def __init__(self, name, **data):
            super().__init__(**data)
            self.name, own = name, self.data
            self.data = types.SimpleNamespace(dict=lambda: read.append(name) or own.dict())

    state = State()
    state.limit_hosts = None
    one = {**MODEL, "name": "one", "source": "hf:o/r/one.gguf"}
    state.inventory = [Wanting("a", models=[]), Wanting("b", models=[one]), Wanting("c", models=[one, MODEL])]
    _, b, c = state.inventory
    words = [decision._words(state) for _ in range(100)][-1]
    assert words["one"] == {b, c} and words["hf:o/r/one.gguf"] == {b, c} and words[MODEL["name"]] == {c}
    assert read == ["a", "b", "c"]


# --- records of tunes -----------------------------------------------------------------------------


@pytest.fixture
def tuned(read, monkeypatch):
    """The operator has a record of another host that is alike."""
    inputs = decision.read_inputs(Host())
    instance = inputs.settings.models[0]
    build = measured.wanted_build(inputs, Run("", (), "c" * 40, {}, None))[0].key
    record = value({"threads": 2}, of=measured.fingerprint(inputs, instance, build))
    kept = Kept.of({"gpu2": ("tuned/gpu2.json", {"m0": record})})
    monkeypatch.setattr(records, "kept", lambda: kept)
    return read


def test_a_deploy_and_a_plan_of_an_inventory_have_the_same_plan_of_a_record(tuned):
    host = Host()
    with ctx_host.use(host):
        deployed = decision.decision()
    planned, choice, unknown = decision.with_measured(host, decision.read_inputs(host))
    assert deployed.desired.servings[0].plan.argv == choice.results[0].argv and unknown == ""
    assert argument(choice.results[0].argv, "--threads") == "2" and planned.tunings["m0"].where == "on gpu2"


def test_without_the_commit_a_plan_of_an_inventory_says_that_records_are_not_compared(tuned, monkeypatch):
    def fails(settings):
        raise lookups.LookupFailed("llama_cpp_repository: cannot ask")

    monkeypatch.setattr(lookups, "commit", fails)
    planned, choice, unknown = decision.with_measured(Host(), decision.read_inputs(Host()))
    assert unknown == "what was measured is not compared: llama_cpp_repository: cannot ask"
    assert argument(choice.results[0].argv, "--threads") != "2" and planned.tunings == {}


def test_where_nothing_was_measured_no_commit_is_asked_for(read, monkeypatch):
    monkeypatch.setattr(lookups, "commit", None)
    _, choice, unknown = decision.with_measured(Host(), decision.read_inputs(Host()))
    assert len(choice.results) == 1 and unknown == ""


def test_a_damaged_file_of_the_host_s_records_is_named(read, monkeypatch):
    kept = Kept.of({"box1": ("tuned/box1.json", None), "box2": ("tuned/box2.json", None)})
    monkeypatch.setattr(records, "kept", lambda: kept)
    [note] = decision.read_inputs(Host()).notes
    assert note == "tuned/box1.json is damaged: its records are not used; restore or remove it"


def test_the_text_of_a_tune_s_prompts_is_known_by_its_sum(read, tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("Hello")
    host = Host(models=[{**MODEL, "tune_prompt_file": str(text)}])
    assert decision.read_inputs(host).prompts == {"m0": sha256(b"Hello")}
    text.unlink()
    refused = decision.decide(host)
    assert isinstance(refused, Refused)
    assert str(refused) == f"models: m0: tune_prompt_file: there is no file {text} on this machine"
