"""The tuner: the model with its adapters, as PEFT's `LoraModel` and its like are. `PeftModel.base_model` is one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from trimtab.core.combining import Recipe
from trimtab.core.config import PeftConfig
from trimtab.core.report import warn
from trimtab.errors import AdapterNameError, ArgumentError
from trimtab.graft import merging, steps
from trimtab.graft.adapters import Adapter
from trimtab.graft.combine import combine
from trimtab.graft.graft import Graft
from trimtab.layer.adapted import AdaptedLayer
from trimtab.methods import config_class, method_class, prefix_of
from trimtab.shell import mixtures, ranks
from trimtab.shell.choosing import Choosing
from trimtab.shell.loading import Source
from trimtab.shell.running import Running

OWN_LOSS = re.compile(r"_get_([a-z]+)_loss")  # what PEFT's users add to the loss of a formula by hand


class Tuner(Running, Choosing):
    """A model and its adapters of any method.

    Args:
        model: the model; it is adapted in place, its own parameters frozen.
        peft_config: a config, or {adapter name: config}.
        adapter_name: the adapter's name, where one config is given.
        low_cpu_mem_usage: build the adapters without storage; a state dict is loaded into them later.
        kwargs: for `add`. As in PEFT, adapters that are put in by themselves have their layers' dtypes, half precision
            too, unless they are built without storage; `PeftModel` keeps them in fp32 (`autocast`).

    Attributes:
        prefix: what the names of the method's tensors start with.
    """

    prefix = "lora_"
    tuner_layer_cls = AdaptedLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.graft = Graft.of(model)
        configs = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        kwargs.setdefault("autocast", low_cpu_mem_usage)
        for name, config in configs.items():
            self.add(name, config, **({"meta": True} if low_cpu_mem_usage else {}) | kwargs)
        if configs:
            self._turn_to(next(iter(configs)))
        self.model.peft_config = self.peft_config  # type: ignore[assignment]

    def _turn_to(self, name: str) -> None:
        """Use just this adapter, whatever trains; layers that were switched off by themselves stay off."""
        graft = self.graft
        off = [x for x in graft.base.parts if not x.outside[1]] if graft.board.route.enabled else []
        graft.set_active([name], trainable=None)
        for part in off:
            part.switch([name], False)

    # ------------------------------------------------------------------ adapters
    def add(self, name: str, config: PeftConfig, **kwargs: Any) -> Adapter:
        """Add an adapter; see `Graft.add`."""
        prefix = getattr(method_class(config), "prefix", "") if isinstance(config, PeftConfig) else ""
        if name and isinstance(name, str) and name in prefix:
            warn(
                f"Adapter name '{name}' should not be contained in the prefix '{prefix}' of its tensors' names; other "
                "libraries may then take one for the other."
            )
        self._load_among(config)
        with self._choosing(name, config, kwargs.pop("autocast", True)) as how:
            adapter = self.graft.add(name, config, **how, **kwargs)
        self._modules.update(self.graft.commons)
        mixtures.place(self.graft, self)
        if getattr(config, "bias", "none") in ("all", "lora_only") and adapter.biases:
            self.graft._place_biases()
        return adapter

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Build an adapter whose config has been put into `peft_config`; it is not active until `set_adapter`.

        Args:
            model: this tuner's.
            autocast_adapter_dtype: half-precision layers have adapters in fp32.
            low_cpu_mem_usage: build it without storage.
        """
        if model is not self.model:
            raise ArgumentError("inject_adapter(model, ...) is for the tuner's own model: `tuner.model`.")
        if adapter_name in self.graft.adapters:
            return
        config = self.peft_config[adapter_name]
        self.add(adapter_name, config, autocast=autocast_adapter_dtype, meta=low_cpu_mem_usage, trainable=False)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can stand for all that an adapter changes."""
        layers = [layer for layer in self.graft.layers.values() if adapter_name in layer.adapters]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    @property
    def target_module_mapping(self) -> dict[str, Any]:
        """{model type: what the first adapter's method adapts there if its config does not say}."""
        config = next(iter(self.peft_config.values()))
        known = getattr(method_class(config), "targets", {})
        return {kind: names if isinstance(names, str) else list(names) for kind, names in known.items()}

    def _class_of(self, config: PeftConfig) -> type[Choosing]:
        named = tuner_class(config.peft_type)
        return type(self) if isinstance(self, named) else named

    def _load_among(self, config: PeftConfig) -> None:
        """Load the adapters that a router works among, where they are not there."""
        router = mixtures.router_class(config) if isinstance(config, PeftConfig) else None
        for name, path in router.among(config).items() if router is not None else ():
            if name not in self.graft.adapters:
                source = Source(path, self.model, name, {}, overrides={})
                with source.blamed():
                    self.graft.add(name, source.config, tensors=source, trainable=False)

    @property
    def peft_config(self) -> dict[str, Any]:
        """{adapter: its config}."""
        return self.graft.configs

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use, innermost first."""
        return list(self.graft.board.route.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter in use, or the list of them where there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the adapted layers."""
        layers = self.graft.layers
        parts = {f"{x.path}.{p}" for x in layers.values() for s in x.sites.values() for p in s.parts}
        own = [key for key, layer in layers.items() if not layer.param and key not in parts]
        foreign = self.graft.base.foreign
        return own if not foreign else [path for path in self.graft.base.modules if path in foreign or path in own]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of adapted parameters that have no layer of their own."""
        return [key for key, layer in self.graft.layers.items() if layer.param]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter or several (the first innermost) and train just these; with `inference_mode`, train none."""
        several = isinstance(adapter_name, Iterable) and not isinstance(adapter_name, str)
        names: list[Any] = list(adapter_name) if several else [adapter_name]
        if self.graft.merged:
            for name in names:  # before anything is undone
                self.graft.require(name)
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.graft.unmerge()
        self.graft.set_active(names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Forget an adapter, or several: all or, where one is unknown, none."""
        names = dict.fromkeys([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        if unknown := [name for name in names if name not in self.graft.adapters]:
            raise AdapterNameError(f"Adapter {', '.join(map(str, unknown))} does not exist")
        for name in names:
            self.graft.delete(name)
        mixtures.place(self.graft, self)

    def enable_adapter_layers(self) -> None:
        """Switch all adapters on."""
        self.graft.set_enabled(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the output is the base model's."""
        self.graft.set_enabled(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen, whether they are active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.graft.set_trainable(name, requires_grad)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others; it is neither active nor trainable until `set_adapter` says so.

        LoRAs combine to a LoRA; the scales of IA3 are merged as they are, whatever the type. Adapters of all other
        methods that change weights, and those of different methods, become a LoRA by their deltas: by "svd" and the
        types that end in "_svd".

        Args:
            adapters: the adapters' names; where the ranks differ, use "cat" or a type that ends in "svd".
            weights: one a name; a negative one subtracts.
            adapter_name: the new adapter's name.
            combination_type: "cat" (the exact weighted sum, at the sum of the ranks), "svd" (its best approximation of
                a given rank), "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune" (of the factors), or one
                of the last four with "_svd" (of the deltas). The formulas are in `trimtab.core.combining`.
            svd_rank: the rank that SVDs are cut to; by default the largest of the adapters', where all are LoRAs or
                variants of it.
            svd_clamp: cut the factors' entries at plus and minus this quantile.
            svd_full_matrices: without effect: the thin SVD gives the same factors.
            svd_driver: the driver of `torch.linalg.svd`, for CUDA.
            density: the share of entries that pruning keeps, in (0, 1].
            majority_sign_method: how TIES elects signs, "total" (by magnitude) or "frequency".

        Raises:
            ValueError: adapters, ranks, weights or settings that cannot be combined, or a name that is taken.
        """
        recipe = Recipe(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        config, tensors = combine(self.graft, adapters, weights, adapter_name, recipe)
        self.add(adapter_name, config, tensors=tensors, trainable=False)

    # ------------------------------------------------------------------ merging
    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (the active ones by default) into the base; `unmerge_adapter` restores it bit by bit."""
        self.graft.merge(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base's original weights back."""
        self.graft.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with adapters (the active ones by default) folded into its weights, and nothing else left."""
        graft = self.graft
        chosen = graft.board.route.active if adapter_names is None else adapter_names
        merged = graft.merged
        if not merged or merging.left(graft.base, chosen):
            graft.merge(chosen, safe_merge, keep=False, progress=_progress(progressbar))
        graft.board.set(active=tuple(dict.fromkeys([*merged, *chosen])))
        return graft.unload(merge=True)

    def unload(self, pristine: bool = False) -> nn.Module:
        """The base model with its own module objects back.

        Args:
            pristine: also undo what adapters' starts (PiSSA, OLoRA) did to the base's weights; else they stay, as in
                PEFT: the residual is what such an adapter's file belongs to.
        """
        return self.graft.unload(pristine=pristine)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        return self.merge_and_unload(progressbar, safe_merge, adapter_names) if merge else self.unload()

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        for name in self.active_adapters:
            self.graft.set_trainable(name, True)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The config of a model as a dict; of one that has none, `{"model_type": "custom"}`."""
        config: Any = getattr(model, "config", None)
        found = config.to_dict() if hasattr(config, "to_dict") else config
        return dict(found) if found else {"model_type": "custom"}

    def update_and_allocate(self, global_step: int) -> None:
        """Tell the active adapters that optimiser step `global_step` is done: rank schedules (AdaLoRA) act on it.

        Without it they count the steps themselves; after the first call they leave that to the caller.
        """
        for name in self.active_adapters:
            steps.by_hand(self.graft.adapters[name], global_step)

    def resize_modules_by_rank_pattern(self, rank_pattern: ranks.Pattern, adapter_name: str) -> None:
        """Cut an AdaLoRA adapter down to the triplets that a pattern keeps: new, smaller parameters in the same places.

        Args:
            rank_pattern: {a layer's lora_E: for each triplet whether it stays}, as in the config after training; layers
                that are not in it, and those that were cut before, stay as they are.
        """
        ranks.resize(self.graft, rank_pattern, adapter_name)

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: ranks.Pattern, state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """Cut the tensors of a PeftModel's state dict, which is changed and returned, in the same way."""
        return ranks.resize_state(rank_pattern, state_dict, adapter_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
        if found := OWN_LOSS.fullmatch(name):
            return partial(self.penalty_left, found[1])
        shown = mixtures.show(self.graft, name) if "graft" in self.__dict__ else None
        return getattr(self.model, name) if shown is None else shown


def _progress(show: bool) -> Callable[[Any], Any]:
    if not show:
        return iter
    from rich.console import Console
    from rich.progress import track

    return lambda items: track(items, "Merging", console=Console(stderr=True))


_CLASSES: dict[str, type[Tuner]] = {}


def tuner_class(peft_type: Any) -> type[Tuner]:
    """The tuner under the name PEFT gives it for a method (`LoraModel` ...); all are `Tuner`."""
    name = config_class(_kind(peft_type)).__name__.removesuffix("Config") + "Model"
    if name not in _CLASSES:
        # `trimtab.<name>` finds the class again, for pickle.
        facts = {"__doc__": Tuner.__doc__, "__module__": "trimtab", "prefix": prefix_of(_kind(peft_type))}
        _CLASSES[name] = type(name, (Tuner,), facts)
    return _CLASSES[name]


def _kind(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type))
