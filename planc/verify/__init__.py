"""What must be true of a plan, checked on the graph itself; the only place that makes a `VerifiedPlan`."""

from planc.verify.plan import Check, Draft, VerifiedPlan
from planc.verify.read import load_plan
from planc.verify.record import PlanFile, plan_json, plan_record
from planc.verify.verify import RULES, verify

__all__ = ["RULES", "Check", "Draft", "PlanFile", "VerifiedPlan", "load_plan", "plan_json", "plan_record", "verify"]
