"""Shapes are checked in every test: beartype enforces the jaxtyping annotations of `ingest`.

One thread: the models are tiny, and the database shares the cores.
"""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook("ingest", "beartype.beartype")
