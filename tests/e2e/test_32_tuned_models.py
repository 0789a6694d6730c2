"""A tune on a real model with real text: what guessing ahead gains is measured, and installed only where it pays."""

import itertools
import json
import re
from statistics import median

import openai
import pytest

from sandbox import oracle_build, real_models
from tests.e2e import deploying
from tests.e2e.deploying import PORT, on, pyinfra

pytestmark = pytest.mark.long

CODE = '''\
"""Orders of a shop, their prices and what is left in the store."""

from dataclasses import dataclass, field


@dataclass
class Item:
    name: str
    price_cents: int
    in_store: int = 0


@dataclass
class Order:
    customer: str
    items: list[Item] = field(default_factory=list)

    def add(self, item: Item) -> None:
        if item.in_store <= 0:
            raise ValueError(f"{item.name} is sold out")
        item.in_store -= 1
        self.items.append(item)

    def remove(self, item: Item) -> None:
        self.items.remove(item)
        item.in_store += 1

    def total(self) -> int:
        return sum(item.price_cents for item in self.items)

    def describe(self) -> str:
        lines = [f"{item.name}: {item.price_cents / 100:.2f}" for item in self.items]
        return "\\n".join([f"Order of {self.customer}", *lines, f"Total: {self.total() / 100:.2f}"])


@dataclass
class Shop:
    items: dict[str, Item] = field(default_factory=dict)
    orders: list[Order] = field(default_factory=list)

    def stock(self, name: str, price_cents: int, count: int) -> None:
        item = self.items.setdefault(name, Item(name, price_cents))
        item.price_cents = price_cents
        item.in_store += count

    def order(self, customer: str, *names: str) -> Order:
        order = Order(customer)
        for name in names:
            order.add(self.items[name])
        self.orders.append(order)
        return order

    def cancel(self, order: Order) -> None:
        for item in list(order.items):
            order.remove(item)
        self.orders.remove(order)

    def sold_out(self) -> list[str]:
        return sorted(name for name, item in self.items.items() if item.in_store == 0)

    def revenue(self) -> int:
        return sum(order.total() for order in self.orders)

    def best_customer(self) -> str | None:
        spent: dict[str, int] = {}
        for order in self.orders:
            spent[order.customer] = spent.get(order.customer, 0) + order.total()
        return max(spent, key=lambda customer: spent[customer], default=None)
'''
EDIT = f"Rename the function `describe` to `receipt`. Print the whole file again, and nothing else.\n\n```python\n{CODE}```"
PROSE = "Tell in about two hundred words how a lighthouse keeper spent a stormy night. No lists, no headings."
# Tokens of a reply: nearly the whole file again; and what of the story comes before a small model repeats itself.
REPLIES = {"code": 512, "prose": 128}
ROUNDS = 3  # of the comparison afterwards
MINUTES = 30  # a trial takes half a minute on two cores; of less, the draft would not be measured on code


@pytest.fixture(scope="module")
def host(boot):
    [host] = boot(1, "measured", 47, packages=oracle_build.COMPILER, optimised=True)
    return host


@pytest.fixture(scope="module")
def coder(outside):
    """Settings of the model and its draft; all that a tune may choose is set, but for what guesses ahead."""
    [model] = real_models.fetch(real_models.QWEN_1_5B).values()
    [draft] = real_models.fetch(real_models.QWEN_0_5B).values()
    return {
        "name": "coder", "source": outside.publish("real/coder-GGUF", model), "profile": "agent",
        "context_tokens": 2048, "prompt_tokens": 512, "live_tokens": 1024, "threads": 2, "threads_batch": 2,
        "batch_tokens": 2048, "ubatch_tokens": 512, "repack": True, "speculation": "auto", "draft": outside.publish("real/draft-GGUF", draft),
    }  # fmt: skip


@pytest.fixture(scope="module")
def deploy(outside, host, tmp_path_factory):
    folder, count = tmp_path_factory.mktemp("tuned"), itertools.count()

    def run(model, **others):
        base = deploying.settings(outside, host)
        where = folder / f"inventory{next(count)}.py"
        entry = {**base["models"][0], **model}
        return pyinfra(deploying.write_inventory(where, [(host, {**base, **others, "models": [entry]})]), timeout=6000)

    return run


@pytest.fixture(params=["code", "prose"])
def text(request, tmp_path):
    file = tmp_path / f"{request.param}.txt"
    file.write_text(EDIT if request.param == "code" else PROSE)
    return file


def tokens_per_s(host, text, count):
    """Of one reply to the text, as the server says."""
    client = openai.OpenAI(base_url=f"http://{host.address}:{PORT}/v1", api_key="none", max_retries=0, timeout=900)
    told = client.chat.completions.create(
        model="coder", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=count
    )
    return told.model_extra["timings"]["predicted_per_second"]


def test_guessing_is_installed_where_it_pays(deploy, coder, host, text):
    coder = {**coder, "reply_tokens": REPLIES[text.stem]}
    done = deploy(
        {**coder, "tune_prompt_file": str(text)}, tune="always", tune_minutes=MINUTES, tune_stops_service=True
    )
    assert done.code == 0, done.text
    record = json.loads(on(host, "cat", "/var/lib/llamafleet/tuned/coder.json"))
    by_label = {}
    for trial in record["trials"]:
        if trial["error"] is None:
            by_label.setdefault(trial["label"], []).append(trial["seconds"])
    print({label: (len(all_of), round(median(all_of), 2)) for label, all_of in by_label.items()}, record["winner"])
    argv = on(host, "systemctl", "show", "--property=ExecStart", "--value", "llama-server-coder.service")
    kind = re.search(r"--spec-type (\S+)", argv)
    if text.stem == "prose":
        assert record["settings"].get("speculation", "none") == "none" and kind is None, (record["settings"], argv)
        return
    assert record["settings"]["speculation"] == "ngram" and kind[1].startswith("ngram"), (record["settings"], argv)
    tuned, plain = [], []
    fixed = {**coder, **record["settings"], "draft": None}
    for _ in range(ROUNDS):
        for found, model in ((plain, {**coder, "speculation": "none", "draft": None}), (tuned, fixed)):
            again = deploy(model)
            assert again.code == 0, again.text
            found.append(tokens_per_s(host, text.read_text(), REPLIES["code"]))
    ratios = [one / other for one, other in zip(tuned, plain, strict=True)]
    print(f"tokens/s with n-grams {tuned}, without {plain}: {median(ratios):.2f} times")
    assert median(ratios) >= 1.8, (tuned, plain)
