"""Which curve prices a chip, and what its uncertainty is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import meshwise as mw
from hwmodels import curves as module
from hwmodels.catalogue import load_chip
from hwmodels.curves import Curve, choose_curves, read_curve, shipped_curves
from hwmodels.families import FAMILIES
from simcore.errors import InputError
from validation.fitting import write_curves

SHAPE = {"moved_bytes": np.array([1e6, 1e9]), "vector_flops": np.zeros(2)}


def curve(chip: str, library: str = "one", dtype: str = "bf16", share: float = 0.8) -> Curve:
    coefficients = {**FAMILIES["memory"].start(), "bandwidth_share": share}
    return Curve("memory", chip, library, dtype, coefficients, ((1e-6, 0.2), (1e-3, 0.1)))


KNOWN = (
    curve("a100-sxm-80gb"),
    curve("h100-sxm-80gb"),
    curve("h100-sxm-80gb", "two", share=0.6),
    curve("h100-sxm-80gb", dtype="fp8"),
    curve("h200-sxm-141gb"),
)


@pytest.mark.parametrize(
    ("chip", "borrowed"),
    [
        ("h100-sxm-80gb", ""),
        ("a100-sxm-40gb", "a100-sxm-80gb"),  # its own architecture
        ("h100-pcie-80gb", "h100-sxm-80gb"),
        ("l40s", "a100-sxm-80gb"),  # products from registers
        ("t4", "a100-sxm-80gb"),
    ],
)
def test_a_chip_without_measurements_borrows_from_its_nearest_relative(
    chip: str, borrowed: str
) -> None:
    assert choose_curves("memory", load_chip(chip), "bf16", curves=KNOWN).borrowed == borrowed


def test_libraries_count_alike_unless_one_is_named() -> None:
    chip = load_chip("h100-sxm-80gb")
    both, one, two = (
        choose_curves("memory", chip, "bf16", name, curves=KNOWN).seconds(SHAPE, chip)
        for name in ("", "one", "two")
    )
    np.testing.assert_allclose(both, np.sqrt(one * two))
    assert np.all(one < two)


def test_a_dtype_without_measurements_takes_the_curve_of_one_alike() -> None:
    found = choose_curves("memory", load_chip("h100-sxm-80gb"), "int8", curves=KNOWN)
    assert found.dtype == "int8"
    assert [c.dtype for c in found.curves] == ["fp8"]


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'one'"):
        choose_curves("memory", load_chip("h100-sxm-80gb"), "bf16", "on", curves=KNOWN)


def test_a_family_without_measurements_starts_from_typical_coefficients() -> None:
    found = choose_curves("memory", load_chip("h100-sxm-80gb"), "bf16", curves=())
    assert found.borrowed == "nowhere"
    assert found.curves[0].coefficients == FAMILIES["memory"].start()


def test_uncertainty_adds_residuals_disagreement_and_borrowing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "carried_deviations", lambda: {"memory": 0.3})
    near, far = load_chip("h100-sxm-80gb"), load_chip("h100-pcie-80gb")
    one, both = (
        choose_curves("memory", near, "bf16", name, curves=KNOWN).deviation(SHAPE, near)
        for name in ("one", "")
    )
    assert np.all(one >= 0.1)
    assert one[0] > one[1]  # short calls vary more
    assert np.all(both > one)
    carried = choose_curves("memory", far, "bf16", "one", curves=KNOWN).deviation(SHAPE, far)
    assert carried[1] == pytest.approx(math.hypot(one[1], 0.3), rel=0.02)


def test_shipped_curves_say_where_they_come_from() -> None:
    assert {c.chip for c in shipped_curves()} == {
        "a100-sxm-80gb",
        "h100-sxm-80gb",
        "h200-sxm-141gb",
    }
    for found in shipped_curves():
        about = found.provenance
        assert about["source"]
        assert about["date"]
        assert about["rows"] >= 60
        assert 0 < about["held_out_median_error"] <= about["held_out_p90_error"]
        assert all(0 < deviation < 1 for _, deviation in found.spread)


def test_curves_survive_json() -> None:
    for found in KNOWN:
        assert read_curve(json.loads(json.dumps(found.to_dict())), "here") == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "memry"}, "did you mean 'memory'"),
        ({"coefficients": {"launch_s": 1.0}}, "coefficients must be"),
        ({"spread": [1.0]}, "ill-formed"),
        ({"spread": 3}, "ill-formed"),
        ({"coefficients": None}, "ill-formed"),
    ],
)
def test_an_ill_formed_curve_is_one_sentence(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_curve({**KNOWN[0].to_dict(), **change}, Path("curves.json").name)


CALL = {
    "cluster": {"gpu": "l40s"},
    "workload": {"kind": "op", "op": "gemm", "m": 4096, "n": 4096, "k": 4096},
}


def test_a_users_curve_comes_before_the_shipped_ones(tmp_path: Path) -> None:
    family = FAMILIES["matmul"]
    slow = {**family.start(), "peak_share": family.coefficients["peak_share"][1]}
    mine = Curve("matmul", "l40s", "mine", "bf16", slow, ((1e-6, 0.2), (1e-3, 0.1)))
    path = tmp_path / "curves.json"
    write_curves(path, [mine], {})
    before, after = mw.predict(CALL), mw.predict(CALL, profile=path)
    assert 1.5 * before.metrics["seconds"] < after.metrics["seconds"]
    assert any("matmul) follow curves measured on l40s" in note for note in after.assumptions)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"curves": [1]}', '{"curves": [{}]}'])
def test_a_file_that_holds_no_curves_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(InputError, match="curve"):
        mw.predict(CALL, profile=path)
    with pytest.raises(InputError, match="cannot read"):
        mw.predict(CALL, profile=tmp_path / "nothing.json")
