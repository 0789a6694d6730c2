"""Whatever a host answers, our side reads it or refuses it in one line: no traceback, nothing unclean to show."""

import json

import pytest

from tests import mutants

# Of every answer; a survey is planned for, and takes the most of the time.
OFFLINE = {"survey": 300}
NAMES = sorted(mutants.USES)


@pytest.fixture(scope="module")
def seeds():
    return mutants.seeds()


@pytest.mark.parametrize("name", NAMES)
def test_a_faithful_answer_is_used(seeds, name):
    for host, value in seeds[name]:
        assert mutants.use(name, host, json.dumps(value))


@pytest.mark.parametrize("kind", ["cuda", "cpu", "hip", "vulkan"])
def test_the_faithful_hosts_are_as_they_should_be(kind):
    host = mutants.boxes()[kind]
    read = mutants.inputs(host, json.dumps(host.survey))
    desired = mutants.desire(read, mutants.RUN, mutants.render)
    changes = mutants.changes_needed(desired, desired.installed)
    assert not changes.any and not changes.note, changes


def check(seeds, name, numbers):
    """How many of these mutants were used and how many refused."""
    counts = {"used": 0, "refused": 0}
    for number in numbers:
        host, value = seeds[name][number % len(seeds[name])]
        line = mutants.mutant(number, value)
        try:
            counts["refused" if mutants.use(name, host, line) is None else "used"] += 1
        except Exception as error:
            raise AssertionError(
                f"mutant {number} of {name}: {type(error).__name__}: {error}\n{line[:3000]}"
            ) from error
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_mutants_end_in_a_value_or_in_one_line(seeds, name):
    count = OFFLINE.get(name, 150)
    counts = check(seeds, name, range(count))
    assert counts["used"] + counts["refused"] == count
    assert counts["used"] > count * 0.02 and counts["refused"] > count * 0.1, counts


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_fifty_thousand_mutants(seeds, name):
    """All together; half of them are surveys."""
    count = 25_000 if name == "survey" else 25_000 // (len(NAMES) - 1) + 1
    counts = check(seeds, name, range(100_000, 100_000 + count))
    print(f"{name}: {counts}")
