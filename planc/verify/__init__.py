"""What must be true of a plan, checked on the graph itself; the only place that makes a `VerifiedPlan`."""

from planc.verify.plan import Check, Draft, VerifiedPlan
from planc.verify.verify import RULES, verify

__all__ = ["RULES", "Check", "Draft", "VerifiedPlan", "verify"]
