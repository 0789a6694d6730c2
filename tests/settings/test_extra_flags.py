"""What an operator may add to llama-server's flags, and what is refused, by name."""

import pytest

from llamafleet.settings import extra_flags as extra


def problems(*flags, dangerous=(), has_keys=True):
    return [f"{setting}: {text}" for setting, text in extra.problems(flags, dangerous, has_keys)]


def test_safe_flags_become_arguments():
    flags = ("--reasoning-format deepseek", "--jinja", '--chat-template-kwargs {"a": 1}')
    assert problems(*flags) == []
    assert extra.words(flags) == ("--reasoning-format", "deepseek", "--jinja", "--chat-template-kwargs", '{"a": 1}')


@pytest.mark.parametrize(
    "name", ["--tools", "--agent", "--mcp-servers-json", "--ui-mcp-proxy", "--props", "--cors-origins"]
)
def test_what_opens_the_host_is_refused_among_the_safe(name):
    [problem] = problems(f"{name} x" if extra.DANGEROUS[name][0] else name)
    assert problem.startswith(f"extra_flags: {name} ") and extra.DANGEROUS[name][1] in problem


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--api-key secret", "the setting api_key_file"),
        ("--hf-token hf_x", "the setting hub_token_file"),
        ("--port 1", "the setting port"),
        ("--n-gpu-layers 9", "decided by the plan"),
        ("--verbose", "prompts, and parts of keys"),
        ("--rpc host:1", "insecure"),
        ("--resoning-format x", "did you mean --reasoning-format?"),
        ("-ngl 9", "not among the flags known to be safe"),
        ("reasoning", "not among the flags known to be safe"),
        ("--temp", "needs a value"),
        ("--jinja yes", "takes no value"),
        ("--temp 1\n--props", "no control characters"),
    ],
)
def test_each_refusal_says_why(flag, says):
    [problem] = problems(flag)
    assert problem.startswith("extra_flags: ") and says in problem
    assert "secret" not in problem and "hf_x" not in problem


@pytest.mark.parametrize("flag", ["x" * 10**6, "--temp " + "\n" * 10**6, "--jinja " + "y" * 10**6], ids="abc")
def test_a_refusal_is_short_however_long_the_flag_is(flag):
    [problem] = problems(flag)
    assert len(problem) < 300 and problem.isprintable()


def test_what_opens_the_host_needs_a_key_even_where_it_is_asked_for():
    assert problems(dangerous=["--props"]) == []
    [problem] = problems(dangerous=["--props"], has_keys=False)
    assert "give an api_key_file too" in problem
    [problem] = problems(dangerous=["--temp 1"])
    assert problem.startswith("dangerous_flags: should be of ")


@pytest.mark.parametrize(("flag", "hint"), [("--foo", "has those that are"), ("--tmep 1", "did you mean --temp?")])
def test_a_near_flag_is_named_and_no_other(flag, hint):
    """Two dashes are no likeness: --foo is not near --tools."""
    [(_, problem)] = extra.problems([flag], [], True)
    assert problem.endswith(hint)
