"""The names of before for `alignment.groups` and `alignment.batch`; they go with the next release."""

from alignment.batch import Batch, Loss, Outputs, Role, Term, Unit
from alignment.groups import Completion, Group, Message

__all__ = ["Batch", "Completion", "Group", "Loss", "Message", "Outputs", "Role", "Term", "Unit"]
