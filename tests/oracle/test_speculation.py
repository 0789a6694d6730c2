"""Compare the ledger with llama-server for drafts and heads: what they take, and what they add to their target.

llama-server reports a draft, and the context of a head, beside the model (`common_fit_params`): weights and caches must
agree to the MiB, compute buffers to the hundredth.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.draft_cases import Guessing
from llamafleet.memory.context import Context
from llamafleet.model import speculation
from llamafleet.model.gguf import read_path
from llamafleet.model.shape import Shape
from sandbox import models, outlines, upstream
from sandbox.draft_layouts import DRAFTS

pytestmark = pytest.mark.oracle
OUTLINES = sorted((Path(__file__).parent / "drafts").glob("*.yaml"))
# MiB by which the buffers of a head may differ. Command A's adds up its parts in another order than its layers do.
WITH_HEADS = {"cohere2moe": 1.01, "deepseek32": 0.02, "glm-dsa": 0.02, "hy_v3": 0.02, "step35": 0.02}
KINDS = {"eagle3": "eagle3", "dflash": "dflash", "dspark": "dspark"}
CONTEXTS = {
    "one slot": Context(8192, 1, "f16", 512),
    "four slots": Context(4096, 4, "q8_0", 1024),
    "one cache for four slots": Context(2048, 4, "f16", 512, unified=True),
}


def late(*values):
    """A case of `make test-long`: others of its kind are asked in `make test`."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def wrong(cases, compute_mib=0.02):
    with ThreadPoolExecutor(2) as pool:
        figures = [figure for found in pool.map(lambda case: list(case.figures()), cases) for figure in found]
    assert len(figures) >= 6 * len(cases)
    return [
        f"{part} of {place}: {ours:.2f} MiB, should be {theirs}"
        for place, part, ours, theirs in figures
        if abs(ours - theirs) > (compute_mib if part == "compute" else 0)
    ]


@pytest.mark.parametrize("outline", OUTLINES, ids=lambda path: path.stem)
def test_a_draft_that_reads_hidden_states(outline, folder):
    target = outlines.weightless(Path(__file__).parent / "architectures" / "minimax-m2.yaml", folder)
    draft, kind = outlines.weightless(outline, folder), KINDS[outline.stem.split("-")[0]]
    layers = Shape.of(read_path(target)).layers + 1
    cases = [Guessing(target, kind, context, (layers,), draft, most=5) for context in CONTEXTS.values()]
    one_slot = CONTEXTS["one slot"]
    cases += [Guessing(target, kind, one_slot, (2, layers - 2), draft, 1), Guessing(target, kind, one_slot, (layers,), draft, None)]  # fmt: skip
    assert wrong(cases) == []


