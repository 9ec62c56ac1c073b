"""A small mixture of experts, trained until its routing is not uniform: its experts adapted, merged, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.slow  # it is trained at first

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, LENGTH = 6, 48
FACTORS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def text(name: str) -> Tensor:
    """Bytes of a data set as rows (rows, LENGTH)."""
    data = (ROOT / "examples" / "data" / name / "train.jsonl").read_bytes()[: 600 * LENGTH]
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() % 128
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def empty() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128}
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True, "output_router_logits": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """The state of a model trained on addresses and definitions in turns."""
    model, rows = empty().train(), [text("addresses"), text("devil")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(160):
        some = rows[step % 2]
        ids = some[torch.randint(len(some), (8,), generator=torch.Generator().manual_seed(step))]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def base(trained: dict[str, Tensor]) -> Any:
    model = empty()
    model.load_state_dict(trained)
    return model.eval()


def shares(model: Any, ids: Tensor) -> Tensor:
    """How often the tokens of each layer choose each expert first (layers, experts)."""
    logits = model(ids, output_router_logits=True).router_logits
    return torch.stack(
        [torch.bincount(x.argmax(-1).flatten(), minlength=EXPERTS) / x.numel() * EXPERTS for x in logits]
    )


def test_the_routing_is_not_uniform(trained: dict[str, Tensor]) -> None:
    model, here, there = base(trained), text("addresses")[:32], text("devil")[:32]
    found = shares(model, here)
    assert found.max() > 2 / EXPERTS
    assert (found - shares(model, there)).abs().max() > 0.1, "and follows the text"
    assert (shares(empty(), here) - found).abs().max() > 0.1


@pytest.mark.parametrize("modules", [[], ["q_proj", "v_proj"]], ids=["experts", "attention-too"])
def test_experts_trained_merged_saved_loaded(modules: list[str], trained: dict[str, Tensor], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=FACTORS, task_type="CAUSAL_LM")
    model, ids = get_peft_model(base(trained), config), text("sentiment")[:16]
    assert len(model.base_model.targeted_parameter_names) == 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2
    out = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(trained), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, out)
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, base(trained)(ids).logits)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(ids).logits, out, rtol=1e-3, atol=1e-3)
    loaded.unmerge_adapter()
    torch.testing.assert_close(loaded(ids).logits, out, rtol=0, atol=0)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, out, rtol=1e-3, atol=1e-3)


def test_every_expert_that_was_chosen_learns_and_no_other(trained: dict[str, Tensor]) -> None:
    model = get_peft_model(base(trained), LoraConfig(r=2, target_parameters=FACTORS[1:], target_modules=[]))
    ids = text("addresses")[:1, :3]
    logits = model(ids, output_router_logits=True).router_logits
    chosen = [x[:-1].topk(2, -1).indices.unique() for x in logits]  # the last token predicts nothing
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == len(chosen) == 2
    for grad, experts in zip(grads, chosen, strict=True):  # (dim, r · experts), the expert counted last
        moved = grad.unflatten(1, (2, EXPERTS)).abs().sum((0, 1)) > 0
        assert moved.nonzero().flatten().tolist() == experts.tolist()
