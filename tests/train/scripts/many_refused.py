"""One of two processes that would train many adapters at once: it is refused before anything is done."""

import pytest
import torch.distributed

from trimtab import train_many
from trimtab.errors import TrainError

torch.distributed.init_process_group("gloo")
with pytest.raises(TrainError, match="one process"):
    train_many(None, [])
torch.distributed.destroy_process_group()
