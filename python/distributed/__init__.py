"""Training over several processes, on torch.distributed."""

from tigon.distributed.expert_parallel import ExpertParallel, ShardedExperts

__all__ = ["ExpertParallel", "ShardedExperts"]
