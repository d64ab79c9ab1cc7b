"""Many processes, one draw: gradients of live blocks only, agreement of the ranks, prefetching of live blocks."""

from residrop.engines.distributed.gradients import GradientSync as GradientSync
from residrop.engines.distributed.gradients import data_parallel as data_parallel
from residrop.engines.distributed.ranks import check_ranks as check_ranks
from residrop.engines.distributed.sharded import complete_state as complete_state
from residrop.engines.distributed.sharded import prefetch as prefetch
