"""Reference for an embedding: all-MiniLM-L6-v2 computed with numpy from its authors' weights.

Written after the paper (BERT, arXiv 1810.04805: post-norm encoder, exact GELU) and the model card (mean of the last
layer's states over all tokens, then length 1); it knows nothing of GGUF or llama.cpp.
"""

import math
import re
import unicodedata

import numpy as np

HEADS = 12
EPSILON = 1e-12
ERF = np.vectorize(math.erf, otypes=[np.float32])


def vector(text, tensors, vocabulary):
    """The sentence's vector of length 1. `vocabulary` is the list of vocab.txt."""
    states = encode(token_ids(text, vocabulary), tensors)
    mean = states.mean(axis=0)
    return mean / np.linalg.norm(mean)


def token_ids(text, vocabulary):
    """[CLS], the longest pieces of each word, [SEP]. Words end at spaces; punctuation marks are words."""
    ids = {token: number for number, token in enumerate(vocabulary)}
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    found = [ids["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", plain):
        found += pieces(word, ids)
    return [*found, ids["[SEP]"]]


def pieces(word, ids):
    found, rest, mark = [], word, ""
    while rest:
        length = next((n for n in range(len(rest), 0, -1) if mark + rest[:n] in ids), 0)
        if not length:
            return [ids["[UNK]"]]
        found.append(ids[mark + rest[:length]])
        rest, mark = rest[length:], "##"
    return found


def encode(tokens, tensors):
    """States of the last layer, one row for each token."""

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPSILON)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def attention(name, x):
        query, key, value = (heads(linear(f"{name}.self.{part}", x)) for part in ("query", "key", "value"))
        scores = np.exp(query @ key.swapaxes(1, 2) / math.sqrt(query.shape[2]))
        mixed = scores / scores.sum(axis=2, keepdims=True) @ value
        return linear(f"{name}.output.dense", mixed.swapaxes(0, 1).reshape(x.shape))

    x = tensors["embeddings.word_embeddings.weight"][tokens]
    x = x + tensors["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm("embeddings.LayerNorm", x + tensors["embeddings.token_type_embeddings.weight"][0])
    for layer in range(1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder."))):
        name = f"encoder.layer.{layer}"
        x = norm(f"{name}.attention.output.LayerNorm", x + attention(f"{name}.attention", x))
        inner = linear(f"{name}.intermediate.dense", x)
        inner = inner * 0.5 * (1 + ERF(inner / math.sqrt(2)))
        x = norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", inner))
    return x


def heads(x):
    """(tokens, width) as (heads, tokens, width of a head)."""
    return x.reshape(len(x), HEADS, -1).swapaxes(0, 1)
