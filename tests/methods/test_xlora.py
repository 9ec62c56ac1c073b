"""X-LoRA: the formula in plain loops, what is trained, files, generation, what is refused."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.models import grown, llama
from trimtab import AutoPeftModelForCausalLM, LoraConfig, PeftModel, XLoraConfig, fuse_loss, get_peft_model
from trimtab.errors import AdapterFileError, AdapterNameError, ConfigError, ReadOnlyWeight

IDS = torch.tensor([[4, 9, 11, 7, 30, 2], [8, 3, 21, 10, 6, 5]])


def base() -> Any:
    sizes = {"num_hidden_layers": 2, "vocab_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    return grown(llama(**sizes, eos_token_id=None, pad_token_id=None), 6)


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    """Two LoRA adapters in folders; the second is at fewer layers."""
    found = {}
    for name, targets in (("law", ["q_proj", "down_proj"]), ("code", ["q_proj"])):
        config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base(), config).save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


def routed(experts: dict[str, str], **fields: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base(), XLoraConfig(adapters=experts, task_type="CAUSAL_LM", **fields)).eval()


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_formula_in_plain_loops(layerwise: bool, experts: dict[str, str]) -> None:
    model = routed(experts, layerwise_scalings=layerwise, softmax_temperature=0.5, global_scaling_weight=1.5)
    out = model(IDS).logits
    layer = model.internal_xlora_classifier.layers[0]
    plain = base()
    hidden = plain(IDS, output_hidden_states=True).hidden_states[-1]
    paths = [n for n, m in plain.named_modules() if n.endswith(("q_proj", "down_proj"))]
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # what each layer got and gave

    def weigh(path: str) -> Any:
        at = paths.index(path)

        def hook(module: Any, args: Any, y: Tensor) -> Tensor:
            y = y.clone()
            for row in range(len(IDS)):
                for token in range(IDS.shape[1]):
                    logits = layer.weight @ hidden[row, token] + layer.bias
                    logits = logits[2 * at : 2 * at + 2] if layerwise else logits
                    sigma = torch.softmax(logits / 0.5, 0)
                    for i, name in enumerate(("code", "law")):
                        adapted = model.get_base_model().get_submodule(path)
                        if name in adapted.lora_A:
                            A, B = adapted.lora_A[name].weight, adapted.lora_B[name].weight
                            y[row, token] += 1.5 * sigma[i] * 6 / 2 * (B @ (A @ args[0][row, token]))
            seen[path] = args[0], y
            return y

        return hook

    with torch.no_grad():
        for path in paths:
            plain.get_submodule(path).register_forward_hook(weigh(path))
        expected = plain(IDS).logits
    assert len(seen) == 4
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - base()(IDS).logits).abs().max() > 0.1


def test_only_the_network_is_trained(experts: dict[str, str]) -> None:
    model = routed(experts)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.internal_xlora_classifier.layers.0.weight",
        "base_model.internal_xlora_classifier.layers.0.bias",
    ]
    assert model.get_nb_trainable_parameters()[0] == 2 * 16 + 2


def test_the_adapters_are_trained_along(experts: dict[str, str], tmp_path: Path) -> None:
    model = routed(experts, use_trainable_adapters=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    out = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "trained")  # beside it, not where they were loaded from
    torch.testing.assert_close(loaded(IDS).logits, out)
    assert not any(p.requires_grad for p in loaded.parameters())
    old = PeftModel.from_pretrained(base(), tmp_path / "trained", adapters=experts)
    assert not torch.allclose(old(IDS).logits, out)


def test_off_switched_copied_and_deleted(experts: dict[str, str]) -> None:
    model, plain = routed(experts), base()
    out = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, out)
    mixed = model(IDS, adapter_names=["law", "__base__"]).logits
    model.set_adapter("law")
    torch.testing.assert_close(mixed[:1], model(IDS[:1]).logits)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, out)
    model.delete_adapter("law")
    with pytest.raises(AdapterNameError, match="law"):
        model(IDS)
    model.delete_adapter("default")
    assert not any("classifier" in n for n, _ in model.named_parameters())


def test_generation_goes_through_the_router_at_every_token(experts: dict[str, str]) -> None:
    model = routed(experts)
    model.enable_scalings_logging()
    said = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert [x.shape[1] for x in model.get_scalings_log()] == [6, 7, 8]
    model.clear_scalings_log()
    for _ in range(3):
        ids = said[:, : IDS.shape[1] + len(model.get_scalings_log())]
        assert torch.equal(model(ids).logits[:, -1].argmax(-1), said[:, ids.shape[1]])
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(IDS, max_new_tokens=3, use_cache=True)
    assert model.get_base_model().generation_config.use_cache is True


def test_checkpointing_repeats_the_weights(experts: dict[str, str]) -> None:
    grads = []
    for checkpoints in (False, True):
        model = routed(experts, use_trainable_adapters=True).train()
        if checkpoints:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_an_adapter_that_is_there_is_taken(experts: dict[str, str]) -> None:
    model = PeftModel.from_pretrained(base(), experts["law"], adapter_name="law")
    model.add_adapter("router", XLoraConfig(adapters=experts, task_type="CAUSAL_LM"))
    model.set_adapter("router")
    assert set(model.peft_config) == {"law", "code", "router"}
    assert model(IDS).logits.isfinite().all()


def test_a_folder_opens_by_itself(experts: dict[str, str], tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"), XLoraConfig(adapters=experts, task_type="CAUSAL_LM")
    ).eval()
    model.save_pretrained(tmp_path / "router")
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "router")
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits)


def test_what_is_refused(experts: dict[str, str], tmp_path: Path) -> None:
    model = routed(experts)
    with pytest.raises(ReadOnlyWeight, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="act on the model as a whole"):
        model(IDS, adapter_names=["default", "law"])
    with pytest.raises(ConfigError, match="one X-LoRA"):
        model.add_adapter("second", XLoraConfig(adapters=experts))
    for fields, message in (
        ({"adapters": {}}, "names no adapter"),
        ({"adapters": experts, "hidden_size": 12}, "hidden states have 16"),
        ({"adapters": experts, "top_k_lora": 3}, "more than the 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_peft_model(base(), XLoraConfig(**fields))
    for fields, message in (({"top_k_lora": 0}, "top_k_lora"), ({"enable_softmax_topk": True}, "needs `top_k_lora`")):
        with pytest.raises(ConfigError, match=message):
            XLoraConfig(adapters=experts, **fields)
    with pytest.raises(AdapterFileError, match="nowhere"):
        get_peft_model(base(), XLoraConfig(adapters={"a": str(tmp_path / "nowhere")}))
    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base(), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(ConfigError, match="plain LoRA"):
        get_peft_model(base(), XLoraConfig(adapters={"a": str(tmp_path / "dora")}))


def test_threads_each_have_their_router(experts: dict[str, str]) -> None:
    """One thread's call ends while the other's still goes on."""
    model = routed(experts)
    wanted, plain = model(IDS).logits, base()(IDS).logits
    inside, done = threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    def wait(module: Any, args: Any, kwargs: Any) -> None:
        if threading.current_thread().name == "slow" and not inside.is_set():
            inside.set()
            done.wait(20)

    model.get_base_model().model.layers[0].register_forward_pre_hook(wait, with_kwargs=True)

    def slow() -> None:
        found["first"] = model(IDS).logits

    thread = threading.Thread(target=slow, name="slow")
    thread.start()
    assert inside.wait(20)
    found["second"] = model(IDS).logits
    with model.disable_adapter():
        found["off"] = model(IDS).logits
    done.set()
    thread.join()
    assert torch.equal(found["first"], wanted)
    assert torch.equal(found["second"], wanted)
    assert torch.equal(found["off"], plain)
    assert "forward" not in model.get_base_model().__dict__


def test_in_our_loop_head_and_loss_are_one_step(experts: dict[str, str]) -> None:
    found = []
    for fused in (False, True):
        model = routed(experts).train()
        assert not fused or fuse_loss(model) is not None
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append((loss, model.internal_xlora_classifier.layers[0].weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
