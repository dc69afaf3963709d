"""What may stand in a study's way on this machine, or let strangers in: looked at (`facts`), then judged (`findings`).

The two are apart so that every judgement can be tested without the machine that it is about.
"""

from duet_ray.doctor.facts import Dashboard, Facts, SecretFile, look
from duet_ray.doctor.findings import Finding, findings

__all__ = ["Dashboard", "Facts", "Finding", "SecretFile", "findings", "look"]
