"""A model that transformers cuts over two processes: an adapter does there what it does on the whole model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.train.test_processes import ROOT, launch

SCRIPT = "tests/layer/scripts/parallel.py"


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_adapter_on_parts_of_the_model(fields: dict[str, bool], tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    subprocess.run([sys.executable, SCRIPT, str(tmp_path), str(fields)], check=True, cwd=ROOT, env=environment)
    launch(SCRIPT, str(tmp_path), str(fields))
    alone, parts = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "parts"))
    for name in ("out", "merged", "unmerged"):
        torch.testing.assert_close(parts[name], alone["out"], rtol=1e-4, atol=1e-5)
    assert parts["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        limit = 1e-6 * float(gradient.abs().max() + 1)
        torch.testing.assert_close(parts["gradients"][name], gradient, rtol=1e-3, atol=limit)
    saved = [load_file(tmp_path / place / "adapter_model.safetensors") for place in ("alone", "parts/read")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
