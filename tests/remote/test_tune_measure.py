"""What a trial's figures mean: nothing is counted twice where several users ask, and texts are sent as they are."""

import pytest
from tune_measure import Reply, Workload, figures
from tune_prompts import Prompts, messages, words

WORKLOAD = Workload(prompt=100, reply=50, depth=0, concurrency=2)


def reply(began, written, each, **other):
    """One whose prompt was read after these seconds, with so many tokens of these seconds each."""
    known = {"prompt": 100, "reread": 0, "drafted": 0, "accepted": 0, **other}
    return Reply(reply=written, reply_ms=1000 * written * each, felt_seconds=began + written * each, **known)


def test_prompts_that_are_read_one_after_another_count_once():
    # The first one's reply is held up while the second one's prompt is read.
    found = figures(WORKLOAD, [reply(1.0, 50, 0.06), reply(2.0, 50, 0.04)], 2)
    assert found["prompt_tokens_per_s"] == pytest.approx(200 / 2.0)
    assert found["decode_tokens_per_s"] == pytest.approx(2 / 0.04), "of the one that nothing held up"
    assert found["seconds"] == pytest.approx(4.0), "when both have all"


def test_users_without_a_slot_wait_and_that_is_in_the_seconds():
    # One slot: the second one begins when the first one has ended.
    found = figures(WORKLOAD, [reply(1.0, 50, 0.02), reply(3.0, 50, 0.02)], 1)
    assert found["seconds"] == pytest.approx(4.0) and found["decode_tokens_per_s"] == pytest.approx(50)


def test_what_was_not_written_has_the_pace_of_the_rest():
    found = figures(WORKLOAD._replace(reply=500), [reply(1.0, 50, 0.02)], 1)
    assert found["seconds"] == pytest.approx(1.0 + 500 * 0.02)


def test_what_is_read_again_is_part_of_the_speed_and_told():
    found = figures(WORKLOAD, [reply(2.0, 50, 0.02, prompt=400, reread=300)], 1)
    assert found["prompt_tokens_per_s"] == pytest.approx(200)
    assert (found["prompt_tokens"], found["reread_tokens"]) == (100, 300)


def test_guesses_of_all_users_are_added():
    found = figures(
        WORKLOAD, [reply(1, 50, 0.02, drafted=10, accepted=4), reply(1, 50, 0.02, drafted=6, accepted=6)], 2
    )
    assert (found["drafted"], found["accepted"]) == (16, 10)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One.\n", ["One.\n"]),
        ("a = 10 % 3\n %\nprint(a)", ["a = 10 % 3\n %\nprint(a)"]),  # no line that is a % alone
        ("One\n%\nTwo\r\n%\r\nThree", ["One", "Two\r", "Three"]),
        ("%\n%\n \n", []),
    ],
)
def test_the_messages_of_a_text(text, found):
    assert messages(text) == found


def test_words_are_the_same_in_every_trial_and_others_for_each_user_and_turn():
    assert words(0, 1, 40) == words(0, 1, 40)
    assert len({words(user, turn, 40) for user in range(3) for turn in range(4)}) == 12
    firsts = [words(0, turn, 40).split()[0] for turn in range(-1, 4)]
    assert len(set(firsts)) == len(firsts), "nothing of a turn is the beginning of another"
    assert len(words(0, 1, 40).split()) == 40 and words(0, 1, 1)


def test_words_have_the_tokens_that_are_asked_for(monkeypatch):
    prompts = Prompts("http://x")
    monkeypatch.setattr(prompts, "tokens", lambda text, add_special: list(range(7)))
    assert prompts.words(0, 1, 10) == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2] and len(prompts.words(0, 1, 3)) == 3
