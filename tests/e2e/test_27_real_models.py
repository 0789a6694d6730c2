"""Real models: what they say has a meaning, and keeps it.

Random weights show that bytes, flags and checks are right; only a trained model shows that its answers are too.
"""

import itertools
import json

import numpy as np
import openai
import pytest

from sandbox import minilm, real_models
from tests import sentence_vectors
from tests.e2e import deploying
from tests.e2e.deploying import PORT, main_pid, on, pyinfra

# Beginnings, each with a word that follows when the weights mean something.
PROMPTS = {"Water boils at": "100 degrees", "The sun rises in": "the east", "Once upon a time": "there was"}
TOKENS = 32
TIE_NATS = 0.5  # as in gate_speculation.py
# llama-server takes the argument, loads, and computes what is no number: the gate's completions fail.
BAD = {"extra_flags": ["--rope-freq-base nan"]}

# The example of sentence-transformers' quick start for all-MiniLM-L6-v2, and the cosines that it prints.
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
PUBLISHED = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
# Pairs that mean nearly the same, all four about different things.
PAIRS = [
    ("A man is playing a guitar on the street.", "Somebody makes music outside with a guitar."),
    ("The disk is full, so the download was interrupted.", "There is no space left to store the downloaded file."),
    ("Der Hund schläft - im Café, naïvely!", "der hund schlaft im cafe, naively"),
    ("Interest rates were raised by the central bank in 2024.", "In 2024 the central bank increased its interest rates."),
]  # fmt: skip
COSINE_TOLERANCE = 0.01


@pytest.fixture(scope="module")
def host(deployed):
    return deployed[0]


@pytest.fixture(scope="module")
def deploy(outside, host, tmp_path_factory):
    """Deploys models, each a dictionary of its settings, to the host."""
    folder, count = tmp_path_factory.mktemp("real"), itertools.count()

    def run(*models):
        base = deploying.settings(outside, host)
        entries = [{**base["models"][0], **model} for model in models]
        where = folder / f"inventory{next(count)}.py"
        return pyinfra(deploying.write_inventory(where, [(host, {**base, "models": entries})]))

    return run


