"""Which holder gets which expert, for known traffic: even load, quiet links, and a certificate of how good that is."""

from planc.planner.certificate import Certificate
from planc.planner.fabric import Fabric
from planc.planner.layer import Problem
from planc.planner.objectives import Width
from planc.planner.plan import Group, Planned, plan_groups
from planc.planner.record import certificate, tables_of

__all__ = [
    "Certificate",
    "Fabric",
    "Group",
    "Planned",
    "Problem",
    "Width",
    "certificate",
    "plan_groups",
    "tables_of",
]
