"""What an optimizer has to know of the other ranks; ``torch.distributed`` does the work."""

from samopt.distributed.replicas import data_parallel_modules, runs_on_several_ranks, unsynced

__all__ = ["data_parallel_modules", "runs_on_several_ranks", "unsynced"]
