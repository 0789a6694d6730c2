"""How citations of llama.cpp are read and checked, on a tree of two files."""

import pytest

from bench.adopting.citations import find, problems

TREE = {
    "src/llama-kv-cache.cpp": "// old_name\nvoid llama_kv_cache::state_write(io) { /* gone_name */ n_embd_v_gqa_max(); }\n",
    "src/models/gemma3n.cpp": "void load_arch_hparams() {}\n",
    "ggml/CMakeLists.txt": "# NO_SUCH\nset(GGML_CUDA_FA_QUANTS x)\n",
}


def wrong(text):
    return list(problems(find(text, "ours.py"), TREE, TREE.__getitem__))


@pytest.mark.parametrize("text", [
    "(src/llama-kv-cache.cpp, n_embd_v_gqa_max)",
    "(src/llama-kv-cache.cpp, llama_kv_cache::state_write)",
    "(src/llama-kv-cache.cpp, n_embd_v_gqa_max and state_write; src/models/gemma3n.cpp, load_arch_hparams)",
    "# It copies (src/llama-kv-cache.cpp,\n    # n_embd_v_gqa_max), and more",
    "`load_arch_hparams` in src/models/gemma3n.cpp",
    "src/models/gemma3n.cpp, which is a sentence",
    "src/models/gemma3n.cpp: four states of each token",
    "ggml/CMakeLists.txt, GGML_CUDA_FA_QUANTS",
    "llama.cpp's own graph, as in llama.cpp, some_word",
    "https://github.com/ggml-org/llama.cpp/pull/14939",
    "src/models/ARCHITECTURE.cpp",
    "CUDA's cuda_runtime.h",
])  # fmt: skip
def test_good_citations(text):
    assert wrong(text) == []


@pytest.mark.parametrize(("text", "problem"), [
    ("(src/llama-kv-cache.cpp:217)", "ours.py:1: src/llama-kv-cache.cpp is cited by line: name a function, "
                                     "as in `src/llama-kv-cache.cpp, NAME`"),
    ("ggml/CMakeLists.txt:1", "ours.py:1: ggml/CMakeLists.txt is cited by line: name a function, "
                              "as in `ggml/CMakeLists.txt, NAME`"),
    ("\n\n(llama-kv-cache.cpp, state_write)", "ours.py:3: llama.cpp has no file llama-kv-cache.cpp; "
                                              "should be src/llama-kv-cache.cpp"),
    ("src/nothing.cpp", "ours.py:1: llama.cpp has no file src/nothing.cpp"),
    ("src/llama-kv-cache.cpp, state_read", "ours.py:1: src/llama-kv-cache.cpp has no state_read"),
    ("src/llama-kv-cache.cpp, gone_name", "ours.py:1: src/llama-kv-cache.cpp has no gone_name"),
    ("src/llama-kv-cache.cpp, old_name", "ours.py:1: src/llama-kv-cache.cpp has no old_name"),
    ("ggml/CMakeLists.txt, NO_SUCH", "ours.py:1: ggml/CMakeLists.txt has no NO_SUCH"),
    ("src/llama-kv-cache.cpp, state_write, and load_arch_hparams",
     "ours.py:1: src/llama-kv-cache.cpp has no load_arch_hparams"),
    ("load_arch of src/models/gemma3n.cpp", "ours.py:1: src/models/gemma3n.cpp has no load_arch"),
])  # fmt: skip
def test_bad_citations(text, problem):
    assert wrong(text) == [problem]
