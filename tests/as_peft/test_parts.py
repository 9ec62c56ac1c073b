"""Parts of peft's inside that programs call by themselves."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, MontecloraConfig, ShiraConfig, get_peft_model
from peft.auto import check_import_allowlist, get_default_import_allowlist
from peft.helpers import MontecloraTrainerMixin
from peft.tuners.shira.mask_functions import random_mask
from peft.tuners.tuners_utils import replicate_layers
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.loftq_utils import loftq_init
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.models import llama, tokens, toy

X = torch.randn(57, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [10, 19, 57, None])
def test_incremental_pca_is_scikit_learns(batch):
    from sklearn.decomposition import IncrementalPCA as Theirs

    theirs = Theirs(n_components=3, batch_size=batch).fit(X.numpy())
    ours = IncrementalPCA(n_components=3, batch_size=batch).fit(X)
    for name in (
        "components_",
        "singular_values_",
        "mean_",
        "var_",
        "explained_variance_",
        "explained_variance_ratio_",
    ):
        torch.testing.assert_close(getattr(ours, name), torch.from_numpy(getattr(theirs, name)), msg=name)
    torch.testing.assert_close(ours.transform(X), torch.from_numpy(theirs.transform(X.numpy())))
    assert int(ours.n_samples_seen_) == len(X)


def test_incremental_pca_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="invalid for n_features=6"):
        IncrementalPCA(n_components=10).fit(X)
    with pytest.raises(ValueError, match="less or equal to the batch number of samples 2"):
        IncrementalPCA(n_components=3).partial_fit(X[:2])
    with pytest.raises(ValueError, match="does not match"):
        IncrementalPCA(n_components=2).partial_fit(X).partial_fit(X[:, :3])
    with pytest.raises(ValueError, match="must be specified"):
        IncrementalPCA(lowrank=True)
    with pytest.raises(ValueError, match="greater than or equal"):
        IncrementalPCA(lowrank=True, n_components=3, lowrank_q=2)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_comes_nearer_than_rounding(bits):
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    Q, A, B = loftq_init(W, bits, 6, 3)
    plain, _, _ = loftq_init(W, bits, 1, 1)
    assert (A.shape, B.shape) == ((6, 16), (24, 6))
    assert (W - Q - B @ A).norm() < 0.8 * (W - plain).norm()
    with pytest.raises(ValueError, match="Only nf4 and int8"):
        loftq_init(W, 3, 6)


def test_a_random_mask_chooses_what_shira_trains():
    layer = nn.Linear(9, 7)
    mask = random_mask(layer, 2, random_seed=4)
    assert mask.shape == layer.weight.shape
    assert int(mask.sum()) == 2 * (9 + 7)
    assert torch.equal(mask, random_mask(layer, 2, random_seed=4))
    config = ShiraConfig(r=1, target_modules=["up"], random_seed=4)
    config.mask_fn = random_mask
    model = get_peft_model(toy(), config)
    places = model.base_model.model.up.shira_indices["default"]
    assert torch.equal(places.long(), random_mask(toy().up, 1, random_seed=4).nonzero().T)


def test_layers_are_replicated_on_shared_weights():
    model, ids = llama(), tokens(vocabulary=60)
    first, second = model.model.layers
    replicate_layers(model, [(0, 2), (0, 2)])
    assert len(model.model.layers) == 4
    assert model.model.layers[2].mlp.up_proj.weight is first.mlp.up_proj.weight
    assert model.model.layers[3].mlp.up_proj.weight is second.mlp.up_proj.weight
    assert model(ids).logits.isfinite().all()


def test_known_libraries_may_be_imported():
    assert "transformers" in get_default_import_allowlist()
    assert check_import_allowlist(["transformers"], "transformers.models.llama")
    assert not check_import_allowlist(["transformers"], "transformers_evil")


def test_monteclora_needs_no_trainer_of_its_own(tmp_path):
    class Ours(MontecloraTrainerMixin, Trainer):
        pass

    config = LoraConfig(r=2, target_modules=["q_proj"], monteclora_config=MontecloraConfig(), task_type="CAUSAL_LM")
    model, ids = get_peft_model(llama(), config).train(), tokens(vocabulary=60)
    batch = {"input_ids": ids, "labels": ids}
    losses = []
    for cls in (Trainer, Ours):
        trainer = cls(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
        torch.manual_seed(0)
        losses.append(trainer.compute_loss(model, batch).detach())
    with model.disable_adapter():
        assert losses[0] == losses[1] != model(**batch).loss.detach()  # the adapter's own term is in it, once


def test_a_tuner_shows_the_budget_of_its_ranks():
    config = AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, tinit=1, tfinal=1, total_step=10)
    tuner = get_peft_model(llama(), config).base_model
    assert [tuner.rankallocator.budget_schedule(step)[1] for step in (0, 3, 9)] == [False, True, True]
    assert tuner.trainable_adapter_name == "default"
    assert tuner.model.model.layers[0].self_attn.q_proj.quantization_backend is None
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).base_model
    assert not hasattr(plain, "rankallocator")
