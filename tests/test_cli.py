"""The command line: output, messages and exit codes of every command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshwise import cli
from simcore.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
KEYS = {"scenario_hash", "metrics", "assumptions", "warnings", "provenance"}
GEMM = {
    "cluster": {"gpu": "h100-sxm-80gb"},
    "workload": {"kind": "op", "op": "gemm", "m": 64, "n": 64, "k": 64},
}
COMMANDS = (
    "predict",
    "simulate",
    "plan",
    "run",
    "validate",
    "calibrate",
    "models",
    "hardware",
    "systems",
    "schema",
    "demo",
)
Capture = pytest.CaptureFixture[str]


def call(capture: Capture, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command."""
    code = cli.main(list(arguments))
    out, err = capture.readouterr()
    return code, out, err


def test_help_lists_every_command(capsys: Capture) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str, capsys: Capture) -> None:
    code, out, _ = call(capsys, name, "--help")
    assert code == 0
    assert "--json" in out


def test_version(capsys: Capture) -> None:
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.startswith("meshwise 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "allreduce.toml"),
        ("predict", "gemm.toml"),
        ("predict", "llama8b_generate_h100.toml", "--engine", "simulate"),
        ("simulate", "llama8b_generate_h100.toml"),
        ("plan", "cpu_train.toml", "--top", "3"),
    ],
)
def test_json_has_the_five_keys(arguments: tuple[str, ...], capsys: Capture) -> None:
    command, file, *rest = arguments
    code, out, err = call(capsys, command, str(EXAMPLES / file), *rest, "--json")
    assert code == 0, err
    assert json.loads(out).keys() == KEYS


def test_tables_have_human_units(capsys: Capture) -> None:
    code, out, _ = call(capsys, "predict", str(EXAMPLES / "llama8b_generate_h100.toml"))
    assert code == 0
    assert "token/s" in out
    assert "GB" in out
    assert "assumptions:" in out
    assert "llama" not in out or "{" not in out


def test_plan_prints_a_ranking_and_the_solver(capsys: Capture) -> None:
    code, out, _ = call(capsys, "plan", str(EXAMPLES / "cpu_train.toml"), "--top", "2")
    assert code == 0
    assert "ranked strategies" in out
    assert "strategies, " in out
    assert "optimal" in out


