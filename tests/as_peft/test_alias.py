"""The alias itself: imports, metadata, classes, names that are missing, and refusing to come too late."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trimtab
from tests.as_peft import tiny

SOURCE = Path(trimtab.__file__).parents[1]


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=tiny.environment(**environment)
    )


def test_the_package_looks_installed():
    import peft

    assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
    assert importlib.util.find_spec("peft") is not None
    assert importlib.metadata.packages_distributions()["peft"] == ["peft"]
    assert [d.metadata["Name"] for d in importlib.metadata.distributions(name="peft")] == ["peft"]


def test_the_package_has_a_folder():
    """PEFT's method comparison asks git about the commit in it, unless it is in site-packages."""
    import peft
    import peft.tuners.lora

    assert Path(peft.__path__[0]).is_dir()
    assert Path(peft.__file__).parent == Path(peft.__path__[0])
    assert Path(peft.tuners.lora.__path__[0]).is_dir()
    assert importlib.util.find_spec("peft").submodule_search_locations == list(peft.__path__)
    with pytest.raises(ModuleNotFoundError, match="lacks it"):  # nothing of trimtab's is found below peft
        importlib.import_module("peft.finder")


@pytest.mark.parametrize("library", ["transformers.utils", "accelerate.utils", "diffusers.utils", "trl.trainer.utils"])
def test_libraries_see_it(library):
    assert importlib.import_module(library).is_peft_available()


def test_modules_give_the_same_objects():
    import peft
    import peft.tuners.lora.config
    from peft.functional import get_peft_model_state_dict
    from peft.peft_model import PeftModelForCausalLM
    from peft.tuners.lora import LoraConfig
    from peft.utils.other import ModulesToSaveWrapper

    assert LoraConfig is peft.LoraConfig is peft.tuners.lora.config.LoraConfig is trimtab.LoraConfig
    assert PeftModelForCausalLM is trimtab.PeftModelForCausalLM
    assert get_peft_model_state_dict is trimtab.get_peft_model_state_dict
    assert ModulesToSaveWrapper is peft.utils.ModulesToSaveWrapper
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.LORA] is LoraConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is peft.LoraModel
    assert peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"] == ["q_proj", "v_proj"]
    assert (peft.utils.WEIGHTS_NAME, peft.utils.SAFETENSORS_WEIGHTS_NAME) == (
        "adapter_model.bin",
        "adapter_model.safetensors",
    )


def test_every_method_of_the_registry_has_its_modules():
    from trimtab.methods import METHODS

    for peft_type, (_, _, config) in METHODS.items():
        for module in ("", ".config", ".layer", ".model"):
            assert importlib.util.find_spec(f"peft.tuners.{peft_type.lower()}{module}") is not None
        prefix = config.removesuffix("Config")
        layer = importlib.import_module(f"peft.tuners.{peft_type.lower()}.layer")
        assert getattr(layer, f"{prefix}Layer").peft_type == peft_type


def test_layer_classes_answer_by_method_and_kind():
    from peft import LoraConfig, LoraModel, TrainableTokensConfig, get_peft_model
    from peft.tuners.lora import LoraLayer, layer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True)
    model = get_peft_model(tiny.llama(), config)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    embed, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert all(isinstance(q, c) for c in (BaseTunerLayer, LoraLayer, layer.Linear, torch.nn.Module))
    assert not any(
        isinstance(q, c) for c in (layer.Embedding, layer.Conv2d, TrainableTokensLayer, ModulesToSaveWrapper)
    )
    assert isinstance(embed, layer.Embedding)
    assert isinstance(head, ModulesToSaveWrapper)
    assert isinstance(head, AuxiliaryTrainingWrapper)
    assert not isinstance(head, BaseTunerLayer)
    assert isinstance(model.base_model, LoraModel)
    assert isinstance(model.base_model, BaseTuner)
    assert not isinstance(torch.nn.Linear(2, 2), LoraLayer)
    assert issubclass(layer.Linear, LoraLayer)
    tokens = get_peft_model(tiny.llama(), TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]))
    assert isinstance(tokens.base_model.model.model.embed_tokens, TrainableTokensLayer)
    assert not isinstance(tokens.base_model.model.model.embed_tokens, LoraLayer)
    beside = get_peft_model(
        tiny.llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4]})
    )
    assert isinstance(beside.base_model.model.model.embed_tokens, TrainableTokensWrapper)
    assert isinstance(layer.Linear(torch.nn.Linear(2, 2), "default", r=1), LoraLayer)


def test_what_is_missing_is_said_where_to_look_up():
    import peft

    with pytest.raises(AttributeError, match="docs/differences"):
        peft.no_such_name
    with pytest.raises(ModuleNotFoundError, match="docs/differences"):
        importlib.import_module("peft.no_such_module")
    with pytest.raises(ImportError):
        exec("from peft.utils import no_such_name")


def fake_peft(folder: Path) -> str:
    """A folder with another package called peft."""
    package = folder / "peft"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.0.1'\n")
    info = folder / "peft-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    return f"{SOURCE}:{folder}"


def test_it_comes_before_an_installed_peft_but_not_after_it_was_imported(tmp_path):
    path = fake_peft(tmp_path)
    code = "import trimtab.as_peft, peft, importlib.metadata as m; print(peft.LoraConfig.__module__, m.version('peft'))"
    assert python(code, PYTHONPATH=path).stdout.split() == ["trimtab.methods.lora", "0.21.2"]
    late = python("import peft; import trimtab.as_peft", PYTHONPATH=path)
    assert late.returncode == 1
    assert "The real peft" in late.stderr
    assert "the first import" in late.stderr


@pytest.mark.parametrize("module", ["transformers.trainer", "diffusers.utils.import_utils", "trl.trainer.sft_trainer"])
def test_it_refuses_where_a_library_has_noted_that_there_is_no_peft(module):
    late = python(f"import {module}; import trimtab.as_peft")
    assert late.returncode == 1
    assert "has noted that peft is not available" in late.stderr


def test_it_may_come_after_libraries_that_have_not_decided_yet():
    code = """
import transformers, accelerate
from transformers.utils import is_peft_available
from accelerate.utils import is_peft_available as theirs
assert not is_peft_available() and not theirs()
import trimtab.as_peft
assert is_peft_available() and theirs()
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.trainer import PeftModel
assert PeftModel is trimtab.PeftModel
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_an_unmodified_script_runs(tmp_path):
    (tmp_path / "helper.py").write_text("value = 5\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, helper, peft\nfrom peft import LoraConfig\nif __name__ == '__main__':\n"
        "    print(LoraConfig.__module__, helper.value, sys.argv[0].endswith('script.py'), sys.argv[1:])\n"
    )
    run = lambda *arguments: subprocess.run(
        [sys.executable, "-m", "trimtab.as_peft", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=tiny.environment(),
    )
    assert run(str(script), "--a", "b").stdout.strip() == "trimtab.methods.lora 5 True ['--a', 'b']"
    assert run("-m", "script", "c").stdout.strip() == "trimtab.methods.lora 5 True ['c']"
    assert "no such file" in run("missing.py").stderr
    assert "usage" in run().stderr


def test_a_library_without_the_alias_sees_no_peft():
    done = python("import trimtab, transformers.utils as u, sys; print(u.is_peft_available(), 'peft' in sys.modules)")
    assert done.stdout.split() == ["False", "False"]
