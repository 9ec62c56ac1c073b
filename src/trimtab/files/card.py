"""The README.md of a saved adapter: its data as front matter, and a few words for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.core.config import FORMAT_VERSION, type_name

NAME = "README.md"

BODY = """# {title}

An adapter of method {method}{base}, saved by trimtab in the format of PEFT.

```python
from trimtab import {auto}

model = {auto}.from_pretrained("path/to/this/folder")
```

### Framework versions

- PEFT {version}
"""


def writers(folder: Path, config: Any, described: bool = True) -> dict[Path, Callable[[Path], None]]:
    """Path -> function that writes the card: a new one, or the one that is there with its data brought up to date.

    Args:
        described: whether the base model has a config of its own: the card of one without names no base, as PEFT's.
    """
    path = folder / NAME

    def write(target: Path) -> None:
        target.write_text(render(path, config, described), encoding="utf-8")

    return {path: write}


def render(path: Path, config: Any, described: bool = True) -> str:
    """The card's text; the body of one that exists is kept."""
    import yaml

    data: dict[str, Any] = {}
    method = "?" if config is None else type_name(config)
    task = str(getattr(getattr(config, "task_type", None), "value", getattr(config, "task_type", None)))
    base = getattr(config, "base_model_name_or_path", None) if described else None
    auto = "AutoPeftModelForCausalLM" if task == "CAUSAL_LM" else "AutoPeftModel"
    body = BODY.format(
        title="Adapter", method=method, base=f" for {base}" if base else "", auto=auto, version=FORMAT_VERSION
    )
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if text.startswith("---\n") and "\n---\n" in text[4:]:
            front, _, body = text[4:].partition("\n---\n")
            data = yaml.safe_load(front) or {}
        else:
            body = text
    data["library_name"] = "peft"
    tags = set(data.get("tags") or ()) | {method.lower(), *(["transformers"] if described else ())}
    if base:
        data["base_model"] = base
        tags.add(f"base_model:adapter:{base}")
    data["tags"] = sorted(tags)
    if task == "CAUSAL_LM":
        data.setdefault("pipeline_tag", "text-generation")
    return f"---\n{yaml.safe_dump(data, sort_keys=True, allow_unicode=True)}---\n{body}"
