"""An adapter in the place of one that has its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from trimtab.graft.graft import Graft
from trimtab.shell.state import adapter_tensors


@contextlib.contextmanager
def replaced(graft: Graft | None, name: str) -> Iterator[None]:
    """Make room for a new adapter of a name that is taken; the old one comes back if the new one cannot be had."""
    if graft is None or name not in graft.adapters:
        yield
        return
    old, active = graft.adapters[name], graft.board.route.active
    tensors = {key: value.detach().clone() for key, value in adapter_tensors(graft, name, False, None).items()}
    config = old.config.copy()
    graft.delete(name)
    try:
        yield
    except BaseException:
        graft.add(name, config, tensors=lambda slots: tensors, trainable=old.trainable)
        graft.set_active(active, trainable=None)
        raise
    if name in active and name not in graft.board.route.active:
        graft.set_active(active, trainable=None)
