"""A frozen model spread over the processes of a run (--shard_base yes): each keeps 1/N of every layer.

While a layer computes, forward or backward, it holds the other processes' parts as well, and then frees them: torch's
FSDP2, known as stage 3 of ZeRO (Rajbhandari et al. 2020). The trained prefix is whole in every process, and its
gradients are averaged as in any run of several processes. Word embeddings and head are whole, too.
"""

import logging
from collections.abc import Iterator

from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from prefixlib.methods.layers import find_stacks

logger = logging.getLogger(__name__)

APART = "_ddp_params_and_buffers_to_ignore"  # names that DistributedDataParallel leaves alone


def shard(model: nn.Module, base: nn.Module, device: str) -> None:
    """Spread the layers of `base`, a part of `model`; DistributedDataParallel wraps `model`.

    Every process of the run must call it, with the whole model in memory. device: "cpu" or "cuda".
    """
    processes = distributed.get_world_size()
    mesh = init_device_mesh(device, (processes,))
    for _, layers in find_stacks(base):
        for layer in layers:
            for parameter in layer.parameters():  # compute/onednn.py may have transposed it, which FSDP refuses
                parameter.data = parameter.data.contiguous()
            fully_shard(layer, mesh=mesh)
    spread = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    setattr(model, APART, list(spread))
    here, in_all = sum(p.to_local().numel() for p in spread.values()), sum(p.numel() for p in spread.values())
    logger.info(
        "layers spread over %d processes: %s of their %s parameters here", processes, f"{here:,}", f"{in_all:,}"
    )


def gather(base: nn.Module) -> None:
    """Make the layers whole until `scatter`, so that each process can compute alone. Every process calls it."""
    for layer in _sharded(base):
        layer.set_reshard_after_forward(False)
        layer.unshard()


def scatter(base: nn.Module) -> None:
    """Undo `gather`."""
    for layer in _sharded(base):
        layer.set_reshard_after_forward(True)
        layer.reshard()


def _sharded(base: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in base.modules() if isinstance(module, FSDPModule))
