"""Importers: files in the layouts that the tools write, whole and damaged."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwise import cli
from simcore.errors import InputError
from validation import importers
from validation.datasets import LAYOUTS, kernel_samples
from validation.importers import nccl, trace

# ---------------------------------------------------------------- what the tools write

RANKS = "".join(
    f"#  Rank {rank:2d} Group  0 Pid {1887 + rank:6d} on   worker-{rank // 2} device {rank % 2:2d} "
    f"[0000:8d:00] NVIDIA H100 80GB HBM3\n"
    for rank in range(4)
)
HEADER = """\
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""  # noqa: E501
NEW_LOG = f"""\
# nccl-tests version 2.17.6 nccl-headers=22809 nccl-library=22809
# Collective test starting: all_reduce_perf
# nThread 1 nGpus 1 minBytes 0 maxBytes 8589934592 step: 2(factor) warmup iters: 1 iters: 20 agg iters: 1 validation: 1 graph: 0
#
# Using devices
{RANKS}{HEADER}\
           0             0     float     sum      -1     5.70    0.00    0.00      0     5.54    0.00    0.00      0
   536870912     134217728     float     sum      -1   1806.7  297.16  586.06      0   1835.9  292.43  576.74      0
  4294967296    1073741824  bfloat16     sum      -1    10094  425.49  839.16      0    10141  423.54  835.32    N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 745.53
#
"""  # noqa: E501
OLD_LOG = """\
$ mpirun -np 8 ./build/all_gather_perf -b 64K -e 128M -f 2 -g 1
# nThread 1 nGpus 2 minBytes 65536 maxBytes 134217728 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
#
# Using devices
#   Rank  0 Pid   1320 on ip-172-31-20-228 device  0 [0x00] Tesla V100-SXM2-32GB
#   Rank  1 Pid   1320 on ip-172-31-20-228 device  1 [0x00] Tesla V100-SXM2-32GB
NCCL version 2.6.4+cuda10.1
#
#                                               out-of-place                       in-place
#       size         count    type     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)             (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
       65536          8192   float    16.57    3.96    1.98  0e+00    13.83    4.74    2.37  0e+00
   134217728      16777216   float   3298.6   40.69   20.34  0e+00   3070.3   43.71   21.86  0e+00
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 6.6972
"""  # noqa: E501
NCCL_JSON = {
    "version": 2,
    "start_time": "2026-01-07 10:00:00",
    "args": ["./build/alltoall_perf", "-g", "2", "-J", "out.json"],
    "env": ["HOME=/root"],
    "nccl_version": 22809,
    "config": {
        "nthreads": 1,
        "ngpus": 2,
        "devices": [
            {"rank": 0, "group": 0, "pid": 9, "hostname": "a", "device": 0, "device_info": "H200"}
        ],
    },
    "results": [
        {
            "size": 1048576,
            "count": 131072,
            "type": "float",
            "redop": "none",
            "root": "    -1",
            "out_of_place": {"time": 20.5, "alg_bw": 51.1, "bus_bw": 25.6, "nwrong": 0.0},
            "out_of_place_per_iter": {"min_us": 20.0, "times_us": [20.0, 21.0, 20.5]},
            "in_place": {"time": 21.5, "alg_bw": 48.8, "bus_bw": 24.4, "nwrong": None},
            "actual_iterations": 20,
            "experiment_name": "default",
        }
    ],
    "out_of_bounds": {"count": 0, "okay": "true"},
}
VLLM = {
    "date": "20260107-101500",
    "endpoint_type": "openai",
    "backend": "openai",
    "label": None,
    "model_id": "meta-llama/Llama-3.1-8B-Instruct",
    "tokenizer_id": "meta-llama/Llama-3.1-8B-Instruct",
    "num_prompts": 200,
    "tensor_parallel_size": "2",
    "gpu": "NVIDIA H100 80GB HBM3",
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 32,
    "duration": 5.78,
    "completed": 200,
    "failed": 0,
    "total_input_tokens": 42659,
    "total_output_tokens": 43516,
    "request_throughput": 34.6,
    "request_goodput": None,
    "output_throughput": 7528.7,
    "total_token_throughput": 14909.1,
    "input_lens": [200, 210],
    "output_lens": [2, 3],
    "ttfts": [0.021, 0.0],
    "itls": [[0.011], [0.012, 0.013]],
    "generated_texts": ["a", "b"],
    "errors": ["", ""],
    "mean_ttft_ms": 26.9,
    "median_ttft_ms": 24.9,
    "std_ttft_ms": 12.0,
    "p99_ttft_ms": 69.5,
    "mean_tpot_ms": 0.0,
    "median_itl_ms": 8.1,
    "p99.9_itl_ms": 30.0,
    "median_e2el_ms": 1700.0,
}
SGLANG = {
    "backend": "sglang",
    "dataset_name": "random",
    "request_rate": 4.0,
    "max_concurrency": None,
    "random_input_len": 1024,
    "random_output_len": 128,
    "random_range_ratio": 1.0,
    "duration": 60.5,
    "completed": 240,
    "total_input_tokens": 245760,
    "total_output_tokens": 30720,
    "total_output_tokens_retokenized": 30715,
    "request_throughput": 3.97,
    "input_throughput": 4062.1,
    "output_throughput": 507.8,
    "mean_e2e_latency_ms": 2400.0,
    "median_ttft_ms": 95.0,
    "median_tpot_ms": 18.0,
    "median_itl_ms": 17.5,
    "concurrency": 9.5,
    "accept_length": None,
}
LATENCY = {
    "avg_latency": 1.5,
    "std_latency": 0.1,
    "latencies": [1.4, 1.6],
    "percentiles": {"10": 1.42, "99": 1.6},
}
THROUGHPUT = {
    "elapsed_time": 12.5,
    "num_requests": 1000,
    "total_num_tokens": 413000,
    "requests_per_second": 80.0,
    "tokens_per_second": 33040.0,
}


