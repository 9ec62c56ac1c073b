"""One of two processes that would train many adapters at once: it is refused before anything is done."""

import torch.distributed

from trimtab import train_many
from trimtab.errors import TrainError

torch.distributed.init_process_group("gloo")
try:
    train_many(None, [])
except TrainError as error:
    assert "one process" in str(error), error
else:
    raise SystemExit("It was not refused.")
torch.distributed.destroy_process_group()
