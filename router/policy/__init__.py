"""Scheduling policies: where a request goes, in predicted seconds."""

from twinpool.router.policy.base import Passed, Placement, Policy, Refusal, View
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo
from twinpool.router.policy.least_seconds import LeastSeconds
from twinpool.router.policy.registry import DEFAULT, POLICIES, make_policy, policy_names

__all__ = [
    "DEFAULT",
    "POLICIES",
    "LeastSeconds",
    "Parameter",
    "Passed",
    "Placement",
    "Policy",
    "PolicyInfo",
    "Refusal",
    "View",
    "make_policy",
    "policy_names",
]
