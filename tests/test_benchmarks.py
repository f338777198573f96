"""The benchmarks that need more than this machine may have go through their motions on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.measuring import Shape
from benchmarks.methods import FACTORS, SCALE, TODAY, WAYS, of_layer
from benchmarks.quantized import OURS, THEIRS, measure, report
from diffusekrona import KronALayer
from diffusekrona.bases.quantization import PACKAGES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("benchmark", ["sdxl_step", "lifecycle"])
def test_a_dry_run_measures_all_methods_and_writes_nothing(benchmark):
    before = {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--dry-run", "--rounds", "1"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for method in ("KronA (4, 64)", "PEFT LoRA r=4", "PEFT LoKr factor 8"):
        assert f"| {method} |" in table
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()} == before


def test_merging_is_measured_by_what_it_keeps_and_says_what_comes_back():
    before = {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}
    command = [sys.executable, "-m", "benchmarks.merging", "--dry-run", "--rounds", "1", "--cpu-time"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for dtype in table.split("## ")[1:]:
        rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in dtype.splitlines() if "4" in line}
        kept, wrong = ({name: row[column] for name, row in rows.items()} for column in (-2, -1))
        exact, copied, added, lora = (name for name in rows if "exact=" in name or "LoRA" in name)
        assert kept[copied] == "100.0%"
        assert 0 < float(kept[exact].strip("%")) < 15
        assert kept[added] == kept[lora] == "0.0%"
        assert wrong[exact] == wrong[copied] == "0.00%"
        assert float(wrong[added].strip("%")) > 1
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()} == before


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("way", WAYS)
def test_the_orders_of_todays_programs_compute_the_same_update(way, name):
    torch.manual_seed(0)
    base = nn.Linear(128, 256, bias=False, dtype=torch.float64).requires_grad_(False)
    layer, x = TODAY[f"{way}, {name}"](base).double(), torch.randn(2, 5, 128, dtype=torch.float64)
    ours = isinstance(layer, KronALayer)
    A, B = (layer.krona_A["default"], layer.krona_B["default"]) if ours else (layer.A, layer.B)
    assert tuple(A.shape) == of_layer(base, FACTORS[name])
    expected = base(x) + (1 if ours else SCALE) * x @ torch.kron(A, B).T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", PACKAGES)
def test_methods_are_measured_over_the_same_quantized_layer(kind):
    pytest.importorskip(PACKAGES[kind])
    found = measure(Shape("tiny", tokens=7, h=128, d=128, layers=1), kind, rounds=3)
    assert found["to_frozen"][OURS] > 0
    row = report({"conditions": "", "found": [found]})[-1]
    assert row.startswith(f"| tiny | {kind} |")
    assert ("| yes |" if found["to_lora"] <= 1 else "| no |") in row
    kept = found["saved_bytes"]
    assert 7 * 128 * 2 <= kept[OURS] < kept[THEIRS]
