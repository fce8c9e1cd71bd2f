"""The table of what runs on what: that the page shows what was measured. The measuring is a command, `matrix.py`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests import matrix


DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_is_what_was_measured() -> None:
    found = json.loads((DOCS / "matrix.json").read_text(encoding="utf-8"))
    assert matrix.table(found) in (DOCS / "compatibility.md").read_text(encoding="utf-8")
    assert found["tolerance"] == matrix.TOLERANCE
    wanted = {f"{way} | {name} | {kind}" for way in matrix.WAYS for name in matrix.CELLS for kind in matrix.WEIGHTS}
    assert found["cells"].keys() <= wanted
    for cell, result in found["cells"].items():
        assert result["status"] in ("passes", "refused"), (cell, result)
        assert result.get("difference", 0) <= matrix.TOLERANCE, cell


def test_a_difference_is_relative_to_what_training_has_moved() -> None:
    start = matrix.tiny.make_model(num_hidden_layers=2).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    one, two = ({key: value.clone() for key, value in start.items()} for _ in range(2))
    one[name][0, 0] += 2
    two[name][0, 0] += 1
    assert matrix.difference("full", one, two) == 0.5
    low = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.full((2, 1), 4.0)}
    near = {**low, "x.lora_B.weight": torch.full((2, 1), 3.0)}
    assert matrix.difference("LoRA", low, near) == 0.25


def test_cells_of_a_table_are_told_apart() -> None:
    cells = {
        "ddp | apo | full": {"status": "passes", "difference": 1e-6},
        "ddp | apo | LoRA": {"status": "refused", "why": "because"},
        "ddp | apo | passed PeftModel": {"status": "passes"},
    }
    lines = matrix.table({"cells": cells, "versions": {"torch": "2"}}).splitlines()
    assert lines[2].startswith("| apo | full: passes, LoRA: refused, passed PeftModel: passes | untested | untested |")
    assert "- because" in lines
