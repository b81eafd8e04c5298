"""Files that engines, orchestrators, simulators and notebooks read, made from a verified plan.

>>> import planc, planc.export, tempfile
>>> plan = planc.compile(planc.load_spec("moe-61l-ep64-dp2"))
>>> [path.name for path in planc.export.write(plan, ["sglang"], tempfile.mkdtemp()).paths]
['expert_location.json', 'launch.sh']
"""

from planc.export.target import Job, Target
from planc.export.targets import ALL, TARGETS, Exported, refusals, target, write

__all__ = ["ALL", "TARGETS", "Exported", "Job", "Target", "refusals", "target", "write"]
