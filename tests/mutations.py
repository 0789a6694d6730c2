"""Valid data from outside, broken in random places: what a lying or broken host or a slip of the keyboard makes of it."""

import copy

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples in every run; deadlines would measure the machine.
FUZZ = settings(
    max_examples=80, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def _nested(depth):
    value = "deep"
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


# 10**5000 has more digits than Python prints, and a repr of 3000 levels exceeds its recursion limit.
JUNK = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2**31, 2**64 + 1, 10**30, -(10**30), 10**5000, 0.5, 1e300]),
    st.sampled_from(
        [float("nan"), float("inf"), "", " ", "-x", "../..", "0-3,8", "a\nb", "\x1b[2J", "\ud800", "é\udcff\0"]
    ),
    st.sampled_from(["x" * 200_000, [], {}, [[]], [{}], {"": None}, ["x"] * 20_000, [0] * 20_000]),
    st.integers(1, 3000).map(_nested),
    st.text(max_size=20),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers(), max_size=3),
    st.lists(st.none() | st.integers() | st.text(max_size=5), max_size=3),
)


KEYS = st.one_of(st.text(max_size=20), st.sampled_from(["\ud800", "k" * 10_000, "a\nb", "", "slotz", "schema"]))


def _places(value, parents=()):
    """Every container below the value with its keys, as paths."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return
    for key, item in items:
        yield (*parents, key)
        yield from _places(item, (*parents, key))


@st.composite
def broken(draw, valid):
    """The data with one to three changes: something is missing, of another type or size, or there is more of it."""
    data = copy.deepcopy(valid)
    places = list(_places(valid))
    for *path, last in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        change, junk = draw(st.sampled_from(["replace", "replace", "delete", "add"])), draw(JUNK)
        holder = data
        try:
            for step in path:
                holder = holder[step]
            _change(holder, last, change, junk, draw(KEYS))
        except (LookupError, TypeError, AttributeError):
            continue  # an earlier change took the place away
    return data


def _change(holder, last, change, junk, key):
    if change == "replace":
        holder[last] = junk
    elif change == "delete":
        del holder[last]
    elif isinstance(holder, dict):
        holder[key] = junk
    else:
        holder.append(junk)
