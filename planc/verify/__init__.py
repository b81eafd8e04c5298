"""What must be true of a plan, checked on the graph itself; the only place that makes a `VerifiedPlan`."""

from planc.verify.notes import LARGE_EP, plan_notes
from planc.verify.plan import Check, Draft, VerifiedPlan
from planc.verify.read import load_plan
from planc.verify.record import PlanFile, plan_json, plan_record
from planc.verify.verify import RULES, verify

__all__ = [
    "LARGE_EP",
    "RULES",
    "Check",
    "Draft",
    "PlanFile",
    "VerifiedPlan",
    "load_plan",
    "plan_json",
    "plan_notes",
    "plan_record",
    "verify",
]
