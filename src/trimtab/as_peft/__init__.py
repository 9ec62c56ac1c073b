"""`import trimtab.as_peft`, as the first import: from then on `peft` is trimtab, for every library that looks for it.

    import trimtab.as_peft          # first, before transformers, trl, diffusers ...
    from peft import LoraConfig     # trimtab's

`python -m trimtab.as_peft script.py args...` runs an unmodified script that way. It makes no difference whether the
real peft is installed. Names that trimtab lacks are listed in docs/differences-names.txt.
"""

from __future__ import annotations

from trimtab.as_peft.availability import refuse_if_too_late, reset_caches
from trimtab.as_peft.finder import install

__all__ = ["install"]

refuse_if_too_late()
install()
reset_caches()