def operator(
    number: int, name: str, dims: list[Any], kind: str = "c10::BFloat16"
) -> dict[str, Any]:
    details = {"External id": number, "Input Dims": dims, "Input type": [kind] * len(dims)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": 1, "dur": 20, "args": details}


def launched(number: int, name: str, time_us: float) -> dict[str, Any]:
    details = {"External id": number, "device": 0, "stream": 7, "correlation": number}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": 9, "dur": time_us, "args": details}


TRACE = {
    "schemaVersion": 1,
    "deviceProperties": [{"id": 0, "name": "NVIDIA A100-SXM4-80GB", "numSms": 108}],
    "record_shapes": 1,
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": 'python "x" ]}'}},
        operator(5, "aten::mm", [[64, 4096], [4096, 1024]]),
        operator(6, "aten::addmm", [[1024], [64, 4096], [4096, 1024]], "c10::Half"),
        launched(5, "nvjet_tst_64x8", 10.5),
        launched(5, "splitKreduce_kernel", 2.0),
        launched(6, "nvjet_tst_64x8", 11.0),
        launched(99, "elementwise_kernel", 3.25),
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 3, "dur": 4, "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 3, "dur": 5},
    ],
    "traceName": "trace.json",
}
KIT = {
    "format": "meshwise-kit",
    "version": 1,
    "machine": {"kind": "cuda", "device": "NVIDIA H200", "torch": "2.11.0"},
    "started": "2026-01-07T10:00:00Z",
    "seconds": 71.0,
    "complete": True,
    "measurements": [
        {
            "family": "matmul",
            "shape": {"m": m, "n": 4096, "k": 4096},
            "dtype": "bf16",
            "implementation": "torch",
            "timing": "cold",
            "samples_s": [1e-5 * m, 3e-5 * m, 2e-5 * m],
        }
        for m in (1, 2)
    ],
    "skipped": [],
}
GEMM = """\
hardware,framework,kernel_source,gemm_dtype,m,n,k,latency,unit,source
a100_sxm,trtllm 1.0.0,torch_flow,bfloat16,8192,65536,4096,16.7006,ms,repo@1:gemm.parquet
"""
EXAMPLES: dict[str, str] = {
    "kit": json.dumps(KIT),
    "torch-trace": json.dumps(TRACE),
    "nccl-tests-json": json.dumps(NCCL_JSON),
    "serving": json.dumps(VLLM) + "\n" + json.dumps({**VLLM, "duration": 6.0}),
    "vllm-latency": json.dumps(LATENCY, indent=4),
    "vllm-throughput": json.dumps(THROUGHPUT, indent=4),
    "nccl-tests": NEW_LOG,
    "csv": GEMM,
}
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes a file, whose name says nothing, and returns its path."""

    def written(text: str, name: str = "file") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


# ---------------------------------------------------------------- every format


@pytest.mark.parametrize("name", importers.IMPORTERS)
def test_a_format_is_told_by_its_content(name: str, write: Write) -> None:
    path = write(EXAMPLES[name])
    assert importers.detect(path) == name
    found = importers.read(path)
    assert found == importers.read(path, name)
    for each in found:
        assert each.source
        assert all(0 < sample < math.inf for sample in each.samples_s)
        json.dumps(each.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", importers.IMPORTERS)
def test_gzipped_files_read_the_same(name: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / "a" / "file", tmp_path / "b" / "file"
    plain.parent.mkdir()
    packed.parent.mkdir()
    plain.write_text(EXAMPLES[name])
    packed.write_bytes(gzip.compress(EXAMPLES[name].encode()))
    assert importers.read(packed) == importers.read(plain)
    packed.write_bytes(gzip.compress(EXAMPLES[name].encode())[:-9])
    with pytest.raises(InputError, match="file: "):
        importers.read(packed)


@pytest.mark.parametrize("name", importers.IMPORTERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_one_sentence(name: str, tmp_path: Path, data: st.DataObject) -> None:
    text = EXAMPLES[name]
    at = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(at, min(len(text), at + 12)))
    put = data.draw(
        st.sampled_from(["", "x", "-1", "null", "[]", "{}", '"', ",", "nan", "\n", "0"])
    )
    path = tmp_path / "file"
    path.write_text(text[:at] + put + text[end:])
    for format in (None, name):
        said = complaint(path, format)
        assert said is None or ("file" in said and "\n" not in said)


def complaint(path: Path, format: str | None) -> str | None:
    """Return what an importer says of a file that it cannot read, None where it can."""
    try:
        importers.read(path, format)
    except InputError as error:
        return str(error)
    return None


def test_unknown_files_and_formats_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file: none of the known formats"):
        importers.read(write("Dear reader,\n"))
    with pytest.raises(InputError, match=r"unknown format 'nccl-test': did you mean 'nccl-tests'"):
        importers.read(write(NEW_LOG), "nccl-test")
    with pytest.raises(InputError, match="cannot be read"):
        importers.read(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be read"):
        importers.read(tmp_path)


# ---------------------------------------------------------------- nccl-tests


def test_a_log_gives_both_places_and_the_ranks(write: Write) -> None:
    found = importers.read(write(NEW_LOG))
    assert [each.samples_s[0] for each in found] == pytest.approx(
        [1806.7e-6, 1835.9e-6, 10094e-6, 10141e-6]
    )
    assert found[0].shape == {
        "op": "all_reduce",
        "bytes": 536870912.0,
        "ranks": 4,
        "nodes": 2,
        "in_place": 0,
        "dtype": "fp32",
        "implementation": "nccl",
    }
    assert [each.shape["in_place"] for each in found] == [0, 1, 0, 1]
    assert found[3].shape["dtype"] == "bf16"
    assert found[0].fingerprint == {
        "device": "NVIDIA H100 80GB HBM3",
        "chip": "h100-sxm-80gb",
        "library": "22809",
    }


def test_old_logs_have_fewer_columns(write: Write) -> None:
    found = importers.read(write(OLD_LOG))
    assert {each.shape["op"] for each in found} == {"all_gather"}
    assert {each.shape["ranks"] for each in found} == {2}
    assert {each.fingerprint["library"] for each in found} == {"2.6.4"}
    algorithm = [3.96, 4.74, 40.69, 43.71]  # GB/s, the log's own
    rates = [each.shape["bytes"] / each.median_s / 1e9 for each in found]
    assert rates == pytest.approx(algorithm, rel=2e-3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("     sum      -1", "                "),  # tests without a reduction, before 2.13
        ("    (us)", "    (us)"),
        ("#", "[1,0]<stdout>:#"),
        ("\n", "\r\n"),
    ],
)
def test_variants_of_a_log_read_the_same(old: str, new: str, write: Write) -> None:
    wanted = importers.read(write(NEW_LOG))
    text = NEW_LOG.replace(old, new)
    if new.startswith("["):
        text = "".join(f"[1,0]<stdout>:{line}\n" for line in NEW_LOG.splitlines())
    assert importers.read(write(text)) == wanted


def test_times_may_be_milliseconds_and_lines_end_in_time_stamps(write: Write) -> None:
    text = NEW_LOG.replace("(us)", "(ms)")
    first = importers.read(write(text))[0]
    assert first.median_s == pytest.approx(1.8067)
    lines = []
    for line in NEW_LOG.splitlines():
        ends = {"t": "  timestamp", "0": "  2026-01-07 10:00:00", "A": "  2026-01-07 10:00:00"}
        if " size " in line:
            lines.append(line + "           timestamp")
        elif line.lstrip()[:1].isdigit():
            lines.append(line + ends["0"])
        else:
            lines.append(line)
    assert importers.read(write("\n".join(lines))) == importers.read(write(NEW_LOG))


def test_rows_may_be_in_place_alone(write: Write) -> None:
    text = NEW_LOG.replace("   1806.7  297.16  586.06      0", " " * 32)
    found = importers.read(write(text))
    assert [each.shape["in_place"] for each in found] == [1, 0, 1]


def test_several_tests_in_one_log_keep_apart(write: Write) -> None:
    found = importers.read(write(NEW_LOG + OLD_LOG))
    assert Counter((each.shape["op"], each.shape["ranks"]) for each in found) == {
        ("all_reduce", 4): 4,
        ("all_gather", 2): 4,
    }


@given(st.integers(1, 2**40), st.floats(0.01, 1e7), st.floats(0.01, 1e7))
def test_a_printed_row_is_read_back(size: int, out_us: float, in_us: float) -> None:
    def printed(value: float) -> str:  # 7 characters wide, as many decimals as fit
        digits = len(str(int(value)))
        return f"{value:7.2f}" if digits < 5 else f"{value:7.1f}" if digits < 6 else f"{value:7.0f}"

    log = nccl._Log("log", "broadcast")
    for line in HEADER.splitlines()[2:]:
        nccl._read_header(log, line)
    row = f"{size:12d}  {size // 4:12d}  {'float':>8}  {'none':>6}  {0:6d}"
    for value in (out_us, in_us):
        row += f"  {printed(value)}  {1:6.2f}  {1:6.2f}  {0:6g}"
    found = list(nccl._read_row(log, row, "row"))
    times = [each.median_s * 1e6 for each in found]
    assert times == pytest.approx([out_us, in_us], rel=1e-4, abs=0.00501)
    assert [each.shape["bytes"] for each in found] == [size, size]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("   1806.7", "   fast  ", "line 15: time = 'fast' is not a number"),
        ("1806.7  297.16  586.06      0   1835.9", "1806.7", "line 15: 9 values do not fit"),
        ("(us)", "", "line 14: no line of units"),
        ("all_reduce_perf", "a test", "which test it is"),
    ],
)
def test_a_damaged_log_names_the_line(old: str, new: str, words: str, write: Write) -> None:
    with pytest.raises(InputError, match=words):
        importers.read(write(NEW_LOG.replace(old, new)), "nccl-tests")


def test_the_json_report_has_times_of_single_iterations(write: Write) -> None:
    first, second = importers.read(write(json.dumps(NCCL_JSON)))
    assert first.samples_s == pytest.approx((20e-6, 21e-6, 20.5e-6))
    assert second.samples_s == pytest.approx((21.5e-6,))
    assert first.shape["op"] == "all_to_all"
    assert first.shape["ranks"] == 2
    assert first.fingerprint["chip"] == "h200-sxm-141gb"


# ---------------------------------------------------------------- serving


def by_statistic(found: list[Any]) -> dict[tuple[str, str], tuple[float, ...]]:
    return {(each.subject, each.shape.get("statistic", "")): each.samples_s for each in found}


def test_vllm_serve(write: Write) -> None:
    found = importers.read(write(json.dumps(VLLM)))
    assert by_statistic(found) == {
        ("serving.run", ""): (5.78,),
        ("serving.ttft", "mean"): (pytest.approx(0.0269),),
        ("serving.ttft", "median"): (pytest.approx(0.0249),),
        ("serving.ttft", "p99"): (pytest.approx(0.0695),),
        ("serving.itl", "median"): (pytest.approx(0.0081),),
        ("serving.itl", "p99.9"): (pytest.approx(0.030),),
        ("serving.e2e", "median"): (pytest.approx(1.7),),
        ("serving.ttft", "each"): (0.021,),
        ("serving.itl", "each"): (0.011, 0.012, 0.013),
    }
    run = found[0].shape
    assert run["model"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert (run["concurrency"], run["tp"], run["requests"]) == (32.0, 2.0, 200.0)
    assert "rate_per_s" not in run
    assert run["output_tokens"] / found[0].median_s == pytest.approx(7528.7, rel=1e-3)
    assert found[0].fingerprint["chip"] == "h100-sxm-80gb"


def test_sglang_appends_one_run_a_line(write: Write) -> None:
    lines = [json.dumps({**SGLANG, "request_rate": rate}) for rate in (1.0, 2.0, 4.0)]
    found = importers.read(write("\n".join(lines) + "\n"))
    assert [e.shape["rate_per_s"] for e in found if e.subject == "serving.run"] == [1.0, 2.0, 4.0]
    assert found[0].shape["engine"] == "sglang"
    assert "concurrency" not in found[0].shape
    assert by_statistic(found)["serving.e2e", "mean"] == (pytest.approx(2.4),)
    with pytest.raises(InputError, match=r"file, line 3: not JSON"):
        importers.read(write("\n".join(lines)[:-5]))
    broken = json.dumps({**SGLANG, "median_itl_ms": "soon"})
    with pytest.raises(InputError, match=r"file, line 2: median_itl_ms = 'soon' is not a number"):
        importers.read(write(f"{lines[0]}\n{broken}\n"))


def test_vllm_latency_and_throughput(write: Write) -> None:
    (latency,) = importers.read(write(json.dumps(LATENCY)))
    assert (latency.subject, latency.samples_s) == ("generate.run", (1.4, 1.6))
    (run,) = importers.read(write(json.dumps(THROUGHPUT, indent=4)))
    assert run.shape["tokens"] / run.median_s == pytest.approx(THROUGHPUT["tokens_per_second"])


# ---------------------------------------------------------------- torch profiler


def test_kernels_of_a_trace_are_grouped_by_name_and_shape(write: Write) -> None:
    found = importers.read(write(json.dumps(TRACE)))
    kernels = [each for each in found if each.subject == "kernel"]
    assert [each.shape["kernel"] for each in kernels] == [
        "nvjet_tst_64x8", "nvjet_tst_64x8", "Memcpy HtoD", "elementwise_kernel",
        "splitKreduce_kernel",
    ]  # fmt: skip
    assert kernels[0].shape["op"] == "aten::addmm"
    assert sum(each.shape["share"] for each in kernels) == pytest.approx(1)
    assert sum(sum(each.samples_s) for each in kernels) == pytest.approx(30.75e-6)
    assert kernels[0].fingerprint["cuda_s"] == pytest.approx(30.75e-6)
    assert kernels[0].fingerprint["chip"] == "a100-sxm-80gb"


def test_products_of_a_trace_count_all_their_kernels(write: Write) -> None:
    samples = importers.samples(importers.read(write(json.dumps(TRACE))))
    assert [(each.family, each.chip, each.implementation, each.dtype) for each in samples] == [
        ("matmul", "a100-sxm-80gb", "torch", "bf16"),
        ("matmul", "a100-sxm-80gb", "torch", "fp16"),
    ]
    assert [dict(each.shape) for each in samples] == [{"m": [64], "n": [1024], "k": [4096]}] * 2
    assert [each.seconds[0] for each in samples] == pytest.approx([12.5e-6, 11e-6])


@pytest.mark.parametrize("characters", [1, 7, 64])
@pytest.mark.parametrize("bare", [False, True])
def test_a_trace_is_read_in_pieces_of_any_size(
    characters: int, bare: bool, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(json.dumps(TRACE["traceEvents"] if bare else TRACE, indent=1))
    whole = importers.read(path, "torch-trace")
    monkeypatch.setattr(trace, "CHUNK_CHARACTERS", characters)
    assert importers.read(path, "torch-trace") == whole


def test_a_trace_that_breaks_off_names_the_event(write: Write) -> None:
    text = json.dumps(TRACE)
    with pytest.raises(InputError, match=r"file, event 4: the trace ends or breaks off"):
        importers.read(write(text[: text.index("nvjet")]))
    no_kernels = {**TRACE, "traceEvents": TRACE["traceEvents"][:3]}  # type: ignore[index]
    with pytest.raises(InputError, match=r"without GPU kernels .*ProfilerActivity.CUDA"):
        importers.read(write(json.dumps(no_kernels)))


# ---------------------------------------------------------------- kit and CSV tables


def test_a_record_of_the_kit(write: Write) -> None:
    found = importers.read(write(EXAMPLES["kit"]))
    (sample,) = importers.samples(found)
    key = (sample.family, sample.chip, sample.implementation, sample.dtype)
    assert key == ("matmul", "h200-sxm-141gb", "torch", "bf16")
    assert sample.seconds == pytest.approx([2e-5, 4e-5])
    row = {**KIT["measurements"][1], "samples_s": [1.0, -1.0]}  # type: ignore[index]
    broken = {**KIT, "measurements": [KIT["measurements"][0], row]}  # type: ignore[index]
    with pytest.raises(InputError, match=r"file, measurement 2: samples_s = -1.0 must be"):
        importers.read(write(json.dumps(broken)))
    with pytest.raises(InputError, match="version 2 of meshwise-kit, 1 is expected"):
        importers.read(write(json.dumps({**KIT, "version": 2})))


def test_samples_need_the_columns_of_their_family(write: Write) -> None:
    row = {**KIT["measurements"][0], "shape": {"m": 1, "n": 2}}  # type: ignore[index]
    found = importers.read(write(json.dumps({**KIT, "measurements": [row]})))
    with pytest.raises(InputError, match="a matmul measurement has k = None"):
        importers.samples(found)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("16.7006", "0", "row 2: latency = '0' must be a number above 0"),
        ("16.7006", "soon", "row 2: latency = 'soon' is not a number"),
        (",8192,", ",many,", "row 2: .*'many'"),
        (",ms,repo@1:gemm.parquet", "", "row 2: a row of 10 columns"),
        ("gemm_dtype", "dtype", "none of the known formats"),
    ],
)
def test_a_damaged_table_names_the_row(old: str, new: str, words: str, write: Write) -> None:
    with pytest.raises(InputError, match=words):
        importers.read(write(GEMM.replace(old, new)))


@pytest.mark.parametrize("family", LAYOUTS)
def test_kernel_tables_give_the_samples_that_the_fits_read(family: str, data_dir: Path) -> None:
    files = sorted((data_dir / "kernels").glob(LAYOUTS[family].files))
    found = [each for path in files for each in importers.read(path)]
    mine = {importers_key(each): each for each in importers.samples(found) if each.family == family}
    theirs = {importers_key(each): each for each in kernel_samples(data_dir, family)}
    assert mine.keys() == theirs.keys()
    for key, sample in theirs.items():
        assert np.array_equal(np.sort(mine[key].seconds), np.sort(sample.seconds))
        for name, column in mine[key].shape.items():
            assert np.array_equal(np.sort(column), np.sort(sample.shape[name]))


def importers_key(sample: Any) -> tuple[str, str, str]:
    return sample.chip, sample.implementation, sample.dtype


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("collectives/nccl.csv", {"collective": 4212}),
        ("collectives/custom_allreduce.csv", {"collective": 2829}),
        ("collectives/moe_all_to_all.csv", {"expert_exchange": 2360}),
        ("serving/trtllm_throughput.csv", {"serving.output_token_interval": 74}),
        ("serving/ttft_tpot_by_concurrency.csv", {"serving.ttft": 606, "serving.tpot": 606}),
        ("training/fsdp_a100.csv", {"training.token_per_gpu": 128}),
        ("training/megatron_a100_single_node.csv", {"training.step": 1440}),
        ("training/nanotron_h100_3.6b.csv", {"training.token_per_gpu": 437}),
    ],
)
def test_published_tables_read_whole(file: str, counts: dict[str, int], data_dir: Path) -> None:
    found = importers.read(data_dir / file)
    assert Counter(each.subject for each in found) == counts
    assert all(each.fingerprint["chip"] != each.fingerprint["device"] for each in found)


def test_rates_become_seconds(data_dir: Path) -> None:
    found = importers.read(data_dir / "serving/trtllm_throughput.csv")
    h200 = [e for e in found if e.fingerprint["chip"] == "h200-sxm-141gb"]
    assert 1 / h200[0].median_s == pytest.approx(29526.04)


# ---------------------------------------------------------------- meshwise calibrate --from


def test_the_command_shows_what_files_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text(EXAMPLES["kit"])
    (tmp_path / "b").write_text(NEW_LOG)
    files = [str(tmp_path / name) for name in "ab"]
    assert cli.main(["calibrate", "--from", *files, "--dry-run", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert list(metrics["files"].values()) == ["kit", "nccl-tests"]
    assert metrics["measurements"] == 6
    assert metrics["groups"][-1] == {
        "subject": "matmul",
        "chip": "h200-sxm-141gb",
        "implementation": "torch",
        "dtype": "bf16",
        "measurements": 2,
        "samples": 6,
        "kernel": True,
    }
    assert cli.main(["calibrate", "--from", *files, "--dry-run"]) == 0
    assert "h100-sxm-80gb" in capsys.readouterr().out


def test_the_command_fits_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["hardware,framework,kernel_source,gemm_dtype,m,n,k,latency,unit,source"]
    for m in (1, 16, 256, 4096):
        for n in (1024, 2048, 4096, 8192):
            for k in (1024, 2048, 4096, 8192):
                # 200 TFLOP/s or 1.5 TB/s after 5 us, whatever comes later
                moved = 2 * (m * k + n * k + m * n)
                time_ms = 5e-3 + max(2 * m * n * k / 2e11, moved / 1.5e9)
                rows.append(f"a100_sxm,mine 1.0,cublas,bfloat16,{m},{n},{k},{time_ms},ms,me")
    (tmp_path / "gemm.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "curves.json"
    command = ["calibrate", "--from", str(tmp_path / "gemm.csv"), "--out", str(out), "--json"]
    assert cli.main(command) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["profile"] == str(out)
    (curve,) = json.loads(out.read_text())["curves"]
    assert (curve["family"], curve["chip"], curve["implementation"]) == (
        "matmul",
        "a100-sxm-80gb",
        "mine",
    )
    assert metrics["curves"][0]["held_out_median_error"] < 0.15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run"], "belong to --from"),
        (["record.json"], "belong to --from"),
        (["--from", "absent.json"], "absent.json: cannot be read"),
    ],
)
def test_wrong_uses_of_the_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_files_without_kernels_give_nothing_to_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_text(NEW_LOG)
    assert cli.main(["calibrate", "--from", str(tmp_path / "log")]) == 2
    assert "--dry-run shows what they hold" in capsys.readouterr().err
