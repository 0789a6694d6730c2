"""Does `sandbox.oracle.ask` return llama-server's figures for the given flags?"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from sandbox import models
from sandbox.oracle import OracleError, ask

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.weightless(tmp_path_factory.mktemp("models"), "Llama-3.1-8B")


def flags(text):
    return text.split()


def test_devices_hold_what_the_split_says(model):
    answer = ask(model, flags("-c 16384 -np 1 -ngl 33 -ts 17,16"), 2)
    assert [(row.name, row.model, row.context) for row in answer.devices] == [("RPC0", 2113, 1088), ("RPC1", 2290, 960)]
    assert (answer.host.model, answer.host.context, answer.others) == (281, 0, {})


def test_without_devices_everything_is_the_host_s(model):
    answer = ask(model, flags("-c 8192 -np 1"))
    assert answer.devices == ()
    assert answer.host.context == 1024  # MiB: 8192 cells x 32 layers x 4 KiB
    assert answer.host.model + answer.repacked == 4685


def test_a_context_larger_than_any_memory_is_not_cut(model):
    answer = ask(model, flags("-c 1048576 -np 8 -ngl 33"), 1)
    assert answer.devices[0].context == 131072


def test_questions_do_not_disturb_each_other(model):
    contexts = [4096 * n for n in range(1, 7)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda tokens: ask(model, flags(f"-c {tokens} -np 1 -ngl 33"), 1), contexts))
    assert [answer.devices[0].context for answer in answers] == [tokens // 8 for tokens in contexts]


def test_an_error_has_llama_server_s_own_message(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(OracleError, match="invalid magic"):
        ask(tmp_path / "broken.gguf", flags("-c 4096"))


def test_fit_cannot_be_switched_off(model):
    with pytest.raises(OracleError, match="--fit is not for the oracle"):
        ask(model, flags("--fit off -c 4096"))
