"""What an optimizer has to know of the other ranks; ``torch.distributed`` does the work."""

from samopt.distributed.averages import mean_over_ranks
from samopt.distributed.refusals import refuse_unsupported
from samopt.distributed.replicas import (
    calling_data_parallel_module,
    data_parallel_modules,
    has_graph_to_learn,
    is_first_rank,
    runs_on_several_ranks,
    unsynced,
)
from samopt.distributed.shards import Shards, abandon_pass, is_fully_sharded, local_part, reshard

__all__ = [
    "Shards",
    "abandon_pass",
    "calling_data_parallel_module",
    "data_parallel_modules",
    "has_graph_to_learn",
    "is_first_rank",
    "is_fully_sharded",
    "local_part",
    "mean_over_ranks",
    "refuse_unsupported",
    "reshard",
    "runs_on_several_ranks",
    "unsynced",
]
