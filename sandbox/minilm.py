"""all-MiniLM-L6-v2 as GGUF, written from its authors' weights as llama.cpp's converter does (conversion/bert.py,
BertModel), without PyTorch.

Matrices become F16; what the converter keeps in F32 (vectors, positions, token types) stays. Numbers of the model are
those of its config.json, which the shapes of the tensors do not tell.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, PoolingType, TokenType, get_tensor_name_map

from sandbox import real_models
from sandbox.upstream import locked

NAME = "all-MiniLM-L6-v2-F16.gguf"
HEADS = 12
LAYER_NORM_EPSILON = 1e-12
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LEFT_OUT = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")  # sentence vectors need none of them
KEPT_F32 = ("position_embd.weight", "token_types.weight")

Array = np.ndarray[Any, Any]


def gguf(folder: Path = real_models.FOLDER) -> Path:
    """The model as GGUF, downloaded and written once. Raises RealModelError."""
    weights, vocabulary = real_models.fetch(real_models.MINILM, folder).values()
    path = folder / NAME
    with locked(folder / f"{NAME}.lock"):
        if not path.exists():
            partial = path.with_suffix(".partial")
            write(partial, read_safetensors(weights), vocabulary.read_text(encoding="utf-8").splitlines())
            os.replace(partial, path)
    return path


def read_safetensors(path: Path) -> dict[str, Array]:
    """The F32 tensors of a safetensors file by name; those of other types are left out."""
    with path.open("rb") as stream:
        [length] = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        data = stream.read()
    return {
        name: np.frombuffer(data[slice(*about["data_offsets"])], "<f4").reshape(about["shape"])
        for name, about in header.items()
        if name != "__metadata__" and about["dtype"] == "F32"
    }


def write(path: Path, tensors: Mapping[str, Array], vocabulary: list[str]) -> None:
    """Write a BERT encoder with mean pooling; `tensors` have the names of the transformers library."""
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    writer = GGUFWriter(path, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_block_count(layers)
    writer.add_context_length(len(tensors["embeddings.position_embeddings.weight"]))
    writer.add_embedding_length(tensors["embeddings.word_embeddings.weight"].shape[1])
    writer.add_feed_forward_length(len(tensors["encoder.layer.0.intermediate.dense.bias"]))
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)
    _add_tokenizer(writer, vocabulary, len(tensors["embeddings.token_type_embeddings.weight"]))
    names = get_tensor_name_map(MODEL_ARCH.BERT, layers)
    for name, values in tensors.items():
        if name in LEFT_OUT:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ValueError(f"{name} is no tensor of a BERT encoder")
        half = values.ndim > 1 and new not in KEPT_F32
        writer.add_tensor(new, values.astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter, vocabulary: list[str], token_types: int) -> None:
    """A WordPiece vocabulary as llama.cpp looks words up: the first piece of a word begins with U+2581, further pieces
    lose their ##."""
    writer.add_token_type_count(token_types)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("bert-bge")
    writer.add_token_list([_piece(token) for token in vocabulary])
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in vocabulary])
    pad, unknown, cls, separator, mask = map(vocabulary.index, SPECIAL)
    writer.add_bos_token_id(cls)
    writer.add_unk_token_id(unknown)
    writer.add_sep_token_id(separator)
    writer.add_pad_token_id(pad)
    writer.add_mask_token_id(mask)


def _piece(token: str) -> str:
    if token in SPECIAL:
        return token
    return token[2:] if token.startswith("##") else f"\u2581{token}"
