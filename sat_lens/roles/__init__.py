"""What every head does with its attention: streaming statistics, roles, targets.

Definitions and the reasons for them are in :mod:`sat_lens.roles.rule` and
:mod:`sat_lens.attention.distances`.
"""

from sat_lens.roles.measuring import fingerprint, head_roles
from sat_lens.roles.result import HeadRoles
from sat_lens.roles.rule import Thresholds
from sat_lens.vocabulary import DESCRIPTIONS, ROLES

merge = HeadRoles.merge

__all__ = ["DESCRIPTIONS", "ROLES", "HeadRoles", "Thresholds", "fingerprint", "head_roles", "merge"]