def test_simulate_writes_a_trace(tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "trace.json"
    file = str(EXAMPLES / "cpu_train.toml")
    code, out, err = call(capsys, "simulate", file, "--trace", str(target), "--json")
    assert code == 0
    assert json.loads(out)["provenance"]["engine"] == "simulate"
    assert "perfetto" in err
    assert json.loads(target.read_text())["traceEvents"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("predict", "missing.toml"), "no such file"),
        (("predict",), "SCENARIO"),
        (("predict", "x", "--engine"), "--engine"),
        (("predikt", "x"), "predikt"),
        (("predict", str(EXAMPLES / "gemm.toml"), "--engine", "guess"), "engine 'guess'"),
        (("predict", str(EXAMPLES / "cpu_train.toml"), "--profile", "no.json"), "no.json"),
        (("plan", str(EXAMPLES / "gemm.toml")), "a plan needs"),
        (("plan", str(EXAMPLES / "cpu_train.toml"), "--top", "0"), "--top"),
        (("run", str(EXAMPLES / "gemm.toml")), "cannot be run"),
        (("run", str(EXAMPLES / "llama70b_512xh100.toml")), "--rank"),
        (("validate", str(EXAMPLES / "gemm.toml")), "cannot be run"),
        (("models", "show", "llama-2-7bb"), "llama-2-7b"),
        (("hardware", "show", "h100-sxm-80gbb"), "h100-sxm-80gb"),
        (("models", "shw"), "shw"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    arguments: tuple[str, ...], words: str, capsys: Capture
) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert err.startswith("meshwise: ")
    assert err.count("\n") == 1


def test_no_arguments_show_help_and_code_2(capsys: Capture) -> None:
    code, _, err = call(capsys)
    assert code == 2
    assert "Usage" in err


def test_a_failed_run_is_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RunError("rank 1 of 2 died (signal 9).")

    monkeypatch.setattr("meshwise.api.run", fail)
    code, _, err = call(capsys, "run", str(EXAMPLES / "cpu_train.toml"))
    assert code == 1
    assert err == "meshwise: rank 1 of 2 died (signal 9).\n"


def test_an_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshwise.api.predict", interrupt)
    code, _, err = call(capsys, "predict", str(EXAMPLES / "gemm.toml"))
    assert code == 130
    assert "interrupted" in err


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    for arguments in (["hardware"], ["models", "--json"], ["schema"]):
        done = subprocess.run(
            [sys.executable, "-m", "meshwise", *arguments],
            cwd=ROOT,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0
        assert done.stderr == ""
    os.close(write)


def lines_of(capsys: Capture, monkeypatch: pytest.MonkeyPatch, text: str) -> list[dict[str, Any]]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    code, out, _ = call(capsys, "predict", "-", "--jsonl")
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


def test_jsonl_keeps_order_and_goes_on_after_bad_lines(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = {**GEMM, "workload": {**GEMM["workload"], "m": 65536}}
    lines = [json.dumps(GEMM), '{"workload"', "[1]", json.dumps(larger), '{"cluster": {}}']
    found = lines_of(capsys, monkeypatch, "\n".join(lines) + "\n")
    assert [set(each) == KEYS for each in found] == [True, False, False, True, False]
    assert [list(found[index]) for index in (1, 2, 4)] == [["error"]] * 3
    assert found[0]["metrics"]["seconds"] < found[3]["metrics"]["seconds"]


def test_jsonl_survives_an_internal_error(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr("meshwise.api.predict", fail)
    found = lines_of(capsys, monkeypatch, json.dumps(GEMM) + "\n")
    assert found == [{"error": "internal error: ZeroDivisionError: x"}]


def test_jsonl_of_a_missing_file(capsys: Capture) -> None:
    code, _, err = call(capsys, "predict", "no.jsonl", "--jsonl")
    assert code == 2
    assert "no.jsonl" in err


def test_standard_input_is_a_scenario(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(GEMM)))
    code, out, _ = call(capsys, "predict", "-", "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["seconds"] > 0


@pytest.mark.parametrize("arguments", [("models",), ("models", "list")])
def test_models_are_a_list(arguments: tuple[str, ...], capsys: Capture) -> None:
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    rows = json.loads(out)
    assert len(rows) >= 50
    assert {"name", "parameters"} <= rows[0].keys()


def test_one_model_and_one_chip(capsys: Capture) -> None:
    code, out, _ = call(capsys, "models", "show", "meta-llama/Llama-3.1-8B", "--json")
    assert code == 0
    assert json.loads(out)["parameters"] == 8_030_261_248
    code, out, _ = call(capsys, "hardware", "show", "h100", "--json")
    assert code == 0
    assert json.loads(out)["sources"]
    code, out, _ = call(capsys, "hardware", "show", "ib-ndr-400x8")
    assert code == 0
    assert "nic" in out


def test_hardware_is_a_list(capsys: Capture) -> None:
    code, out, _ = call(capsys, "hardware", "--json")
    assert code == 0
    assert {row["kind"] for row in json.loads(out)} == {"chip", "link", "cluster"}


def test_schema_is_json(capsys: Capture) -> None:
    code, out, _ = call(capsys, "schema", "--json")
    assert code == 0
    assert json.loads(out)["properties"].keys() >= {"model", "cluster", "workload"}


def test_results_do_not_change_from_run_to_run(capsys: Capture) -> None:
    first, second = (
        call(capsys, "predict", str(EXAMPLES / "allreduce.toml"), "--json")[1] for _ in range(2)
    )
    assert first == second
