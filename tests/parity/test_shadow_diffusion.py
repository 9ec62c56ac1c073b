"""Shadow beside diffusion models against PEFT: starts, outputs, gradients, files both ways, the parts by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft.tuners.shadow.diffusion_models as theirs_of
import pytest
import torch
from torch import nn

import trimtab
from tests.diffusion import batch, build, out
from tests.parity.alias import find
from tests.parity.pairs import (
    BOTH,
    all_near,
    config_file,
    copy_state,
    near,
    quiet,
    starts_alike,
    stir,
    trainable,
    weights_file,
)  # fmt: skip

SMALL: dict[str, Any] = {"shadow_hidden_size": 8, "shadow_intermediate_size": 20}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux2": ("flux2", {}),
    "flux2-small": ("flux2", {**SMALL, "r": 3, "update_hidden_size": 5}),
    "flux2-heads": ("flux2", {"shadow_num_attention_heads": 1, "shadow_alpha": 0.5}),
    "flux2-own": ("flux2", {"share_embeddings": False, "init_weights": False}),
    "flux2-some": ("flux2", {"target_modules": ["single_transformer_blocks.1", "single_transformer_blocks.2"]}),
    "pixart": ("pixart", {}),
    "pixart-small": ("pixart", {**SMALL, "shadow_num_hidden_layers": 2}),
    "aura": ("aura", {"shadow_intermediate_size": 7}),
    "sana": ("sana", {"r": 2}),
}
every = pytest.mark.parametrize("case", CASES)


def adapt(library: Any, case: str) -> Any:
    name, fields = CASES[case]
    base = build(name)
    torch.manual_seed(11)
    return quiet(library.get_peft_model, base, library.ShadowConfig(**fields)).eval()


def pair(case: str) -> tuple[Any, Any]:
    ours, theirs = (adapt(library, case) for library in BOTH)
    stir(theirs, 0.1)
    copy_state(theirs, ours)
    return ours, theirs


@every
def test_names_and_starts(case: str) -> None:
    """A Flux2's are the base's numbers; where a feed-forward part of a double-stream block is cut, the halves are kept."""
    ours, theirs = (adapt(library, case) for library in BOTH)
    assert trainable(ours) == trainable(theirs)
    held = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        assert held[name].shape == parameter.shape
        if "shadow_backbone.default.model" in name or ("shadow_projection" in name and "flux2" in case):
            if not (name.endswith("linear_in.weight") and "shadow_intermediate_size" in CASES[case][1]):
                assert torch.equal(held[name], parameter), name
        else:
            starts_alike(held[name], parameter, name)


@every
def test_outputs_and_gradients(case: str) -> None:
    results = []
    for model in pair(case):
        said = out(model, CASES[case][0])
        said.square().mean().backward()
        results.append((said, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, mine), (theirs, yours) = results
    near(ours, theirs)
    all_near(mine, yours)
    assert (ours - out(build(CASES[case][0]), CASES[case][0])).abs().max() > 1e-3


@every
@pytest.mark.parametrize("writer", [0, 1], ids=["ours", "theirs"])
def test_files_both_ways(case: str, writer: int, tmp_path: Path) -> None:
    name, both = CASES[case][0], pair(case)
    for model, folder in zip(both, ("0", "1"), strict=True):
        quiet(model.save_pretrained, str(tmp_path / folder))
    mine, yours = (weights_file(tmp_path / folder) for folder in "01")
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in yours.items()}
    assert config_file(tmp_path / "0") == config_file(tmp_path / "1")
    library = (trimtab, peft)[1 - writer]
    read = quiet(library.PeftModel.from_pretrained, build(name), str(tmp_path / str(writer)))
    near(out(read.eval(), name), out(both[writer], name))


@pytest.mark.parametrize("sizes", [{}, {"num_attention_heads": 1}, {"num_layers": 1, "mlp_ratio": 1.5}])
def test_a_flux_that_is_there_already(sizes: dict[str, Any], tmp_path: Path) -> None:
    build("flux2", **sizes).save_pretrained(tmp_path / "small")
    models = []
    for library in BOTH:
        base = build("flux2")
        torch.manual_seed(11)
        config = library.ShadowConfig(shadow_model=str(tmp_path / "small"))
        models.append(quiet(library.get_peft_model, base, config).eval())
    ours, theirs = models
    assert trainable(ours) == trainable(theirs)
    held = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if "shadow_backbone" in name:
            assert torch.equal(held[name], parameter), name
    assert sum("shadow_backbone" in n and not p.requires_grad for n, p in held.items()) == 6
    stir(theirs, 0.1)
    copy_state(theirs, ours)
    near(out(ours, "flux2"), out(theirs, "flux2"))
    for model, folder in ((ours, "0"), (theirs, "1")):
        quiet(model.save_pretrained, str(tmp_path / folder))
    assert weights_file(tmp_path / "0").keys() == weights_file(tmp_path / "1").keys()
    for writer in "01":
        for library in BOTH:
            read = quiet(library.PeftModel.from_pretrained, build("flux2"), str(tmp_path / writer)).eval()
            near(out(read, "flux2"), out(theirs, "flux2"))


@pytest.mark.parametrize(
    "sizes",
    [{"in_channels": 6}, {"attention_head_dim": 12, "axes_dims_rope": (4, 4, 2, 2)}, {"num_layers": 4},
     {"num_attention_heads": 3}, {"mlp_ratio": 3.0}, {"guidance_embeds": False}],
)  # fmt: skip
def test_one_that_does_not_fit_is_refused_by_both(sizes: dict[str, Any]) -> None:
    small, base = build("flux2", **sizes), build("flux2")
    for validate in (find(PATH, "validate_pretrained_flux_shadow"), theirs_of.validate_pretrained_flux_shadow):
        with pytest.raises(ValueError, match="Flux2"):
            validate(base, small)


PATH = "peft.tuners.shadow.diffusion_models"


def test_which_class_serves_a_model() -> None:
    for name in ("flux2", "flux1", "sd3", "plain"):
        ours, theirs = (
            found(build(name))
            for found in (find(PATH, "get_diffusion_shadow_backend"), theirs_of.get_diffusion_shadow_backend)
        )
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.__name__ == theirs.__name__
    for of in ("DiffusionShadowBackend", "Flux2ShadowBackend"):
        assert issubclass(find(PATH, of), find(PATH, "DiffusionShadowBackend"))


@pytest.mark.parametrize("fields", [{}, {"shadow_hidden_size": 8}, {"share_embeddings": False}])
def test_the_parts_by_themselves(fields: dict[str, Any]) -> None:
    base, h = build("flux2", num_layers=4, num_single_layers=9), torch.randn(2, 11, 16)
    places = base.pos_embed(torch.arange(44).view(11, 4))
    args = (h, None, torch.randn(2, 1, 48), places)
    results = []
    for library, found in ((trimtab, lambda name: find(PATH, name)), (peft, lambda name: getattr(theirs_of, name))):
        backend = found("Flux2ShadowBackend")
        assert backend.supports(base)
        assert not backend.supports(nn.Linear(2, 2))
        made = backend.build_mirror(base, library.ShadowConfig(shadow_num_hidden_layers=3, **fields))
        assert isinstance(made, found("DetachedFluxShadowModel"))
        kwargs = backend.prepare_block_kwargs(args, {"joint_attention_kwargs": None})
        said = backend.forward_backbone(made, h, kwargs).last_hidden_state
        denoised = made.model(**batch("flux2"), return_dict=False)[0]
        projection = nn.Linear(said.shape[-1], 16, bias=False)
        backend.initialize_projection(projection, said.shape[-1])
        backend.freeze_embeddings(made)
        frozen = {n for n, p in made.named_parameters() if not p.requires_grad}
        kept = found("freeze_flux_stem_embeddings")(made)
        shapes = {n: tuple(p.shape) for n, p in made.named_parameters()}
        results.append((said, denoised, projection.weight, frozen, kept, shapes, kwargs.keys(), dict(made.config)))
    mine, yours = results
    for a, b in zip(mine[:3], yours[:3], strict=True):
        near(a, b)
    assert mine[3:7] == yours[3:7]
    assert {k: v for k, v in mine[7].items() if k[0] != "_"} == {k: v for k, v in yours[7].items() if k[0] != "_"}
    assert all(p.requires_grad for p in base.parameters())


def test_none_comes_out_as_a_model_by_itself() -> None:
    for case in ("flux2", "pixart"):
        for model in pair(case):
            with pytest.raises(NotImplementedError):
                model.unload_shadow()


@pytest.mark.parametrize("name", ["flux1", "sd3"])
def test_blocks_that_return_text_as_well_work_here_alone(name: str) -> None:
    """What PEFT takes for the image is the text."""
    ours, theirs = (quiet(library.get_peft_model, build(name), library.ShadowConfig()).eval() for library in BOTH)
    assert trainable(ours) == trainable(theirs)
    near(out(ours, name), out(build(name), name))
    with pytest.raises(RuntimeError, match="size of tensor"):
        out(theirs, name)
