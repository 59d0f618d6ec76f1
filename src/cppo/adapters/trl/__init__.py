"""Any trust region of this package inside TRL's ``GRPOTrainer``. See :mod:`cppo.adapters.trl.trainer` for how."""

from .configuration import LOSS_TYPES, check_config
from .trainer import CPPOTrainer, TrustRegionTrainer

__all__ = ["LOSS_TYPES", "CPPOTrainer", "TrustRegionTrainer", "check_config"]
