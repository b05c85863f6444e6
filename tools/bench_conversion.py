"""Whole conversions timed beside cp, gguf's quantizer and llama-quantize, on one synthetic checkpoint.

    python tools/bench_conversion.py FOLDER SIZE [LAYOUT...]     default: mxfp4 q8_0 nvfp4 sherry

FOLDER holds the checkpoint (made if it is not there) and what is written, which is deleted again; it needs three times
SIZE. Every contestant is a process of its own, timed until its output is on the disk (sync), in turn, ROUNDS times;
peak resident memory is the system's account. gguf 0.19 quantizes one tensor at a time in NumPy on one thread, from the
same safetensors; llama-quantize reads a GGUF in bfloat16 that is made first. What is not installed is left out with a
reason; PACKFMT_LLAMA names another interpreter that has llama_cpp.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from make_checkpoint import bytes_of, make

ROUNDS = int(os.environ.get("ROUNDS", "3"))
MEMORY = "1GiB"
TYPES = {"mxfp4": 38, "q8_0": 7, "q4_0": 2, "nvfp4": 39, "tq2_0": 37}  # llama_ftype, llama.h
COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])"
GGUF = """
import sys, gguf, numpy as np
from safetensors import safe_open
from pathlib import Path
import ml_dtypes
source, target, kind = sys.argv[1:]
writer = gguf.GGUFWriter(target, "llama", use_temp_file=False)
kind = gguf.GGMLQuantizationType[kind.upper()]
opened = [safe_open(f, "np") for f in sorted(Path(source).glob("*.safetensors"))]
names = [(f, n) for f in opened for n in f.keys()]
def info(f, n):
    shape = f.get_slice(n).get_shape()
    packed = len(shape) == 2
    return shape, packed
for f, n in names:
    shape, packed = info(f, n)
    raw = gguf.quant_shape_to_byte_shape(shape, kind) if packed else shape
    nbytes = int(np.prod(raw)) * (1 if packed else 4)
    writer.add_tensor_info(n, raw, np.dtype(np.uint8 if packed else np.float32), nbytes, kind if packed else None)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_ti_data_to_file()
for f, n in names:
    weight = f.get_tensor(n).astype(np.float32)
    writer.write_tensor_data(gguf.quants.quantize(weight, kind) if weight.ndim == 2 else weight)
writer.close()
"""
TO_GGUF = """
import sys, json, gguf, numpy as np
from safetensors import safe_open
from pathlib import Path
import ml_dtypes
source, target = sys.argv[1:]
config = json.loads((Path(source) / "config.json").read_text())
hidden, layers = config["hidden_size"], config["num_hidden_layers"]
w = gguf.GGUFWriter(target, "llama")
w.add_block_count(layers); w.add_context_length(2048); w.add_embedding_length(hidden)
w.add_feed_forward_length(hidden * 7 // 2); w.add_head_count(hidden // 64); w.add_head_count_kv(hidden // 256)
w.add_layer_norm_rms_eps(1e-5); w.add_rope_dimension_count(64); w.add_file_type(32)
names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
         "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
opened = [safe_open(f, "np") for f in sorted(Path(source).glob("*.safetensors"))]
every = [(f, n) for f in opened for n in f.keys()]
def called(n):
    parts = n.split(".")
    last = names[parts[-2]]
    return f"blk.{parts[2]}.{last}.weight" if "layers" in parts else f"{last}.weight"
BF16 = gguf.GGMLQuantizationType.BF16
for f, n in every:
    shape = f.get_slice(n).get_shape()
    if len(shape) == 2:
        raw = (*shape[:-1], 2 * shape[-1])
        w.add_tensor_info(called(n), raw, np.dtype(np.uint8), int(np.prod(raw)), BF16)
    else:
        w.add_tensor_info(called(n), shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_ti_data_to_file()
for f, n in every:
    t = f.get_tensor(n)
    w.write_tensor_data(t.view(np.uint16).view(np.uint8) if t.ndim == 2 else t.astype(np.float32))
w.close()
"""
LLAMA = """
import ctypes, sys, llama_cpp
source, target, kind, threads = sys.argv[1:]
p = llama_cpp.llama_model_quantize_default_params()
p.nthread, p.ftype, p.pure, p.allow_requantize = int(threads), int(kind), True, True
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(p)))
"""


def timed(command: list[str], threads: int = 0) -> tuple[float, float, float, str]:
    """Seconds on the wall until synced, seconds of processors, peak resident MB, and what went wrong."""
    environment = os.environ | ({"PACKFMT_THREADS": str(threads)} if threads else {})
    begin = perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        said = process.stderr.read().decode(errors="replace") if process.stderr else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    spent = usage.ru_utime + usage.ru_stime
    wrong = said.strip().splitlines()[-1] if process.returncode and said.strip() else str(process.returncode or "")
    return perf_counter() - begin, spent, usage.ru_maxrss / 1e3, wrong


def main(folder: Path, size: str, layouts: list[str]) -> None:
    source, out = folder / f"model-{size}", folder / "out"
    if not source.exists():
        make(source, bytes_of(size))
    nbytes = sum(f.stat().st_size for f in source.iterdir())
    python, llama = sys.executable, os.environ.get("PACKFMT_LLAMA", sys.executable)
    cores = len(os.sched_getaffinity(0))
    dense = folder / f"model-{size}.gguf"
    with_llama = not subprocess.run([llama, "-c", "import llama_cpp"], capture_output=True, check=False).returncode
    if with_llama and not dense.exists():
        print("a GGUF for llama-quantize:", timed([python, "-c", TO_GGUF, str(source), str(dense)])[3] or "made")
    contestants: dict[str, tuple[list[str], int]] = {"cp": ([python, "-c", COPY, str(source), str(out)], 0)}
    for layout in layouts:
        convert = [python, "-m", "packfmt", "convert", str(source), str(out), "--to", layout, "--memory", MEMORY]
        for threads in sorted({1, cores}):
            contestants[f"packfmt {layout}, {threads}"] = (convert, threads)
        if layout in ("mxfp4", "q8_0", "q4_0", "tq2_0", "nvfp4"):
            target = str(out.with_suffix(".gguf"))
            contestants[f"gguf {layout}"] = ([python, "-c", GGUF, str(source), target, layout], 0)
        if with_llama and layout in TYPES:
            for threads in sorted({1, cores}):
                command = [llama, "-c", LLAMA, str(dense), str(out.with_suffix(".gguf")), str(TYPES[layout])]
                contestants[f"llama-quantize {layout}, {threads}"] = ([*command, str(threads)], 0)
    shutil.rmtree(out, ignore_errors=True)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(ROUNDS):
        for name, (command, threads) in list(contestants.items()):
            wall, spent, peak, wrong = timed(command, threads)
            shutil.rmtree(out, ignore_errors=True)
            out.with_suffix(".gguf").unlink(missing_ok=True)
            if wrong:
                print(f"{name}: left out: {wrong}")
                del contestants[name]
                continue
            found.setdefault(name, []).append((wall, spent, peak))
            print(f"{name}: {wall:.1f} s, {spent:.1f} s of processors, {peak:,.0f} MB", flush=True)
    print(f"\n{nbytes / 1e9:.2f} GB of bfloat16, {cores} processors, medians of {ROUNDS}")
    print("contestant                     s    of cp  processor s  peak MB")
    copied = statistics.median(w for w, _, _ in found["cp"])
    for name, runs in found.items():
        wall, spent, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:26} {wall:6.1f}  {wall / copied:6.2f}  {spent:11.1f}  {peak:7,.0f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or ["mxfp4", "q8_0", "nvfp4", "sherry"])