@pytest.fixture(scope="module")
def small(outside):
    """Settings of the two small models."""
    [gemma] = real_models.fetch(real_models.GEMMA_270M).values()
    return [
        {"name": "gemma", "source": outside.publish("real/gemma-GGUF", gemma)},
        {"name": "minilm", "source": outside.publish("real/minilm-GGUF", minilm.gguf()), "port": PORT + 1,
         "context_tokens": 256, "serves": "embedding"},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(deploy, small):
    """Both small models serve."""
    done = deploy(*small)
    assert done.code == 0, done.text


def client(host, port=PORT):
    return openai.OpenAI(base_url=f"http://{host.address}:{port}/v1", api_key="none", max_retries=0, timeout=900)


def answers(host):
    """What the model writes after each prompt, greedily."""
    return [
        client(host).completions.create(model="gemma", prompt=prompt, max_tokens=TOKENS, temperature=0).choices[0].text
        for prompt in PROMPTS
    ]


def vectors(host, texts):
    told = client(host, PORT + 1).embeddings.create(model="minilm", input=list(texts), encoding_format="float")
    return np.array([one.embedding for one in sorted(told.data, key=lambda one: one.index)])


@pytest.mark.long
def test_gemma_keeps_its_answers_over_a_restart_and_a_rollback(served, deploy, small, host):
    before = answers(host)
    assert all(word in text for text, word in zip(before, PROMPTS.values(), strict=True)), before

    first = main_pid(host, "gemma")
    on(host, "systemctl", "restart", "llama-server-gemma")
    second = main_pid(host, "gemma")
    assert second != first and answers(host) == before

    failed = deploy({**small[0], **BAD}, *small[1:])
    assert failed.code != 0 and "did not pass the gate" in failed.text, failed.text
    assert "the previous one was put back and serves" in failed.text
    assert main_pid(host, "gemma") not in (first, second) and answers(host) == before


def test_a_second_run_changes_nothing(served, deploy, small, host):
    done = deploy(*small)
    assert done.code == 0 and done.changed(host.name) == [], done.text


def test_sentences_that_mean_the_same_are_near(served, host):
    found = vectors(host, SENTENCES)
    assert found.shape == (3, 384) and np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-3
    assert np.abs(found @ found.T - PUBLISHED).max() < COSINE_TOLERANCE

    flat = list(itertools.chain(*PAIRS))
    cosines = (found := vectors(host, flat)) @ found.T
    for left in range(0, len(flat), 2):
        others = [cosines[left, right] for right in range(len(flat)) if right not in (left, left + 1)]
        assert cosines[left, left + 1] > max(others) + 0.2, (flat[left], cosines[left])

    weights, vocabulary = real_models.fetch(real_models.MINILM).values()
    tensors = minilm.read_safetensors(weights)
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    expected = np.array([sentence_vectors.vector(text, tensors, words) for text in flat])
    assert np.abs(cosines - expected @ expected.T).max() < COSINE_TOLERANCE
    assert (found * expected).sum(axis=1).min() > 1 - COSINE_TOLERANCE  # the vectors themselves, too


CODE = """\
class Account:
    def __init__(self, owner: str, balance: int = 0) -> None:
        self.owner = owner
        self.balance = balance

    def deposit(self, amount: int) -> None:
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount: int) -> None:
        if amount > self.balance:
            raise ValueError("balance is too low")
        self.balance -= amount
"""
# What a draft model guesses well, and what it does not.
TASKS = (f"Rename `balance` to `funds` everywhere, and print only the code:\n\n```python\n{CODE}```",
         "Explain in three sentences why the sky is blue.")  # fmt: skip
TOOLS = [
    {"type": "function", "function": {
        "name": name, "description": description,
        "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}}}
    for name, description, key in (("get_weather", "The weather of a city at this moment.", "city"),
                                   ("get_time", "The time of day in a city.", "city"))
]  # fmt: skip


@pytest.fixture(scope="module")
def coder(outside):
    """Settings of the model that writes code."""
    [file] = real_models.fetch(real_models.QWEN_1_5B).values()
    return {"name": "coder", "source": outside.publish("real/coder-GGUF", file), "context_tokens": 2048, "threads": 2}


@pytest.fixture(scope="module")
def draft(outside):
    """The source of its draft model."""
    [file] = real_models.fetch(real_models.QWEN_0_5B).values()
    return outside.publish("real/draft-GGUF", file)


def replies(host):
    """(text, tokens drafted, tokens accepted, the tokens with their likelihoods) of each task, greedily."""
    for task in TASKS:
        told = client(host).chat.completions.create(
            model="coder", messages=[{"role": "user", "content": task}], temperature=0, max_tokens=120,
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
        timings, [choice] = told.model_extra["timings"], told.choices
        counts = timings.get("draft_n", 0), timings.get("draft_n_accepted", 0)
        yield choice.message.content, *counts, choice.logprobs.content


def parts_at_a_tie(text, alone, tokens):
    """Whether the text is the same, or goes another way where the two likeliest tokens are about equal: several tokens
    at once are computed by other kernels than one."""
    if text == alone:
        return True
    common = next(n for n, (one, other) in enumerate(zip(text, alone, strict=False)) if one != other)
    ends = itertools.accumulate(len(one.token) for one in tokens)
    token = next(one for one, end in zip(tokens, ends, strict=True) if end > common)
    first, second = (one.logprob for one in token.top_logprobs)
    print(f"another way after {common} characters, where two tokens are {first - second:.2f} nats apart")
    return first - second < TIE_NATS


@pytest.mark.long
def test_a_draft_model_guesses_and_the_text_stays(deploy, coder, draft, host):
    done = deploy(coder)
    assert done.code == 0, done.text
    alone = list(replies(host))
    assert "self.funds" in alone[0][0] and [drafted for _, drafted, *_ in alone] == [0, 0]
    done = deploy({**coder, "speculation": "draft", "draft": draft})
    assert done.code == 0, done.text
    with_draft = list(replies(host))
    print(f"drafted and accepted: {[counts for _, *counts, _ in with_draft]}")
    assert with_draft[0][0] == alone[0][0]
    for (text, *_), (usual, *_, tokens) in zip(with_draft, alone, strict=True):
        assert parts_at_a_tie(text, usual, tokens), (text, usual)
    for _, drafted, accepted, _ in with_draft:
        assert drafted > 30 and accepted > drafted // 4, (drafted, accepted)
    assert with_draft[0][2] / with_draft[0][1] > 0.8  # code that is copied


# Asked for a call, this model writes JSON in a block of code, whatever its own template says: here that is the form of a
# call, and llama-server takes it for one.
TOOL_TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\nYou are a helpful assistant.\n\nYou may call a function. These are known:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- 'To call one, write:\n```json\n{"name": <function>, "arguments": <object>}\n```<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\nThe function returned:\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\n```json\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\n```' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


@pytest.mark.long
def test_a_tool_is_called_by_the_openai_client(deploy, coder, host, tmp_path):
    template = tmp_path / "tools.jinja"
    template.write_text(TOOL_TEMPLATE)
    done = deploy({**coder, "chat_template_file": str(template)})
    assert done.code == 0, done.text
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    told = client(host).chat.completions.create(
        model="coder", messages=messages, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=100
    )
    [call] = told.choices[0].message.tool_calls
    assert told.choices[0].finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages += [told.choices[0].message.model_dump(exclude_none=True),
                 {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": -7, "sky": "snow"}'}]  # fmt: skip
    told = client(host).chat.completions.create(
        model="coder", messages=messages, tools=TOOLS, temperature=0, max_tokens=100
    )
    assert "-7" in told.choices[0].message.content and "snow" in told.choices[0].message.content.lower()
