import json

import pytest
import torch

import convert
import harness
from mpoe.mpo import SiteDims, decompose, site_dims, truncation_error


def test_it_compares_every_gauge_with_numpy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "MIN_SAMPLE_S", 1e-6)
    convert.main(["--tiny", "--threads", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows if row["case"] == "load 48, exact"] == [
        "numpy TT-SVD", "identity", "central", "sqrt"
    ]  # fmt: skip
    assert all(row["ratio"]["median"] == 1 for row in rows if row["way"] == "numpy TT-SVD")
    assert {(row["case"], row["way"]) for row in rows if "ratio" not in row} == {
        ("upcycle, exact", "extended"),
        *(("upcycle, exact", f"balanced, {gauge}") for gauge in ("identity", "central", "sqrt")),
        *(("upcycle, half", f"balanced, {gauge}") for gauge in ("identity", "sqrt")),
    }
    assert "results in" in capsys.readouterr().out


def test_an_odd_number_of_matrices(capsys):
    with pytest.raises(SystemExit):
        convert.main(["--tiny", "--matrices", "3"])
    assert "--matrices must be even" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_the_tt_svd_in_numpy(size):
    matrix, dims = torch.randn(*size, dtype=torch.float64), site_dims(*size)
    assert truncation_error(convert.tt_svd(matrix.numpy(), dims, None), matrix) < 1e-12
    truncated = convert.tt_svd(matrix.numpy(), dims, 7)
    assert truncated.bond_dims == dims.bond_dims(7)
    ours = truncation_error(decompose(matrix, dims, 7), matrix)
    assert truncation_error(truncated, matrix) == pytest.approx(ours, rel=0.02)


def test_the_bond_of_a_budget():
    dims = SiteDims((2, 3, 4), (3, 2, 4), 24, 24)  # bonds 6 and 16: 6b + 6b² + 16b parameters up to bond 6
    assert convert.bond_for_budget(dims, 0.5) == 5  # 260 of 288; a bond of 6 has 348
    assert sum(dims.num_parameters(5)) == 260
    assert convert.bond_for_budget(site_dims(3072, 768), 0.5) == 183
