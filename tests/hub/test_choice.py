"""The file of a repository that llama-server would take by itself."""

import pytest

from llamafleet.hub.choice import best_file, best_projector

MANY = ["m-BF16.gguf", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("names", "quant", "found"),
    [
        (MANY, "", "m-Q4_K_M.gguf"),
        (MANY, "Q2_K", "m-Q2_K.gguf"),
        (MANY, "bf16", "m-BF16.gguf"),  # upper and lower case do not matter
        (MANY, "Q4_K", None),  # a whole part of the name: Q4_K_M is another one
        (MANY, "Q6_K", None),
        (["m-IQ2.gguf", "m-Q8_0.gguf"], "", "m-Q8_0.gguf"),
        (["m-IQ2.gguf", "m-IQ3.gguf"], "", "m-IQ2.gguf"),  # the first of the hub's list
        (["m.Q4_K_M.gguf"], "", "m.Q4_K_M.gguf"),
        (["UD-Q4_K_XL/m-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL/m-Q4_K_XL-00002-of-00002.gguf"], "Q4_K_XL",
         "UD-Q4_K_XL/m-Q4_K_XL-00001-of-00002.gguf"),
        # A folder's name counts too, as llama.cpp searches the whole path.
        (["Q4_K_M-imat/m-IQ1.gguf", "m-Q4_K_M.gguf"], "", "Q4_K_M-imat/m-IQ1.gguf"),
        (["a/m-00002-of-00002.gguf", "a/m-00001-of-00002.gguf"], "", "a/m-00001-of-00002.gguf"),
        (["mtp-m-Q4_K_M.gguf", "m-Q4_K_M.GGUF", "imatrix-m.gguf"], "", None),
        (["eagle3-m-Q8_0.gguf", "dflash-m-Q8_0.gguf", "dspark-m.gguf", "m-Q8_0.gguf"], "Q8_0", "m-Q8_0.gguf"),
        ([], "", None),
    ],
)  # fmt: skip
def test_it_is_chosen_as_llama_cpp_chooses(names, quant, found):
    assert best_file(names, quant) == found


@pytest.mark.parametrize(
    ("names", "model", "found"),
    [
        (["mmproj-BF16.gguf", "mmproj-Q8_0.gguf", "mmproj-F32.gguf"], "m-Q8_0.gguf", "mmproj-Q8_0.gguf"),
        (["mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"], "m-Q4_K_M.gguf", "mmproj-BF16.gguf"),
        (["mmproj-F16.gguf", "mmproj-BF16.gguf"], "m-Q4_K_M.gguf", "mmproj-F16.gguf"),  # equally near: the first
        (["mmproj-m.gguf", "mmproj-m-F16.gguf"], "m-Q4_K_M.gguf", "mmproj-m.gguf"),  # no number counts as 0
        (["mmproj-m-F16.gguf", "m-mmproj-Q2_K.gguf"], "m.gguf", "m-mmproj-Q2_K.gguf"),
        # The model's folder before one above, whatever the quantisation.
        (["mmproj-Q4_0.gguf", "Q4/mmproj-F32.gguf"], "Q4/m-Q4_0.gguf", "Q4/mmproj-F32.gguf"),
        (["other/mmproj-Q4_0.gguf"], "Q4/m-Q4_0.gguf", None),
        (["Q4/mmproj-Q4_0.gguf"], "m-Q4_0.gguf", None),
        (["mmproj-F16.gguf", "mmproj-Q8_0.gguf"], "m-Q8_0-00001-of-00002.gguf", "mmproj-Q8_0.gguf"),
        (["mmproj-F16.bin", "m-Q8_0.gguf"], "m-Q8_0.gguf", None),
        ([], "m.gguf", None),
    ],
)
def test_the_projector_is_chosen_as_llama_cpp_chooses(names, model, found):
    assert best_projector(names, model) == found
