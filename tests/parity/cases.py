"""The configs whose adapters must equal PEFT's: a model and the fields of its LoraConfig."""

from __future__ import annotations

from typing import Any

ATTENTION = ["q_proj", "v_proj"]
SITES = ["embed", "plain", "biased", "conv"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # targets
    "default_gpt2": ("gpt2", {}),
    "default_llama": ("llama", {}),
    "default_bert": ("bert", {}),
    "default_t5": ("t5", {}),
    "list": ("llama", {"target_modules": ["q_proj", "mlp.down_proj", "model.layers.1.self_attn.o_proj"]}),
    "regex": ("llama", {"target_modules": r".*layers\.1\.(self_attn|mlp)\.[qgd].*_proj"}),
    "all_linear_llama": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "all_linear_case": ("llama", {"target_modules": "All-Linear"}),
    "all_linear_gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "all_linear_bert": ("bert", {"target_modules": "all-linear"}),
    "all_linear_t5": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "all_linear_seq": ("bert_seq", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all_linear_llama_seq": ("llama_seq", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all_linear_condensed": ("llama_deep", {"target_modules": "all-linear", "exclude_modules": r".*layers\.[0-7]\..*"}),
    "long_list_condensed": (
        "llama_deep",
        {
            "target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(11)]
            + [f"model.layers.{i}.mlp.up_proj" for i in range(11)]
        },
    ),
    "long_list_partial": (
        "llama_deep",
        {"target_modules": [f"layers.{i}.self_attn.{p}_proj" for i in range(10) for p in "qk"]},
    ),
    "exclude_list": ("llama", {"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "exclude_regex": ("llama", {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0\..*"}),
    "layer_int": ("llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    "layer_and_paths": (
        "llama",
        {"target_modules": ["q_proj", "lm_head", "model.layers.0.self_attn.v_proj"], "layers_to_transform": [1]},
    ),
    "layer_list": ("llama_deep", {"target_modules": ATTENTION, "layers_to_transform": [0, 3, 10]}),
    "layers_pattern": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers_pattern_list": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    ),
    # rank and scale
    "rank": ("llama", {"r": 3, "lora_alpha": 5}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 5, "use_rslora": True}),
    "rank_pattern": ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 3}}),
    "alpha_pattern": (
        "llama",
        {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"q_proj": 3, "^model.layers.0.self_attn.k_proj": 7}},
    ),
    "patterns": (
        "gpt2",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"h.0.attn.c_attn": 5},
            "alpha_pattern": {"c_proj": 1},
        },
    ),
    # training
    "dropout": ("llama", {"lora_dropout": 0.3, "target_modules": "all-linear"}),
    "dropout_conv1d": ("gpt2", {"lora_dropout": 0.3}),
    "dropout_embedding": ("toy", {"lora_dropout": 0.3, "target_modules": SITES}),
    "fan_in_fan_out": ("gpt2", {"fan_in_fan_out": True}),
    "fan_in_fan_out_linear": ("llama", {"fan_in_fan_out": True}),
    "bias_all": ("bert", {"bias": "all"}),
    "bias_lora_only": ("gpt2", {"bias": "lora_only"}),
    "bias_lora_only_some": ("toy", {"bias": "lora_only", "target_modules": SITES}),
    "bias_all_toy": ("toy", {"bias": "all", "target_modules": ["biased", "conv"], "modules_to_save": ["my_score"]}),
    "lora_bias": ("llama", {"lora_bias": True, "target_modules": "all-linear"}),
    "lora_bias_conv": ("toy", {"lora_bias": True, "target_modules": ["biased", "conv"]}),
    "lora_bias_biased": ("toy", {"lora_bias": True, "target_modules": ["plain", "biased", "conv"]}),
    # whole modules and tokens
    "save_head": ("llama", {"modules_to_save": ["lm_head"]}),
    "save_norms": ("llama", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "save_embedding": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "save_block": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["mlp"]}),
    "tokens_list": ("llama", {"trainable_token_indices": [1, 5, 39]}),
    "tokens_dict": ("llama", {"trainable_token_indices": {"embed_tokens": [4, 2]}}),
    "tokens_tied": ("llama_tied", {"trainable_token_indices": [1, 5, 39]}),
    "tokens_tied_dict": ("gpt2", {"trainable_token_indices": {"wte": [0, 7]}}),
    "tokens_head": ("llama", {"trainable_token_indices": {"embed_tokens": [4], "lm_head": [2, 9]}}),
    "tokens_t5": ("t5", {"trainable_token_indices": {"shared": [4, 8]}}),
    "tokens_tied_head": ("llama_tied", {"trainable_token_indices": {"lm_head": [4, 8]}}),
    "tokens_tied_both": ("llama_tied", {"trainable_token_indices": {"lm_head": [4, 8], "embed_tokens": [4, 8]}}),
    "tokens_tied_apart": ("llama_tied", {"trainable_token_indices": {"lm_head": [4, 8], "embed_tokens": [8, 9, 4]}}),
    # sites
    "toy": ("toy", {"target_modules": SITES}),
    "toy_linear": ("toy", {"target_modules": ["plain", "biased"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding_gpt2": ("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "embedding_alone": ("llama", {"target_modules": ["model.embed_tokens"]}),
    "head_alone": ("llama", {"target_modules": ["lm_head"]}),
    "embedding_regex": ("llama", {"target_modules": ".*(embed_tokens|q_proj)"}),
    "embedding_rslora": ("toy", {"target_modules": ["embed"], "r": 4, "lora_alpha": 3, "use_rslora": True}),
    # DoRA
    "dora_llama": ("llama", {"use_dora": True, "target_modules": "all-linear"}),
    "dora_gpt2": ("gpt2", {"use_dora": True, "target_modules": "all-linear"}),
    "dora_toy": ("toy", {"use_dora": True, "target_modules": SITES, "lora_alpha": 3, "use_rslora": True}),
    "dora_dropout": ("llama", {"use_dora": True, "lora_dropout": 0.3}),
    "dora_dropout_toy": ("toy", {"use_dora": True, "lora_dropout": 0.3, "target_modules": SITES}),
    "dora_patterns": ("bert", {"use_dora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"value": 2}}),
    "dora_bias": ("toy", {"use_dora": True, "bias": "lora_only", "target_modules": ["biased", "conv"]}),
    "dora_save": ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
    # starts
    "init_false": ("llama", {"init_lora_weights": False}),
    "init_gaussian": ("gpt2", {"init_lora_weights": "gaussian"}),
    "init_gaussian_toy": ("toy", {"init_lora_weights": "gaussian", "target_modules": SITES}),
    "init_orthogonal": ("llama", {"init_lora_weights": "orthogonal", "r": 4}),
    "init_pissa": ("llama", {"init_lora_weights": "pissa", "r": 4}),
    "init_pissa_gpt2": ("gpt2", {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 6}),
    "init_pissa_toy": ("toy", {"init_lora_weights": "pissa", "r": 4, "target_modules": SITES}),
    "init_olora": ("llama", {"init_lora_weights": "olora", "r": 4}),
    "dora_pissa": ("llama", {"use_dora": True, "init_lora_weights": "pissa", "r": 4}),
    # tasks
    "task_seq": ("bert_seq", {"task_type": "SEQ_CLS"}),
    "task_llama_seq": ("llama_seq", {"task_type": "SEQ_CLS"}),
    "task_gpt2_seq": ("gpt2_seq", {"task_type": "SEQ_CLS"}),
    "task_token": ("bert_token", {"task_type": "TOKEN_CLS"}),
    "task_qa": ("bert_qa", {"task_type": "QUESTION_ANS"}),
    "task_features": ("bert", {"task_type": "FEATURE_EXTRACTION"}),
    "task_causal": ("llama", {"task_type": "CAUSAL_LM", "inference_mode": True}),
}
