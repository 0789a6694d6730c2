"""The guard against regressions on a host: a build that is slower is put back unless it is accepted by name; one of the
same speed passes; one that is slower under another kernel is told.

Other programs compute on the machine that these tests run on, some more than others: where that keeps the guard from
comparing, the short tests say in the host's record that they did as much before.
"""

import json

import pytest

from sandbox import upstream
from tests.e2e.deploying import main_pid, on, pyinfra, serves
from tests.e2e.test_08_rollback import MAIN

pytestmark = pytest.mark.long
RECORD = "/var/lib/llamafleet/gate/tiny.json"
UNIT = "llama-server-tiny"
# The service computes on, after each token, for so many times as long as the token took.
SLOWER = """
static double now() { timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
extern "C" float * llama_get_logits_ith(llama_context * ctx, int i) {
    static double last = now();
    double until = now() + %d * (now() - last);
    while (real && now() < until) { }
    float * logits = logits_of(ctx, i);
    last = now();
    return logits;
}
"""
MUCH, LITTLE = 8, 2
TRIES = 5  # until nothing else computes


@pytest.fixture(scope="module")
def host(builder):
    return builder


@pytest.fixture
def data(settings, host):
    """Settings by which the floor turns nothing away that serves, so that the guard alone decides."""
    return settings(host, speed_floor_percent=1)


def slower(outside, factor):
    """A commit that is slower by this factor, with its tag."""
    code = MAIN % {"before": SLOWER % (factor - 1), "first": ""}
    return upstream.add_commit(outside.clone, {"tools/server/main.cpp": code}, f"slower{factor}"), f"slower{factor}"


def gate(host):
    return json.loads(on(host, "cat", RECORD))


def change_pace(host, **changes):
    """Replace these values of the recorded pace, and leave the floor a speed that any server has."""
    record = gate(host)
    write = "import json, sys; json.dump(json.loads(sys.argv[2]), open(sys.argv[1], 'w'))"
    record = {**record, "speeds": [1.0], "pace": {**record["pace"], **changes}}
    on(host, "python3", "-c", write, RECORD, json.dumps(record))


def current(host):
    """The key of the release that is installed."""
    return on(host, "readlink", "/opt/llamafleet/current").rpartition("/")[2]


def of_pace(run):
    return [line for line in run.text.splitlines() if "tokens/s written" in line or "nothing was compared" in line]


def was_compared(run):
    return not any("nothing was compared" in line for line in run.text.splitlines())


def check_put_back(run, host, commit, release):
    told = next((line for line in run.text.splitlines() if "did not pass the gate" in line), run.text)
    assert run.code != 0 and "pace: expected" in told and f'accept_slower = "{commit}"' in told, told
    assert "the previous one was put back and serves" in told and serves(host)
    assert current(host) == release
    record = gate(host)
    assert record["ok"] and record["pace"]["release"] == release == record["release"]
    assert record["last_failure"]["check"]["name"] == "pace"


def only_the_record_counts(host):
    """Stop the server, which is then not measured before a switch."""
    change_pace(host, others=[64.0] * 8)
    on(host, "systemctl", "stop", UNIT)


def test_a_slower_build_is_put_back(data, inventory, outside, host):
    assert pyinfra(inventory((host, data))).code == 0
    release = current(host)
    only_the_record_counts(host)
    commit, tag = slower(outside, MUCH)
    check_put_back(pyinfra(inventory((host, {**data, "llama_cpp_ref": tag}))), host, commit, release)


def test_a_slower_build_is_installed_where_it_is_accepted(data, inventory, outside, host):
    assert pyinfra(inventory((host, data))).code == 0
    release = current(host)
    only_the_record_counts(host)
    commit, tag = slower(outside, MUCH)
    model = {**data["models"][0], "accept_slower": commit[:10]}
    accepted = {**data, "llama_cpp_ref": tag, "models": [model]}
    run = pyinfra(inventory((host, accepted)))
    assert run.code == 0 and serves(host), run.text
    assert gate(host)["ok"] and gate(host)["release"] != release
    assert "slower, accepted by accept_slower" in run.text
    assert pyinfra(inventory((host, accepted)), "--dry").changed() == []


def test_a_build_that_is_slower_under_another_kernel_is_told(data, inventory, host):
    assert pyinfra(inventory((host, data))).code == 0
    faster = [100 * speed for speed in gate(host)["pace"]["decode"]]
    change_pace(host, kernel="6.0.0", decode=faster, others=[64.0] * 8)
    on(host, "systemctl", "restart", UNIT)  # as after a boot: nothing is in the cache
    on(host, "systemctl", "start", f"{UNIT}-liveness.service")
    journal = on(host, "journalctl", "-q", "--no-pager", "-n", "30", "-u", f"{UNIT}-liveness.service")
    assert "tokens/s written in place of" in gate(host)["slower"], journal
    assert "kernel 6.0.0; now kernel" in gate(host)["slower"] and "slower since the driver or the kernel" in journal
    assert pyinfra(inventory((host, data)), "--dry").changed() == []


def test_a_build_that_is_little_slower_is_put_back_where_the_host_is_quiet(data, inventory, outside, host):
    commit, tag = slower(outside, 1 + LITTLE)
    for _ in range(TRIES):
        assert pyinfra(inventory((host, data))).code == 0
        release, before = current(host), main_pid(host, "tiny")
        run = pyinfra(inventory((host, {**data, "llama_cpp_ref": tag})))
        print(*of_pace(run), sep="\n", flush=True)
        if run.code != 0:
            break
        assert not was_compared(run) or gate(host)["pace"]["commit"] == commit
    else:
        pytest.skip("other programs computed beside each try")
    check_put_back(run, host, commit, release)
    assert main_pid(host, "tiny") != before


def test_a_build_of_the_same_speed_passes_each_time(data, inventory, outside, host):
    upstream.add_commit(outside.clone, {"tools/server/main.cpp": MAIN % {"before": "", "first": ""}}, "same")
    compared, switches = 0, 20
    assert pyinfra(inventory((host, data))).code == 0
    for number in range(switches):
        run = pyinfra(inventory((host, data if number % 2 else {**data, "llama_cpp_ref": "same"})))
        print(f"switch {number + 1}:", *of_pace(run), json.dumps(gate(host)["pace"]), sep="\n", flush=True)
        assert run.code == 0 and serves(host), run.text
        compared += was_compared(run)
    print(f"{compared} of {switches} compared, none turned away")
