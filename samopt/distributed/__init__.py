"""What an optimizer has to know of the other ranks; ``torch.distributed`` does the work."""

from samopt.distributed.replicas import data_parallel_modules, runs_on_several_ranks, unsynced
from samopt.distributed.shards import Shards, abandon_pass, local_part, reshard

__all__ = [
    "Shards",
    "abandon_pass",
    "data_parallel_modules",
    "local_part",
    "reshard",
    "runs_on_several_ranks",
    "unsynced",
]
