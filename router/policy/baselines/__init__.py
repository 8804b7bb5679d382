"""What others do, as policies to compare with: each as its original decides, on the same engine and books.

All bind at arrival. They see what their original sees: predictions only where it predicts, caches only where it looks.
"""

from twinpool.router.policy.baselines import cache_aware, colocated, pd, preble, simple
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo

INFOS: tuple[PolicyInfo, ...] = (*simple.INFOS, *cache_aware.INFOS, *preble.INFOS, *pd.INFOS, *colocated.INFOS)

__all__ = ["INFOS", "Parameter", "PolicyInfo"]
