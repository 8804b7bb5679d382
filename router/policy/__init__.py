"""Scheduling policies: where a request goes, in predicted seconds."""

from twinpool.router.policy.base import Placement, Policy, View
from twinpool.router.policy.least_seconds import LeastSeconds

__all__ = ["LeastSeconds", "Placement", "Policy", "View"]
