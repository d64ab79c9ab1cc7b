"""Many processes, one draw: gradients of live blocks only, agreement of the ranks, prefetching of live blocks."""

from residrop.distributed.gradients import GradientSync as GradientSync
from residrop.distributed.gradients import data_parallel as data_parallel
from residrop.distributed.ranks import check_ranks as check_ranks
from residrop.distributed.sharded import complete_state as complete_state
from residrop.distributed.sharded import prefetch as prefetch
