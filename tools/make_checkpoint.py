"""Make a synthetic checkpoint of any size: names, shapes and shards of a decoder as Hugging Face has them, bfloat16.

    python tools/make_checkpoint.py FOLDER [SIZE]        SIZE in bytes: 500MB, 20GB; default 1GB

Layers are of one shape and as many as fill the size. Weights are normal numbers, each matrix with a spread and now and
then a row or column of its own; every byte is written. The same size gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

SHARD = 5_000_000_000
POOL = 1 << 23  # normal numbers that matrices are cut from
NAMES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
Shape = tuple[int, ...]


def bytes_of(text: str) -> int:
    number = text.upper().removesuffix("B")
    return int(float(number[:-1]) * NAMES[number[-1]]) if number[-1] in NAMES else int(number)


def tensors(size: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of about so many bytes of bfloat16."""
    hidden = next(h for h in (4096, 2048, 1024, 512, 256) if 40 * h * h * 2 <= size or h == 256)
    vocabulary, wide, kv = max(256, min(32_768, size // (hidden * 40))) // 256 * 256, hidden * 7 // 2, hidden // 4
    layer: list[tuple[str, Shape]] = [
        ("input_layernorm.weight", (hidden,)),
        ("mlp.down_proj.weight", (hidden, wide)),
        ("mlp.gate_proj.weight", (wide, hidden)),
        ("mlp.up_proj.weight", (wide, hidden)),
        ("post_attention_layernorm.weight", (hidden,)),
        ("self_attn.k_proj.weight", (kv, hidden)),
        ("self_attn.o_proj.weight", (hidden, hidden)),
        ("self_attn.q_proj.weight", (hidden, hidden)),
        ("self_attn.v_proj.weight", (kv, hidden)),
    ]
    each = 2 * sum(int(np.prod(shape)) for _, shape in layer)
    count = max(1, round((size - 4 * vocabulary * hidden) / each))
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for n in range(count):
        yield from ((f"model.layers.{n}.{name}", shape) for name, shape in layer)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def weight(pool: np.ndarray, shape: Shape, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A tensor's numbers as bfloat16, some rows at a time."""
    if len(shape) == 1:
        yield (1 + 0.1 * pool[: shape[0]]).astype(ml_dtypes.bfloat16)
        return
    rows, cols = shape
    spread = np.float32(0.02 * rng.uniform(0.5, 2))
    columns = np.where(rng.random(cols) < 0.002, np.float32(8), np.float32(1)) * spread
    at_once = max(1, POOL // 2 // cols)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        begin = int(rng.integers(0, POOL - count * cols + 1))
        block = pool[begin : begin + count * cols].reshape(count, cols)
        yield (block * columns * rng.uniform(0.7, 1.4, (count, 1)).astype(np.float32)).astype(ml_dtypes.bfloat16)


def make(folder: Path, size: int, shard: int = SHARD) -> None:
    """Write the folder, which must not exist."""
    folder.mkdir(parents=True)
    every = list(tensors(size))
    files: list[list[tuple[str, Shape]]] = [[]]
    room = shard
    for name, shape in every:
        nbytes = 2 * int(np.prod(shape))
        if nbytes > room and files[-1]:
            files.append([])
            room = shard
        room -= nbytes
        files[-1].append((name, shape))
    pool, rng = np.random.default_rng(0).standard_normal(POOL, np.float32), np.random.default_rng(1)
    places = {}
    for i, mine in enumerate(files):
        called = f"model-{i + 1:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        header, at = {}, 0
        for name, shape in mine:
            nbytes = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
            places[name], at = called, at + nbytes
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        with (folder / called).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, shape in mine:
                for rows in weight(pool, shape, rng):
                    file.write(rows.view(np.uint16).data)
    if len(files) > 1:
        total = sum(2 * int(np.prod(shape)) for _, shape in every)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    hidden = dict(every)["model.norm.weight"][0]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
              "num_hidden_layers": sum("q_proj" in name for name, _ in every), "torch_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]}: exists; choose another folder")
    make(Path(sys.argv[1]), bytes_of(sys.argv[2] if len(sys.argv) > 2 else "1GB"))
