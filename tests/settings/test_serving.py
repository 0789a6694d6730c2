"""Settings of what a server serves that exclude each other."""

import pytest

from llamafleet.cli.arguments import default_data
from llamafleet.settings.schema import Settings, SettingsError

EXAMPLE = {"query": "q", "relevant": "a", "irrelevant": "b"}


def of(**model):
    entry = {"name": "one", "source": "/m.gguf", "port": 9000, **model}
    return Settings.from_data({**default_data(), "models": [entry]}).models[0]


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        ({"serves": "embeddings"}, "serves", "embedding"),
        ({"pooling": "mean"}, "pooling", 'serves is "chat"'),
        ({"serves": "embedding", "pooling": "rank"}, "pooling", 'set serves to "reranking"'),
        ({"serves": "reranking", "pooling": "mean"}, "pooling", "leave it out"),
        ({"serves": "embedding", "pooling": "max"}, "pooling", "mean"),
        ({"rerank_example": EXAMPLE}, "rerank_example", 'set serves to "reranking"'),
        ({"serves": "embedding", "rerank_example": EXAMPLE}, "rerank_example", "'embedding'"),
        ({"serves": "reranking", "rerank_example": {**EXAMPLE, "irrelevant": "a"}}, "rerank_example", "two texts"),
        ({"serves": "reranking", "rerank_example": {"query": "q"}}, "rerank_example", "relevant"),
        ({"serves": "embedding", "speculation": "ngram"}, "speculation", "writes no tokens"),
        ({"serves": "reranking", "projector": "hf:a/b/mmproj.gguf"}, "projector", "leave it out"),
        ({"serves": "embedding", "extra_flags": ["--pooling mean"]}, "extra_flags", "the setting pooling"),
        ({"extra_flags": ["--embedding"]}, "extra_flags", "the setting serves"),
    ],
)
def test_what_does_not_go_together_is_named(model, key, words):
    with pytest.raises(SettingsError) as refused:
        of(**model)
    assert f"models[0].{key}" in str(refused.value) and words in str(refused.value)


@pytest.mark.parametrize(
    "model",
    [
        {"serves": "embedding"},
        {"serves": "embedding", "pooling": "none"},
        {"serves": "reranking", "pooling": "rank", "rerank_example": EXAMPLE},
        {"serves": "embedding", "adapters": ["hf:a/b/lora.gguf"]},
    ],
)
def test_what_goes_together_is_taken(model):
    assert of(**model).serves == model["serves"]
