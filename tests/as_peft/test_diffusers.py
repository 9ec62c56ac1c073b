"""diffusers: LoRA files in pipelines and models, several at once with weights, fused into the base and back."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from tests import diffusion

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    ).eval()


def transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    ).eval()


def inputs(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    if isinstance(model, UNet2DConditionModel):
        return {"sample": random(1, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": random(1, 5, 16)}
    return {
        "hidden_states": random(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": random(1, 5, 16),
        "pooled_projections": random(1, 16),
    }


def out(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).sample


def with_adapter(model, name: str, seed: int, r: int = 4):
    model.add_adapter(LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".lora_A.{name}." in key or f".lora_B.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [unet, transformer])
def test_adapters_with_weights_fused_and_taken_out(make):
    model = make()
    plain = out(model)
    with_adapter(with_adapter(model, "one", 1), "two", 2)
    model.set_adapters("one")
    one = out(model)
    model.set_adapters("two")
    two = out(model)
    assert not close(one, plain)
    assert not close(two, one)
    model.set_adapters(["one", "two"], weights=[1.0, 0.0])
    assert close(out(model), one)
    model.set_adapters(["one", "two"], [0.5, 0.25])
    both = out(model)
    model.disable_adapters()
    assert torch.equal(out(model), plain)
    model.enable_adapters()
    assert close(out(model), both)
    model.fuse_lora()
    assert close(out(model), both)
    model.unfuse_lora()
    assert close(out(model), both)
    model.set_adapters("one")
    model.fuse_lora(lora_scale=0.5)
    half = out(model)
    model.unfuse_lora()
    model.set_adapters("one", 0.5)
    assert close(out(model), half)
    model.delete_adapters("two")
    model.set_adapters("one")
    assert close(out(model), one)
    model.unload_lora()
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    assert torch.equal(out(model), plain)
    assert close(out(with_adapter(model, "one", 1)), one)  # and the same name again


@pytest.mark.parametrize("make", [unet, transformer])
def test_a_saved_adapter_loads_again(make, tmp_path):
    model = with_adapter(make(), "default", 1)
    adapted = out(model)
    model.save_lora_adapter(tmp_path)
    again = make()
    again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert close(out(again), adapted)
    again.load_lora_adapter(tmp_path, prefix=None, adapter_name="second", use_safetensors=True)
    again.set_adapters(["default_0", "second"], [0.0, 1.0])
    assert close(out(again), adapted)


@pytest.mark.parametrize("make", [unet, transformer])
def test_the_last_adapter_goes_and_another_comes_without_a_name(make, tmp_path):
    model = with_adapter(make(), "one", 1)
    plain = out(make())
    one = out(model)
    model.save_lora_adapter(tmp_path, adapter_name="one")
    model.delete_adapters("one")
    assert close(out(model), plain)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)  # diffusers numbers it by how many a layer has
    assert list(model.peft_config) == ["default_0"]
    assert close(out(model), one)


def test_a_file_of_other_shapes_is_refused_by_the_names_in_the_model():
    model = with_adapter(unet(), "one", 1)
    state = get_peft_model_state_dict(model, adapter_name="one")
    key = next(k for k in state if k.endswith("lora_A.weight"))
    name = key.replace("lora_A.weight", "lora_A.one.weight")
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        set_peft_model_state_dict(model, {**state, key: state[key][:, :-1]}, "one")


def test_a_unet_trains(tmp_path):
    model = unet()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(**inputs(model)).sample.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def pipe(model: UNet2DConditionModel) -> StableDiffusionPipeline:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            projection_dim=16,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=None,
        unet=model,
        scheduler=DDPMScheduler(num_train_timesteps=10),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def run(p: StableDiffusionPipeline, **more) -> torch.Tensor:
    p.set_progress_bar_config(disable=True)
    ids = torch.arange(8)[None]
    embeds = p.text_encoder(ids)[0].detach()
    return p(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        height=8,
        width=8,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **more,
    ).images


def test_a_pipeline_loads_weighs_fuses_and_unloads_files(tmp_path):
    files = {}
    for i, name in enumerate(("one", "two")):
        model = with_adapter(unet(), "default", i)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        StableDiffusionPipeline.save_lora_weights(tmp_path / name, unet_lora_layers=layers)
        files[name] = run(pipe(model))
    p = pipe(unet())
    plain = run(p)
    p.load_lora_weights(tmp_path / "one", adapter_name="one")
    assert close(run(p), files["one"])
    assert close(run(p, cross_attention_kwargs={"scale": 0.0}), plain)
    assert close(run(p), files["one"])
    p.load_lora_weights(tmp_path / "two", adapter_name="two")
    p.set_adapters("two")
    assert close(run(p), files["two"])
    assert p.get_active_adapters() == ["two"]
    assert p.get_list_adapters() == {"unet": ["one", "two"]}
    p.set_adapters(["one", "two"], adapter_weights=[0.7, 0.3])
    both = run(p)
    p.fuse_lora()
    assert close(run(p), both)
    p.unfuse_lora()
    assert close(run(p), both)
    p.disable_lora()
    assert close(run(p), plain)
    p.enable_lora()
    p.delete_adapters("one")
    assert p.get_list_adapters() == {"unet": ["two"]}
    p.unload_lora_weights()
    assert torch.equal(run(p), plain)
    p.load_lora_weights(tmp_path / "one", adapter_name="one")
    assert close(run(p), files["one"])


def test_a_shadow_beside_a_transformer(tmp_path):
    from peft import PeftModel, ShadowConfig, get_peft_model
    from peft.tuners.shadow.diffusion_models import Flux2ShadowBackend, get_diffusion_shadow_backend

    flux = diffusion.build("flux2")
    assert get_diffusion_shadow_backend(flux) is Flux2ShadowBackend
    assert get_diffusion_shadow_backend(transformer()) is None
    for name in ("flux2", "sd3"):
        model = get_peft_model(diffusion.build(name), ShadowConfig(init_weights=False)).eval()
        said = diffusion.out(model, name)
        assert not close(said, diffusion.out(diffusion.build(name), name))
        model.save_pretrained(tmp_path / name)
        again = PeftModel.from_pretrained(diffusion.build(name), tmp_path / name)
        assert close(diffusion.out(again, name), said)