@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_head_of_each_kind(name, folder):
    target = outlines.weightless(Path(__file__).parent / "architectures" / f"{name}.yaml", folder)
    layers = Shape.of(read_path(target)).layers + 1
    cases = [Guessing(target, "mtp", context, (layers,)) for context in CONTEXTS.values() if context.kv_type != "q8_0"]
    cases += [Guessing(target, "mtp", CONTEXTS["one slot"], counts) for counts in ((layers // 2, layers - layers // 2), ())]  # fmt: skip
    assert wrong(cases, WITH_HEADS[name]) == []


@pytest.mark.parametrize(
    "layout",
    [
        "GLM-4.5-Air",
        "Qwen3.6-27B-MTP",
        "DeepSeek-R1-MTP",
        *map(late, ("Qwen3.6-35B-A3B-MTP", "Qwen3-Next-80B-A3B-MTP")),
    ],
)
def test_published_models_with_a_head(layout, folder):
    target = models.weightless(folder, DRAFTS.get(layout, layout))
    layers = Shape.of(read_path(target)).layers + 1
    cases = [Guessing(target, "mtp", CONTEXTS[name], (layers,), most=2) for name in ("one slot", "four slots")]
    cases.append(Guessing(target, "mtp", CONTEXTS["four slots"], (layers // 3, layers - layers // 3), most=4))
    assert wrong(cases) == []


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("Llama-3.3-70B", "Llama-3.2-1B"),
        ("Qwen2.5-Coder-1.5B", "Qwen2.5-Coder-0.5B"),
        late("Qwen3-32B", "Qwen3-0.6B"),
        late("Qwen3-235B-A22B", "Qwen3-0.6B"),
    ],
)
def test_published_models_with_a_small_one(target, draft, folder):
    paths = [models.weightless(folder, DRAFTS.get(layout, layout)) for layout in (target, draft)]
    layers = Shape.of(read_path(paths[0])).layers + 1
    cases = [Guessing(paths[0], "draft", CONTEXTS[name], (layers,), paths[1]) for name in ("one slot", "four slots")]
    cases += [
        Guessing(paths[0], "draft", CONTEXTS["one slot"], (layers - 5, 5), paths[1], 1, most=8),
        Guessing(paths[0], "draft", CONTEXTS["one slot"], (layers,), paths[1], None),
    ]
    assert wrong(cases) == []


@pytest.mark.parametrize(
    ("target", "draft", "kind"),
    [
        ("gpt-oss-120b", "gpt-oss-120b-eagle3", "eagle3"),
        late("Llama-3.3-70B", "llama-3.3-70b-eagle3", "eagle3"),
        late("Qwen3-32B", "qwen3-32b-eagle3", "eagle3"),
        late("Qwen3-235B-A22B", "qwen3-235b-a22b-eagle3", "eagle3"),
        ("Llama-3.1-8B", "llama-3.1-8b-eagle3", "eagle3"),
        late("gpt-oss-20b", "gpt-oss-20b-eagle3", "eagle3"),
        ("Qwen3-8B", "qwen3-8b-dflash", "dflash"),
        late("Qwen3-4B", "qwen3-4b-dflash", "dflash"),
        ("Qwen3.6-27B", "qwen3.6-27b-dflash", "dflash"),
        late("Qwen3.6-35B-A3B", "qwen3.6-35b-a3b-dflash", "dflash"),
        ("Qwen3-8B", "qwen3-8b-dspark", "dspark"),
        late("Qwen3-4B", "qwen3-4b-dspark", "dspark"),
        late("Qwen3.6-27B", "qwen3.6-27b-dspark", "dspark"),
        ("Qwen3.5-4B", "qwen3.5-4b-dspark", "dspark"),
    ],
)
def test_published_models_with_a_draft_made_for_them(target, draft, kind, folder):
    outline = Path(__file__).parent / "drafts" / "published" / f"{draft}.yaml"
    paths = models.weightless(folder, DRAFTS.get(target, target)), outlines.weightless(outline, folder)
    layers = Shape.of(read_path(paths[0])).layers + 1
    cases = [Guessing(paths[0], kind, CONTEXTS[name], (layers,), paths[1], 0, 7) for name in ("one slot", "four slots")]
    assert wrong(cases) == []


@pytest.mark.parametrize("target", ["Llama-3.1-8B", "gpt-oss-20b", "Qwen3-30B-A3B", "Gemma-3-12B"])
def test_n_grams_take_logits_alone(target, folder):
    path = models.weightless(folder, target)
    layers = Shape.of(read_path(path)).layers + 1
    cases = [Guessing(path, "ngram", context, (layers,), most=64) for context in CONTEXTS.values()]
    assert wrong(cases) == []


def sources():
    """The files of the architectures in the pinned release."""
    upstream.ensure()
    listed = subprocess.run(["git", "-C", upstream.REPOSITORY, "ls-tree", "--name-only", upstream.TAG, "src/models/"],
                            capture_output=True, text=True, check=True, timeout=60).stdout.split()  # fmt: skip
    return [path for path in listed if path.endswith(".cpp")]


@pytest.mark.parametrize(
    ("names", "mark"),
    [(speculation.WITH_HEAD, "DECODER_MTP"), (speculation.WITH_HIDDEN_STATES, "t_layer_inp[")],
    ids=["head", "hidden states"],
)
def test_the_lists_of_architectures_are_the_trees(names, mark):
    """Each name's file has the mark, and no file of an architecture that is not listed has it."""
    files = {Path(path).stem: upstream.read_file(upstream.REPOSITORY, path) for path in sources()}
    marked = {stem for stem, text in files.items() if mark in re.sub(r"//.*", "", text)}
    shared = {"hunyuan-dense": "hunyuan-vl", "llama-embed": "llama", "nemotron_h_moe": "nemotron-h", "lfm2moe": "lfm2"}
    stems = {"gpt-oss": "openai-moe", "glm4moe": "glm4-moe"}
    listed = {stems.get(name) or (shared.get(name, name) if mark == "t_layer_inp[" else name).replace("_", "-") for name in names}  # fmt: skip
    assert listed == marked
