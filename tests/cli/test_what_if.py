"""The plan with one input changed: the largest context that fits, the next larger quantisation."""

from llamafleet.cli.what_if import STEPS, largest_context, what_if
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from tests import planning


def planned(host, layout, reserve=2048, **instance):
    settings = planning.settings(instance, ram_reserve_mib=reserve)
    header = planning.header(layout)

    def planner(instance, header):
        return plan_host(host, [(instance, header)], settings)[0]

    plan = planner(settings.models[0], header)
    assert isinstance(plan, Plan)
    return planner, settings.models[0], header, plan


def test_the_largest_context_fits_and_more_does_not():
    given = planned(planning.machine(ram_gib=10), "Llama-3.1-8B", context_tokens=4096)
    planner, instance, header, plan = given
    largest = largest_context(planner, instance, header, plan.context_tokens, 131072)
    assert 4096 < largest.context_tokens < 131072
    more = planning.settings({"context_tokens": largest.context_tokens + 131072 // STEPS}).models[0]
    assert isinstance(planner(more, header), Refusal)
    [context, quantisation] = what_if(*given)
    assert f" fits: {largest.context_tokens} tokens (the model was trained for 131072)" in context
    assert quantisation.startswith("the next larger quantisation, Q5_K with about 5.3 GiB, fits, at about")


def test_no_sentences_where_nothing_larger_exists():
    given = planned(planning.machine([24564]), "gpt-oss-20b", context_tokens=131072)
    assert list(what_if(*given)) == []  # the whole context; MXFP4 is how it was trained


def test_a_next_quantisation_that_does_not_fit():
    few = {"context_tokens": 2048, "prompt_cache_mib": 0}
    given = planned(planning.machine(ram_gib=8), "Llama-3.1-8B", reserve=2500, **few)  # leaves 5.6 GiB
    assert list(what_if(*given))[-1].endswith("does not fit")
