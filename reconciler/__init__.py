"""What should be: fold, policies, desired state, drift and plan as pure functions; then the worker.

It stands on `store`, and never imports `adapters`.
"""

from reconciler.drift import Drift, DriftItem, find_drift
from reconciler.fold import FleetState, ProcessState, Resource, fold
from reconciler.plan import Plan, Step, make_plan
from reconciler.policy import Policy
from reconciler.reconciler import Reconciler

__all__ = [
    "Drift",
    "DriftItem",
    "FleetState",
    "Plan",
    "Policy",
    "ProcessState",
    "Reconciler",
    "Resource",
    "Step",
    "find_drift",
    "fold",
    "make_plan",
]
